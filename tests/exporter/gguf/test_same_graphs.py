"""A checkpoint and the GGUF file of the same model become the same graphs, byte for byte."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch", reason="exporting checkpoints needs torch: pip install '.[export]'")

import torch
from safetensors.torch import load_file
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.smollm3 import SmolLM3Config

from exporter.bundle import ExportOptions, export_bundle
from exporter.gguf.config import LONGROPE_FACTORS
from exporter.gguf.model import open_gguf
from exporter.model import load_checkpoint
from exporter.target_digest import target_digest
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.tokenizer import Tokenizer
from tests.engine.conftest import Session, make_chain
from tests.exporter.checkpoints import LLAMA3_ROPE, save_checkpoint
from tests.exporter.gguf.conftest import write_gguf
from tests.exporter.gguf.models import fields, tensors_of
from tests.llama_cpp import llama_cpp_texts

pytestmark = pytest.mark.slow

PROMPT = "The quick brown fox jumps over the lazy dog, and then it does so again."
KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
IN_PAIRS = ("llama", "granite", "smollm3")
GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 12, "pad_token_id": 0}
DIVISORS = {"short_factor": [1.0 + i / 16 for i in range(12)], "long_factor": [2.0 + i for i in range(12)]}
GRANITE = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


class Model(NamedTuple):
    """A checkpoint's config, and what the metadata of its GGUF file have beside what all have."""

    architecture: str
    config: type[Any]
    changes: dict[str, Any]
    fields: Mapping[str, Any] = MappingProxyType({})


FAMILIES = {
    "Llama": Model("llama", LlamaConfig, {}),
    "Llama 3.1": Model("llama", LlamaConfig, {"rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Llama with biases": Model("llama", LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "Mistral": Model("llama", MistralConfig, {"sliding_window": None, "head_dim": 32}),
    "Qwen2": Model("qwen2", Qwen2Config, {}),
    "Qwen3": Model("qwen3", Qwen3Config, {"head_dim": 48}),
    "Qwen3 with yarn": Model(
        "qwen3",
        Qwen3Config,
        {
            **{"head_dim": 32, "max_position_embeddings": 160},
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40},
        },
        {
            **{"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            "rope.scaling.original_context_length": 40,
        },
    ),
    "Gemma 2": Model(
        "gemma2",
        Gemma2Config,
        {**GEMMA, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5, "tie_word_embeddings": True},
        {"attention.sliding_window": 12, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5},
    ),
    "Gemma 3": Model(
        "gemma3",
        Gemma3TextConfig,
        {
            **{**GEMMA, "num_hidden_layers": 6, "rope_theta": 1e6, "tie_word_embeddings": True},
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            **{"attention.sliding_window": 12, "rope.freq_base": 1e6},
            **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        },
    ),
    "Phi-4": Model("phi3", Phi3Config, {"pad_token_id": 0}, {"attention.sliding_window": 0}),
    "Phi-4 mini": Model(
        "phi3",
        Phi3Config,
        {
            **{"pad_token_id": 0, "num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.75},
            **{"rope_scaling": {"type": "longrope", **DIVISORS}, "original_max_position_embeddings": 64},
        },
        {
            **{"rope.dimension_count": 24, "rope.scaling.original_context_length": 64},
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(96 / 64) / math.log(64)),
        },
    ),
    "Granite": Model(
        "granite",
        GraniteConfig,
        {name: 0.25 * place for place, name in enumerate(GRANITE, 2)},
        {name: 0.25 * place for place, name in enumerate(GRANITE.values(), 2)},
    ),
    "OLMo 2": Model("olmo2", Olmo2Config, {}),
    "SmolLM3": Model(
        "smollm3", SmolLM3Config, {"num_hidden_layers": 4, "tie_word_embeddings": True, "pad_token_id": 0}
    ),
}


def converted(family: str, root: Path, kind: str = "F32", *, has_spare_rows: bool = True) -> Path:
    """A checkpoint at ``root / "target"``, and the GGUF file that llama.cpp's converter makes of it.

    The embedding may have rows that stand for no token of the file's tokenizer, which llama.cpp does not load.
    """
    architecture, config_class, changes, values = FAMILIES[family]
    save_checkpoint(root / "target", config_class, **{"num_hidden_layers": 2, **changes}, dtype=KINDS[kind])
    checkpoint = load_checkpoint(root / "target")
    shape = checkpoint.layer_shape
    weights = {name: weight.float().numpy() for name, weight in load_file(root / "target/model.safetensors").items()}
    tensors = tensors_of(weights, kind, shape, in_pairs=architecture in IN_PAIRS)
    scaling = changes.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":  # the converter stores what frequencies are divided by
        plain = 10000.0 ** -(torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        tensors["rope_freqs.weight"] = "F32", (plain / torch.tensor(shape.rope_frequencies)).numpy()
    for name, tensor in LONGROPE_FACTORS.items() if "long_factor" in scaling else ():
        tensors[tensor] = "F32", np.array(scaling[name], "<f4")
    own = {f"{architecture}.{key}": value for key, value in values.items()}
    metadata = {**fields(shape, checkpoint.num_layers, architecture), **own}
    for tensor in ("token_embd.weight", "output.weight") if not has_spare_rows else ():
        if tensor in tensors:
            tensors[tensor] = tensors[tensor][0], tensors[tensor][1][: len(metadata["tokenizer.ggml.tokens"])]
    return write_gguf(root / "model.gguf", metadata, tensors, architecture)


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "F32") for family in FAMILIES), ("Llama", "F16"), ("Qwen2", "BF16")]
)
def test_a_gguf_file_gives_the_graphs_of_its_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    path = converted(family, tmp_path, kind)
    options: dict[str, Any] = {"drafter": None, "block_size": 2 if family == "Qwen3" else 1}
    expected = export_bundle(
        ExportOptions(checkpoint=tmp_path / "target", out=tmp_path / "expected", precision="fp32", **options)
    )
    found = export_bundle(ExportOptions(checkpoint=path, out=tmp_path / "found", **options))
    for one, other in zip(found.files(), expected.files(), strict=True):
        if one.file != "tokenizer.json":
            assert one == other
    ours, theirs = found.geometry, expected.geometry
    assert ours.rope_frequencies == pytest.approx(theirs.rope_frequencies, rel=1e-6)
    assert ours.sliding_rope_frequencies == pytest.approx(theirs.sliding_rope_frequencies, rel=1e-6)
    assert (ours.num_layers, ours.max_context, ours.vocab_size) == (
        theirs.num_layers,
        theirs.max_context,
        theirs.vocab_size,
    )
    assert (ours.window, ours.head_dim) == (theirs.window, theirs.head_dim)
    assert (found.architecture == expected.architecture) == (family != "Mistral"), "whose files say llama"
    assert target_digest(open_gguf(path)) == target_digest(load_checkpoint(tmp_path / "target")), "a head fits both"


@pytest.mark.parametrize(
    "family", ["Qwen3 with yarn", "Gemma 2", "Gemma 3", "Phi-4 mini", "Granite", "OLMo 2", "SmolLM3"]
)
def test_llama_cpp_writes_the_same_text_of_it(family: str, tmp_path: Path) -> None:
    """So files are read as they are meant, whatever this project's own converter of them would do."""
    path = converted(family, tmp_path, has_spare_rows=False)
    (expected,) = llama_cpp_texts(path, [PROMPT], 24)
    manifest = export_bundle(ExportOptions(checkpoint=path, drafter=None, out=tmp_path / "out"))
    stage = StageRunner(tmp_path / "out", manifest, 0, manifest.geometry.num_layers)
    session, head = Session(stage), Head(tmp_path / "out", manifest)
    tokens = Tokenizer(tmp_path / "out" / manifest.tokenizer.file).encode(PROMPT)
    num_prompt, rows = len(tokens), make_chain(tokens)
    while len(tokens) < num_prompt + len(expected):
        tokens.append(int(head.logits(session.run(rows)[-1:]).argmax()))
        rows = make_chain(tokens[-1:], len(tokens) - 1)
    assert tokens[num_prompt:] == expected
