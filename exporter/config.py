"""What a Hugging Face ``config.json`` says of one decoder layer, for each family of models.

A feature that the exported graphs do not compute is refused with an error that names it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

HEAD_DIM_MULTIPLE = 16
"""GroupQueryAttention refuses other head sizes (onnxruntime 1.32, CPU)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How an architecture differs from plain Llama, and transformers' defaults for fields that a config leaves out."""

    max_context: int
    # True: q, k and v have biases and o has none. False: the config's attention_bias says it for all four.
    qkv_bias: bool = False
    qk_norm: bool = False
    num_kv_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / attention heads
    # The config's field that turns a sliding window on; "" where giving its size turns it on; None: never a window.
    slides: str | None = None


FAMILIES = {
    "LlamaForCausalLM": Family(max_context=2048),
    "MistralForCausalLM": Family(max_context=131072, num_kv_heads=8, slides=""),
    "Qwen2ForCausalLM": Family(max_context=32768, num_kv_heads=32, qkv_bias=True, slides="use_sliding_window"),
    "Qwen3ForCausalLM": Family(
        max_context=32768, num_kv_heads=32, head_dim=128, qk_norm=True, slides="use_sliding_window"
    ),
}
"""Llama 1, 2 and 3, TinyLlama, SmolLM 1 and 2, and Vicuna are all LlamaForCausalLM."""

_DEFAULT_WINDOW = 4096
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_ROPE_THETA = 10000.0


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Everything that shapes one decoder layer and its rotary tables.

    ``rope_frequencies`` are radians per position of each pair of a head's values, [head_dim / 2]. ``attention_inputs``
    is how many rows of ``hidden_size`` the attention reads side by side: two in EAGLE-3, one elsewhere.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...]
    max_context: int
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_inputs: int = 1

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors by their name below ``layers.N.``."""
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (self.hidden_size,)}
        for name, num_out, num_in, has_bias in self.matrices():
            shapes[f"{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{name}.bias"] = (num_out,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["post_attention_layernorm.weight"] = (self.hidden_size,)
        return shapes

    def matrices(self) -> Iterator[tuple[str, int, int, bool]]:
        """Name, output size, input size and whether it has a bias, of each projection."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        num_in = hidden * self.attention_inputs
        yield "self_attn.q_proj", q_size, num_in, self.qkv_bias
        yield "self_attn.k_proj", kv_size, num_in, self.qkv_bias
        yield "self_attn.v_proj", kv_size, num_in, self.qkv_bias
        yield "self_attn.o_proj", hidden, q_size, self.output_bias
        yield "mlp.gate_proj", inner, hidden, self.mlp_bias
        yield "mlp.up_proj", inner, hidden, self.mlp_bias
        yield "mlp.down_proj", hidden, inner, self.mlp_bias


def geometry_of(shape: LayerShape, num_layers: int, vocab_size: int) -> Geometry:
    """The shapes of a whole model whose layers are all of one shape."""
    return Geometry(
        num_layers=num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=vocab_size,
        max_context=shape.max_context,
        rms_norm_eps=shape.rms_norm_eps,
        rope_frequencies=list(shape.rope_frequencies),
    )


def check_architecture(path: Path, config: dict[str, Any]) -> str:
    """The one architecture that a config names. Raises CheckpointError where it is not among :data:`FAMILIES`."""
    architectures = config.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        found = ", ".join(map(str, architectures)) or "none"
        raise CheckpointError(f"{path}: architecture {found} is not supported; supported: {', '.join(FAMILIES)}")
    return str(architectures[0])


def read_layer_shape(path: Path, config: dict[str, Any], family: Family, max_context: int | None = None) -> LayerShape:
    """The layer fields of a ``config.json``.

    Args:
        max_context: lower the model's own limit.

    Raises:
        CheckpointError: a field is missing, not a number of the kind expected, or asks for what no graph computes.
    """
    _refuse_unsupported(path, config)
    hidden_size = positive_int(path, config, "hidden_size")
    num_heads = positive_int(path, config, "num_attention_heads")
    num_kv_heads = positive_int(path, config, "num_key_value_heads", family.num_kv_heads or num_heads)
    head_dim = positive_int(path, config, "head_dim", family.head_dim or hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(
            f"{path}: num_attention_heads {num_heads} is not a multiple of {num_kv_heads} key-value heads"
        )
    if head_dim % HEAD_DIM_MULTIPLE:
        raise CheckpointError(
            f"{path}: head_dim {head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}; the attention operator of ONNX "
            "Runtime takes no other, so this model cannot be exported"
        )
    bias = bool(config.get("attention_bias", False))
    return LayerShape(
        hidden_size=hidden_size,
        intermediate_size=positive_int(path, config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=positive_number(path, config, "rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
        rope_frequencies=read_rope(path, config, head_dim),
        max_context=_read_context(path, config, family, max_context),
        qkv_bias=family.qkv_bias or bias,
        output_bias=bias and not family.qkv_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
    )


def read_rope(path: Path, config: dict[str, Any], head_dim: int) -> tuple[float, ...]:
    """Frequencies of the rotary embedding in radians per position, [head_dim / 2], in float32 as transformers computes
    them.

    Sources: Su et al., "RoFormer"; linear scaling, Chen et al., arXiv 2306.15595; llama3, Llama 3.1's model code.

    Raises:
        CheckpointError: a rope type that is not known, or one that lacks a parameter.
    """
    rope = _rope_fields(path, config)
    theta = positive_number(path, {**config, **rope}, "rope_theta", _DEFAULT_ROPE_THETA)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
    kind = _rope_kind(rope)
    if kind == "linear":
        frequencies = frequencies / np.float32(positive_number(path, rope, "factor"))
    elif kind == "llama3":
        frequencies = _scale_llama3(path, rope, frequencies)
    elif kind != "default":
        raise CheckpointError(f"{path}: rope type {kind!r} is not supported; supported: default, linear, llama3")
    return tuple(frequencies.tolist())


def _scale_llama3(path: Path, rope: dict[str, Any], frequencies: np.ndarray) -> np.ndarray:
    """Divide slow waves by ``factor``, leave fast ones, and blend those in between by their wavelength."""
    factor, low, high = (
        positive_number(path, rope, field) for field in ("factor", "low_freq_factor", "high_freq_factor")
    )
    trained = positive_int(path, rope, "original_max_position_embeddings")
    if high <= low:
        raise CheckpointError(f"{path}: high_freq_factor {high} is not above low_freq_factor {low}")
    wavelengths = np.float32(2 * math.pi) / frequencies
    share = np.clip((np.float32(trained) / wavelengths - np.float32(low)) / np.float32(high - low), 0, 1)
    blended = (1 - share) * frequencies / np.float32(factor) + share * frequencies
    return np.where(share >= 1, frequencies, blended)


def _rope_fields(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The rope dictionary: ``rope_scaling``, or ``rope_parameters`` as transformers 5 writes it."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_scaling is {rope!r}, expected an object")
    return rope


def _rope_kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type")) or "default"


def _read_context(path: Path, config: dict[str, Any], family: Family, max_context: int | None) -> int:
    own = positive_int(path, config, "max_position_embeddings", family.max_context)
    if _rope_kind(_rope_fields(path, config)) == "linear":
        # Vicuna 16k keeps its stretched context in a field of its own.
        own = max(own, positive_int(path, config, "max_sequence_length", own))
    if max_context is not None and not 1 <= max_context <= own:
        raise CheckpointError(f"{path}: --max-context {max_context} is outside 1 to {own}, the model's own limit")
    context = max_context or own
    window = _read_window(path, config, family)
    if window is not None and context > window:
        raise CheckpointError(
            f"{path}: sliding_window {window} is below the context of {context} tokens, and attention within a window "
            f"is not supported; pass --max-context {window} or less, where both are the same"
        )
    return context


def _read_window(path: Path, config: dict[str, Any], family: Family) -> int | None:
    """How many tokens a row may look back, or None where it sees them all."""
    if family.slides is None or (family.slides and not config.get(family.slides)):
        return None
    if "sliding_window" in config and config["sliding_window"] is None:
        return None
    return positive_int(path, config, "sliding_window", _DEFAULT_WINDOW)


def _refuse_unsupported(path: Path, config: dict[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; supported: silu")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{path}: partial_rotary_factor {config['partial_rotary_factor']!r} is not supported")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{path}: the checkpoint is already quantised (quantization_config); export the original weights "
            "with --precision int8 instead"
        )


def positive_int(path: Path, config: dict[str, Any], field: str, default: int | None = None) -> int:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{path}: {field} is {value!r}, expected a positive integer")
    return value


def positive_number(path: Path, config: dict[str, Any], field: str, default: float | None = None) -> float:
    value = default if config.get(field) is None else config[field]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {field} is {value!r}, expected a positive number")
    return float(value)
