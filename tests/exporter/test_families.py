"""What each family of models computes is what transformers computes, in a chain, in a tree and for one row."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting needs torch: pip install '.[export]'")

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.smollm3 import SmolLM3Config

from exporter.bundle import ExportOptions, export_bundle
from exporter.matrices import Matrix
from exporter.model import load_checkpoint
from exporter.training.cached import CachedLayers
from exporter.training.files import read_target
from exporter.training.network import Target
from flowspec_edge.core.rows import Row
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import load_manifest
from tests.arm import row_bits
from tests.bundles import MadeOnce
from tests.engine.conftest import Session, make_chain
from tests.exporter.checkpoints import LLAMA3_ROPE, save_checkpoint

pytestmark = pytest.mark.slow

NUM_LAYERS = 4
NUM_CHAIN, CONTEXT = 100, 160
PARENTS = [-1, -1, 0, 0, 1, 3]
"""Of a small tree behind the chain, counted from its first row; -1 is the chain's last."""
SLIDING, FULL = "sliding_attention", "full_attention"
LISTS = {"short_factor": [1.0 + i / 16 for i in range(12)], "long_factor": [2.0 + i for i in range(12)]}


class Model(NamedTuple):
    """A family's config, what differs from the small shape of all of them, and the context of the export."""

    config: type[Any]
    changes: dict[str, Any]
    max_context: int | None = None


PHI_4: dict[str, Any] = {
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.75},
    **{"rope_scaling": {"type": "longrope", **LISTS}, "original_max_position_embeddings": 64},
}
GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
FAMILIES: dict[str, Model] = {
    "Gemma 2": Model(
        Gemma2Config,
        {**GEMMA, "sliding_window": 40, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5},
    ),
    "Gemma 3": Model(
        Gemma3TextConfig,
        {
            **{**GEMMA, "sliding_window": 12, "sliding_window_pattern": 3, "rope_local_base_freq": 100.0},
            **{"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        },
    ),
    "Phi-3 mini": Model(Phi3Config, {"sliding_window": 47}),
    "Phi-4 mini, short": Model(Phi3Config, PHI_4, 64),
    "Phi-4 mini, long": Model(Phi3Config, PHI_4),
    "Mistral 7B": Model(MistralConfig, {"sliding_window": 20}),
    "Ministral 8B": Model(
        MinistralConfig, {"head_dim": 32, "sliding_window": 40, "layer_types": [FULL, SLIDING, SLIDING, SLIDING]}
    ),
    "Qwen2 with windows": Model(
        Qwen2Config, {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 2}
    ),
    "Qwen3 with yarn": Model(Qwen3Config, {"head_dim": 32, "rope_scaling": YARN}),
    "Llama with dynamic scaling": Model(LlamaConfig, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "Llama 3.1": Model(LlamaConfig, {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
    "SmolLM3": Model(SmolLM3Config, {"tie_word_embeddings": True}),
    "SmolLM3 with windows": Model(SmolLM3Config, {"use_sliding_window": True, "sliding_window": 40}),
    "Granite": Model(
        GraniteConfig,
        {
            **{"embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22},
            "logits_scaling": 8.0,
        },
    ),
    "OLMo 2": Model(Olmo2Config, {}),
}
"""Sizes are small, and windows and trained contexts shorter than the text; all else is as published."""


@pytest.fixture
def exported(made_once: MadeOnce) -> Callable[[str], Path]:
    """The directory of a family's checkpoint and bundle."""

    def exported(family: str) -> Path:
        def make(root: Path) -> None:
            config, changes, max_context = FAMILIES[family]
            sizes = {"num_hidden_layers": NUM_LAYERS, "max_position_embeddings": CONTEXT, "pad_token_id": 0}
            save_checkpoint(root / "target", config, **{**sizes, **changes})
            options = ExportOptions(
                checkpoint=root / "target",
                drafter=None,
                out=root / "out",
                precision="fp32",
                block_size=2,
                max_context=max_context,
            )
            export_bundle(options)

        return made_once(f"family {family}", make)

    return exported


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_transformers(family: str, exported: Callable[[str], Path]) -> None:
    """Of a chain in chunks, of a tree behind it, and of one row of it by itself."""
    root = exported(family)
    model = AutoModelForCausalLM.from_pretrained(root / "target", attn_implementation="eager").eval()
    manifest = load_manifest(root / "out")
    num_chain = min(NUM_CHAIN, manifest.geometry.max_context - 8)
    tokens = np.random.default_rng(0).integers(2, 2048, num_chain + len(PARENTS)).tolist()
    tree = [Row(num_chain + i, num_chain + parent, tokens[num_chain + i]) for i, parent in enumerate(PARENTS)]
    expected = [*_logits(model, tokens[:num_chain])]
    for place in range(len(tree)):
        path = [tokens[num_chain + above] for above in _path(place)]
        expected.append(_logits(model, tokens[:num_chain] + path)[-1])
    stages = [StageRunner(root / "out", manifest, *layers) for layers in ((0, 2), (2, NUM_LAYERS))]
    session, head, chain = Session(*stages), Head(root / "out", manifest), make_chain(tokens[:num_chain])
    chunks = chain[:37], chain[37:], tree[:5], tree[5:]
    found = np.concatenate([head.logits(session.run(rows)) for rows in chunks])
    tolerance = 2e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found, np.stack(expected), atol=tolerance)
    checkpoint = load_checkpoint(root / "target", FAMILIES[family].max_context)
    for rows in _trainers_logits(read_target(checkpoint), tokens[:num_chain]):
        np.testing.assert_allclose(rows, expected[:num_chain], atol=tolerance)


def _trainers_logits(target: Target, tokens: list[int]) -> Iterator[np.ndarray]:
    """What heads are trained on: of a whole text, and of one that is written in two pieces."""
    cached, seen = CachedLayers(target), torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    with torch.no_grad():
        yield target.logits(target.features(torch.tensor([tokens])))[0].numpy()
        pieces = [
            cached.run(
                target.embed(torch.tensor([tokens[part]])), torch.arange(len(tokens))[part], seen[part, : part.stop]
            )
            for part in (slice(0, 37), slice(37, len(tokens)))
        ]
        yield target.logits(target.norm(torch.cat(pieces, dim=1)))[0].numpy()


def test_the_text_model_of_one_that_sees_images_is_read(exported: Callable[[str], Path], tmp_path: Path) -> None:
    """The first one is in ``text_config``, and its tensors lie beside those of the other part."""
    text = exported("Gemma 3") / "target"
    config = Gemma3TextConfig.from_pretrained(text)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    whole = Gemma3Config(text_config=config.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(whole)
    model.language_model.load_state_dict(AutoModelForCausalLM.from_pretrained(text).model.state_dict())
    model.save_pretrained(tmp_path / "target")
    shutil.copy(text / "tokenizer.json", tmp_path / "target")
    expected, found = load_checkpoint(text), load_checkpoint(tmp_path / "target")
    assert (found.architecture, found.layer_shape) == (expected.architecture, expected.layer_shape)
    assert found.is_tied and found.bos_token_id == expected.bos_token_id
    np.testing.assert_array_equal(next(found.embedding()), next(expected.embedding()))
    one, other = (checkpoint.layers(3, 4) for checkpoint in (found, expected))
    for name, weight in one.items():
        np.testing.assert_array_equal(_as_array(weight), _as_array(other[name]))


def _as_array(weight: Matrix | np.ndarray) -> np.ndarray:
    return weight if isinstance(weight, np.ndarray) else weight.unpacked()


def _path(place: int) -> Sequence[int]:
    path = list(itertools.takewhile(lambda above: above >= 0, _above(place)))
    return path[::-1]


def _above(place: int) -> Any:
    while True:
        yield place
        if place < 0:
            return
        place = PARENTS[place]


def _logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_same_bits_in_every_tree(family: str, exported: Callable[[str], Path]) -> None:
    root = exported(family)
    manifest = load_manifest(root / "out")
    stage = StageRunner(root / "out", manifest, 0, NUM_LAYERS)
    compared, differing = row_bits.compare(stage, manifest.geometry.vocab_size, seed=10, num_prompt=150, num_chunks=3)
    assert compared > 190 and not differing
