"""An EAGLE-3 head in its published layout drafts what a plain torch model of it drafts, alone and in a ring."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from exporter.bundle import ExportOptions, export_bundle
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.rows import Row
from flowspec_edge.engine.drafters.eagle3 import load_drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import CheckpointError
from flowspec_edge.origin.ring import Ring
from tests.bundles import MadeOnce
from tests.exporter.checkpoints import SHAPE, edit_config, save_checkpoint, save_eagle3
from tests.narrowing import present
from tests.ring.conftest import answer_of, ring_of, tokens_of

pytestmark = pytest.mark.slow

TAPS = (2, 4, 5)  # of 8 layers, as published: 2, half, and three from the end
K = 6


@pytest.fixture(scope="module")
def saved(made_once: MadeOnce) -> Path:
    """Target, head and bundle on disk."""
    return made_once("eagle3", save_and_export)


def save_and_export(directory: Path, **head: Any) -> None:
    save_checkpoint(directory / "target", num_hidden_layers=8)
    save_eagle3(directory / "head", **head)
    options: dict[str, Any] = {"precision": "fp32", "block_size": 3, "out": directory / "out"}
    export_bundle(ExportOptions(checkpoint=directory / "target", drafter=directory / "head", **options))


OF_VLLM: dict[str, Any] = {"of_vllm": True, "norm_before_residual": True, "norm_output": True}
LAYOUTS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "the first": (TAPS, {}),
    "vLLM's, four layers": (
        (1, 3, 4, 6),
        {**OF_VLLM, "num_taps": 4, "norm_before_fc": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4, 6]},
    ),
    "vLLM's, norms of each": (TAPS, {"of_vllm": True, "fc_norm": True}),
    "NVIDIA's": ((2, 5, 7), {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 4, 6], "norm_before_fc": True}}),
}


@pytest.fixture(scope="module")
def bundle(saved: Path) -> Bundle:
    return Bundle.load(saved / "out")


class Reference:
    """The published head in plain torch, over a whole path at once."""

    def __init__(self, saved: Path, taps: Sequence[int] = TAPS) -> None:
        weights = load_file(saved / "head/model.safetensors")
        self.weights = {name.replace("layers.0.", "midlayer."): weight for name, weight in weights.items()}
        self.taps, config = taps, json.loads((saved / "head/config.json").read_text())
        self.adds_normed, self.returns_normed = (
            bool(config.get(name)) for name in ("norm_before_residual", "norm_output")
        )
        model = AutoModelForCausalLM.from_pretrained(saved / "target").eval()
        self.model, self.embed = model, model.get_input_embeddings()

    def tapped(self, tokens: Sequence[int]) -> torch.Tensor:
        """What enters the tapped layers: [tokens, taps * hidden_size]."""
        with torch.no_grad():
            states = self.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        return torch.cat([states[tap][0] for tap in self.taps], dim=-1)

    def fused(self, rows: torch.Tensor) -> torch.Tensor:
        if "input_norm.weight" in self.weights:
            rows = self._norm(rows, "input_norm")
        if "fc_norm.0.weight" in self.weights:
            parts = rows.chunk(len(self.taps), dim=-1)
            rows = torch.cat([self._norm(part, f"fc_norm.{tap}") for tap, part in enumerate(parts)], dim=-1)
        return rows @ self.weights["fc.weight"].T

    def draft(self, tokens: Sequence[int], num_verified: int) -> np.ndarray:
        """Log-probabilities of the tokens after the last one; pairs from ``num_verified`` on have drafted features."""
        with torch.no_grad():
            features = self.fused(self.tapped(tokens[:num_verified]))
            for length in range(num_verified, len(tokens)):
                out = self._layer(self.embed(torch.tensor(tokens[1 : length + 1])), features)
                features = torch.cat([features, self._norm(out[-1:], "norm") if self.returns_normed else out[-1:]])
            normed = features[-1] if self.returns_normed else self._norm(features[-1], "norm")
            logits = normed @ self.weights["lm_head.weight"].T
        full = torch.full((SHAPE["vocab_size"],), float("-inf"))
        full[torch.arange(len(logits)) + self.weights["d2t"]] = logits.log_softmax(-1)
        return full.numpy()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + SHAPE["rms_norm_eps"]) * self.weights[f"{name}.weight"]

    def _layer(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        w = {name.removeprefix("midlayer."): value for name, value in self.weights.items()}
        normed = self._norm(features, "midlayer.hidden_norm")
        x = torch.cat([self._norm(embedded, "midlayer.input_layernorm"), normed], -1)
        q, k, v = (
            (x @ w[f"self_attn.{name}_proj.weight"].T).view(len(x), -1, 32).transpose(0, 1) for name in "qkv"
        )  # [heads, rows, head_dim]
        angles = torch.outer(torch.arange(len(x)).float(), 10000.0 ** (-torch.arange(0, 32, 2) / 32))
        q, k = (self._rotate(part, angles.cos(), angles.sin()) for part in (q, k))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = (normed if self.adds_normed else features) + attended.transpose(0, 1).reshape(len(x), -1) @ w[
            "self_attn.o_proj.weight"
        ].T
        normed = self._norm(hidden, "midlayer.post_attention_layernorm")
        gated = torch.nn.functional.silu(normed @ w["mlp.gate_proj.weight"].T) * (normed @ w["mlp.up_proj.weight"].T)
        return hidden + gated @ w["mlp.down_proj.weight"].T

    @staticmethod
    def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@pytest.fixture(scope="module")
def reference(saved: Path) -> Reference:
    return Reference(saved)


def check_draft(tokens: np.ndarray, log_probs: np.ndarray, expected: np.ndarray) -> None:
    """The likeliest ones, with their probabilities."""
    np.testing.assert_allclose(log_probs, np.sort(expected)[::-1][: len(log_probs)], atol=2e-4)
    np.testing.assert_allclose(log_probs, expected[tokens], atol=2e-4)


def test_the_bundle_says_what_it_taps_and_cuts_there(bundle: Bundle) -> None:
    drafter = present(bundle.manifest.drafter)
    assert (drafter.kind, tuple(drafter.taps)) == ("eagle3", TAPS)
    assert [block.start for block in bundle.manifest.blocks] == [0, 2, 3, 4, 5, 6]
    assert {"drafter.onnx", "fuse.onnx", "draft_top.onnx"} <= {entry.file for entry in bundle.manifest.files()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_verified_and_drafted_rows_are_the_published_models(layout: str, made_once: MadeOnce) -> None:
    taps, head = LAYOUTS[layout]
    saved = made_once(f"eagle3 {layout}" if head else "eagle3", lambda root: save_and_export(root, **head))
    bundle, reference = Bundle.load(saved / "out"), Reference(saved, taps)
    assert tuple(present(bundle.manifest.drafter).taps) == taps
    drafter = load_drafter(bundle.directory, bundle.manifest, Head(bundle.directory, bundle.manifest), k=K)
    drafter.open(1, 200)
    tokens = np.random.default_rng(1).integers(2, 2048, 14).tolist()
    hidden = reference.tapped(tokens).numpy()
    pairs = tuple(Row(id, id - 1, tokens[id]) for id in range(1, 10))

    def run(
        rows: tuple[Row, ...] | Sequence[Row], positions: range | Sequence[int], hidden: np.ndarray | None = None
    ) -> DraftFinished:
        hidden = np.zeros((0, 0), np.float32) if hidden is None else hidden
        return drafter.run(RunDraft(1, tuple(rows), np.array(positions), hidden, ()))

    run(pairs[:6], range(6), hidden[:6])
    root = run(pairs[6:], range(6, 9), hidden[6:9])
    check_draft(root.tokens[0], root.log_probs[0], reference.draft(tokens[:10], 9))
    children = [Row(20, 9, tokens[10]), Row(21, 9, tokens[11])]
    level = run(children, [9, 9])
    below = run([Row(22, 21, tokens[12])], [10])
    paths = ([tokens[10]], [tokens[11]], [tokens[11], tokens[12]])
    found = [*zip(level.tokens, level.log_probs, strict=True), (below.tokens[0], below.log_probs[0])]
    for path, draft in zip(paths, found, strict=True):
        check_draft(*draft, reference.draft(tokens[:10] + path, 9))


def watch_drafter(ring: Ring, jobs: list[RunDraft]) -> None:
    """Have the ring's drafter keep each of its jobs in ``jobs``."""
    drafter = present(ring._engine.drafter)
    run = drafter.run

    def run_and_keep(job: RunDraft) -> DraftFinished:
        jobs.append(job)
        return run(job)

    drafter.run = run_and_keep  # type: ignore[method-assign]  # for this one test


@pytest.mark.parametrize(("num_nodes", "schedule"), [(3, "flowspec"), (2, "lockstep")])
async def test_a_ring_brings_the_tapped_rows_together_and_stays_lossless(
    bundle: Bundle, reference: Reference, num_nodes: int, schedule: str
) -> None:
    unsplit = UnsplitModel(bundle.directory, bundle.manifest)
    prompt = np.random.default_rng(2).integers(2, 2048, 20).tolist()
    for temperature in (0.0, 1.0):
        options = GenerateOptions(max_new_tokens=24, temperature=temperature, seed=5, schedule=schedule)
        async with ring_of(num_nodes, bundle) as ring:
            jobs: list[RunDraft] = []
            watch_drafter(ring, jobs)
            tokens = tokens_of(await answer_of(ring, prompt, options))
        assert tokens == list(unsplit.generate(prompt, options))
        hidden = np.concatenate([job.hidden for job in jobs if len(job.hidden)])
        assert len(hidden) >= len(prompt), "the drafter never ran"
        np.testing.assert_allclose(hidden, reference.tapped((prompt + tokens)[: len(hidden)]).numpy(), atol=1e-4)


def change(head: Path, **changes: Any) -> None:
    tensors = load_file(head / "model.safetensors")
    save_file(
        {**tensors, **{name: function(tensors[name]) for name, function in changes.items()}}, head / "model.safetensors"
    )


def shifted(d2t: torch.Tensor) -> torch.Tensor:
    d2t[-1] += 4000
    return d2t


WRONG = {
    "scales attention, or rotates a part of each head": lambda head: edit_config(
        head, rope_scaling={"rope_type": "yarn", "factor": 4.0}
    ),
    "tensor input_norm.weight is missing": lambda head: edit_config(head, norm_before_fc=True),
    "tensor fc.weight has shape [64, 192], expected [64, 256]": lambda head: edit_config(
        head, eagle_aux_hidden_state_layer_ids=[1, 3, 4, 6]
    ),
    "the drafter's hidden_size is 128, the target's is 64": lambda head: edit_config(head, hidden_size=128),
    "the drafter's vocab_size is 1000, the target's is 2048": lambda head: edit_config(head, vocab_size=1000),
    "tensor lm_head.weight has shape [512, 64], expected [500, 64]": lambda head: edit_config(
        head, draft_vocab_size=500
    ),
    "d2t leads to tokens": lambda head: change(head, d2t=shifted),
    "t2d and d2t name different tokens": lambda head: change(head, t2d=lambda t2d: t2d.roll(1)),
    "tensor d2t is of type float32, expected whole numbers": lambda head: change(head, d2t=lambda d2t: d2t.float()),
    "fuses the rows that enter some layers, here [2, 5, 9]": lambda head: edit_config(
        head, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 4, 8]}
    ),
}


@pytest.mark.parametrize("text", WRONG)
def test_a_head_that_does_not_fit_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    head = tmp_path / "head"
    head.mkdir()
    for path in (saved / "head").iterdir():
        (head / path.name).write_bytes(path.read_bytes())
    WRONG[text](head)
    with pytest.raises(CheckpointError) as caught:
        export_bundle(ExportOptions(checkpoint=saved / "target", drafter=head, out=tmp_path / "out"))
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_target_of_too_few_layers_is_refused(saved: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "target", num_hidden_layers=6)
    with pytest.raises(CheckpointError, match=r"here \[2, 3, 3\], which a target of 6 layers does not have"):
        export_bundle(ExportOptions(checkpoint=tmp_path / "target", drafter=saved / "head", out=tmp_path / "out"))
    assert json.loads((saved / "head/config.json").read_text())["num_hidden_layers"] == 1
