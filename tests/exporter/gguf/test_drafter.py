"""A draft head beside a GGUF file: exported with it where torch is there, and no token depends on it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting draft heads needs torch: pip install '.[export]'")

from safetensors.numpy import load_file, save_file

from exporter.bundle import ExportOptions, export_bundle
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import CheckpointError
from tests.exporter.checkpoints import save_eagle, save_eagle3
from tests.exporter.gguf.conftest import write_gguf
from tests.exporter.gguf.models import SHAPE, VOCAB, fields, random_tensors
from tests.exporter.gguf.test_model import BLOCKED
from tests.narrowing import present
from tests.ring.conftest import answer_of, ring_of, tokens_of

pytestmark = pytest.mark.slow

LARGER = 30

Save = Callable[..., None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "small.gguf", fields(SHAPE, 2), random_tensors(SHAPE, ["Q4_0", "Q4_1"]))


def save_eagle1(directory: Path, **changes: Any) -> None:
    save_eagle(directory, **{"hidden_size": SHAPE.hidden_size, **changes})


def save_eagle3_of_vllm(directory: Path, **changes: Any) -> None:
    """The model has a single layer behind others, so the head has a single tap."""
    taps: dict[str, Any] = {"num_taps": 1, "eagle_aux_hidden_state_layer_ids": [1]}
    save_eagle3(directory, **{"hidden_size": SHAPE.hidden_size, "of_vllm": True, **taps, **changes})


@pytest.mark.parametrize(
    ("kind", "save", "temperature"), [("eagle1", save_eagle1, 0.0), ("eagle3", save_eagle3_of_vllm, 1.0)]
)
async def test_a_ring_drafts_by_it_and_stays_lossless(
    model: Path, tmp_path: Path, kind: str, save: Save, temperature: float
) -> None:
    save(tmp_path / "head")
    manifest = export_bundle(ExportOptions(checkpoint=model, drafter=tmp_path / "head", out=tmp_path / "out"))
    assert (manifest.precision, present(manifest.drafter).kind) == ("own", kind)
    assert ("torch" in manifest.made_with) == (kind == "eagle3") and "gguf" in manifest.made_with
    weights = SHAPE.hidden_size * (2 * SHAPE.hidden_size + 3 * SHAPE.hidden_size + 3 * 96)
    assert present(manifest.drafter).num_bytes < 1.5 * weights, "8 bits"
    bundle, unsplit = Bundle.load(tmp_path / "out"), UnsplitModel(tmp_path / "out", manifest)
    prompt = np.random.default_rng(2).integers(2, VOCAB, 20).tolist()
    options = GenerateOptions(max_new_tokens=16, temperature=temperature, seed=5, schedule="flowspec")
    async with ring_of(2, bundle) as ring:
        assert tokens_of(await answer_of(ring, prompt, options)) == list(unsplit.generate(prompt, options))
        assert ring._engine.drafter is not None


HEADS: list[tuple[str, Save, dict[str, Any]]] = [
    ("the drafter's hidden_size is 128, the target's is 256", save_eagle1, {"hidden_size": 128}),
    ("the drafter's vocab_size is 1024, the target's is 2048", save_eagle1, {"vocab_size": 1024}),
    ("the drafter's hidden_size is 128, the target's is 256", save_eagle3_of_vllm, {"hidden_size": 128}),
    (
        "the drafter's vocab_size is 1024, the target's is 2048",
        save_eagle3_of_vllm,
        {"of_vllm": False, "vocab_size": 1024},
    ),
    (
        "an EAGLE-3 head fuses the rows that enter some layers, here [1, 5], which a target of 2 layers does not have",
        save_eagle3_of_vllm,
        {"num_taps": 2, "eagle_aux_hidden_state_layer_ids": [1, 5]},
    ),
]


def test_a_head_for_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    for place, (text, save, changes) in enumerate(HEADS):
        head = tmp_path / f"head-{place}"
        save(head, **changes)
        with pytest.raises(CheckpointError) as caught:
            export_bundle(ExportOptions(checkpoint=model, drafter=head, out=tmp_path / "out"))
        assert str(caught.value).startswith(f"{head}/config.json: {text}")
    assert not (tmp_path / "out").exists()


def test_without_torch_the_error_says_what_to_install(model: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    save_eagle3_of_vllm(head)
    command = [sys.executable, "-c", BLOCKED, str(model), "--drafter", str(head), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"flowspec-export: {head}: a draft head of this kind is exported by torch, but torch is not installed; run pip "
        "install 'flowspec-edge[export]', or leave --drafter out"
    )


@pytest.mark.parametrize("precision", ["w8a8", "q8", "int4"])
def test_the_token_is_not_lost_beside_a_row_that_is_many_times_as_large(tmp_path: Path, precision: str) -> None:
    """As in real models: the head's first product takes both."""
    tensors = random_tensors(SHAPE, ["Q8_0"])
    kind, norm = tensors["output_norm.weight"]
    tensors["output_norm.weight"] = kind, LARGER * norm
    model = write_gguf(tmp_path / "large.gguf", fields(SHAPE, 1), tensors)
    save_eagle1(tmp_path / "head")
    weights = load_file(path := tmp_path / "head/model.safetensors")
    weights["fc.weight"][:, SHAPE.hidden_size :] /= LARGER  # the token counts as much as the row
    save_file(weights, path)
    options = ExportOptions(
        checkpoint=model, drafter=tmp_path / "head", out=tmp_path / "out", precision=precision, max_loss=1e9
    )
    manifest = export_bundle(options)
    assert present(present(manifest.parity).drafter_error) < 0.5
