"""Small models of random weights as GGUF files: of any type, and of a checkpoint as llama.cpp's converter writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from exporter.config import LayerShape
from exporter.gguf.config import gguf_name
from exporter.gguf.model import EMBEDDING, FINAL_NORM, LM_HEAD
from tests.exporter.gguf.conftest import Rows, stored_rows
from tests.exporter.gguf.vocabularies import byte_level

VOCAB = 2048
SHAPE = LayerShape(
    hidden_size=256,
    intermediate_size=512,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_frequencies=tuple(10000.0 ** -(i / 32) for i in range(32)),
    max_context=512,
)
"""Rows are of whole blocks of every type."""
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 numbers of a block are, which all of its weights are multiples of; in other types at its begin."""


def fields(shape: LayerShape, num_layers: int, architecture: str = "llama") -> dict[str, Any]:
    """The metadata of a model whose tokens are bytes and words."""
    own = {
        "block_count": num_layers,
        "context_length": shape.max_context,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.rms_norm_eps,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": shape.head_dim,
    }
    return {**{f"{architecture}.{key}": value for key, value in own.items()}, **byte_level("smollm")}


def random_rows(kind: str, num_rows: int, num_in: int, seed: int) -> np.ndarray:
    """Stored bytes of a matrix whose weights are as large as those of a trained one."""
    rows = stored_rows(kind, num_rows, num_in, seed)
    quantization = GGMLQuantizationType[kind]
    factor = 0.05 / dequantize(rows, quantization).std()
    if kind in ("F32", "F16"):
        values = rows.view({"F32": "<f4", "F16": "<f2"}[kind])
        scaled: np.ndarray = (values * factor).astype(values.dtype).view(np.uint8)
        return scaled
    if kind == "BF16":
        wide = (dequantize(rows, quantization) * factor).astype(np.float32)
        return as_bfloat16(wide)
    blocks = rows.reshape(-1, GGML_QUANT_SIZES[quantization][1])
    for start in HALVES.get(kind, (0,)):
        halves = np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2")
        blocks[:, start : start + 2] = (halves * factor).astype("<f2").view(np.uint8)
    return blocks.reshape(num_rows, -1)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """The stored bytes of float32 values, cut off."""
    stored: np.ndarray = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return stored


def random_tensors(shape: LayerShape, kinds: Sequence[str], head: str | None = "Q6_K", embedding: str = "Q8_0") -> Rows:
    """The tensors of a model, whose layers are of the types ``kinds``; without ``head`` it is the embedding's.

    A type with another one behind it, as ``Q4_K Q6_K``, has that in the values and in the last product, as in files
    whose names end in ``_K_M``.
    """
    tensors: Rows = {}

    def add(name: str, kind: str, size: tuple[int, ...]) -> None:
        seed = len(tensors)
        if len(size) == 1:
            noise = np.random.default_rng(seed).normal(1 if "norm" in name else 0, 0.05, size).astype(np.float32)
            tensors[gguf_name(name)] = "F32", noise
        else:
            tensors[gguf_name(name)] = kind, random_rows(kind, size[0], size[1], seed)

    add(EMBEDDING, embedding, (VOCAB, shape.hidden_size))
    for layer, named in enumerate(kinds):
        kind, *finer = named.split()
        for name, size in shape.tensor_shapes().items():
            is_finer = finer and ("v_proj" in name or "down_proj" in name)
            add(f"model.layers.{layer}.{name}", finer[0] if is_finer else kind, size)
    add(FINAL_NORM, "F32", (shape.hidden_size,))
    if head is not None:
        add(LM_HEAD, head, (VOCAB, shape.hidden_size))
    return tensors


def stored_in_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of queries or keys in the order in which llama.cpp's converter stores those of Llama."""
    halves = rows.reshape(num_heads, 2, len(rows) // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def tensors_of(checkpoint: Mapping[str, np.ndarray], kind: str, shape: LayerShape, *, in_pairs: bool) -> Rows:
    """The tensors of a checkpoint, float32 by name, as a GGUF file of one type has them; norms and biases in F32.

    Queries and keys are stored ``in_pairs`` in files of Llama and what is made from it.
    """
    tensors: Rows = {}
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads} if in_pairs else {}
    for name, given in checkpoint.items():
        values = given + np.float32(shape.norm_offset) if "norm" in name else given
        for module, num_heads in heads.items():
            if module in name:
                values = stored_in_pairs(values, num_heads)
        if values.ndim == 1 or kind == "F32":
            tensors[gguf_name(name, shape.norms)] = "F32", values.astype("<f4")
        elif kind == "F16":
            tensors[gguf_name(name, shape.norms)] = "F16", values.astype("<f2")
        else:
            tensors[gguf_name(name, shape.norms)] = "BF16", as_bfloat16(values)
    return tensors
