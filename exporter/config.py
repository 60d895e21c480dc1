"""What a Hugging Face ``config.json`` says of the layers of a model, whatever its family.

A feature that the exported graphs do not compute is refused with an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporter.families import ACTIVATIONS, BEFORE, FUSED, Config, Family, Norms, has_window
from exporter.fields import positive_int, positive_number
from exporter.rope import FULL, SLIDING, RopeFields, read_rope_fields
from flowspec_edge.errors import CheckpointError
from flowspec_edge.manifest import Geometry

HEAD_DIM_MULTIPLE = 16
"""GroupQueryAttention, which drafters use, refuses other head sizes (onnxruntime 1.32, CPU)."""


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Everything that shapes the decoder layers of a model, its rotary tables, and what is around them.

    Attributes:
        rope_frequencies: radians per position of each pair of a head's values, [head_dim / 2]. Pairs that are not
            rotated come last, and have 0.
        rope_scale: what rotated values of queries and keys are multiplied by.
        attention_inputs: rows of ``hidden_size`` that the attention reads side by side: two in EAGLE-3, one elsewhere.
        qk_norm: whether queries and keys are normed: each head by itself, or the whole projection.
        score_scale: what scores are multiplied by; None: the root of ``head_dim``, inverted.
        score_cap, logit_cap: what scores and logits stay below, as ``cap * tanh(x / cap)``.
        window: how many rows those of ``sliding_layers`` see, their own included; None where there are none.
        sliding_rope_frequencies: those of ``sliding_layers``, where they have others.
        unrotated_layers: the layers without a rotary embedding.
        norm_offset: what is added to the weights of norms as a checkpoint has them.
        is_fused: whether a checkpoint stores matrices as FUSED.
        remarks: what an export should tell of it.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_frequencies: tuple[float, ...]
    max_context: int
    rope_scale: float = 1.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "projection"] = "none"
    attention_inputs: int = 1
    norms: Norms = BEFORE
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    score_scale: float | None = None
    score_cap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_cap: float | None = None
    window: int | None = None
    sliding_layers: frozenset[int] = frozenset()
    sliding_rope_frequencies: tuple[float, ...] = ()
    unrotated_layers: frozenset[int] = frozenset()
    is_fused: bool = False
    remarks: tuple[str, ...] = ()

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors by their name below ``layers.N.``."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (self.hidden_size,) for name in self.norms.names}
        for name, num_out, num_in, has_bias in self.matrices():
            shapes[f"{name}.weight"] = (num_out, num_in)
            if has_bias:
                shapes[f"{name}.bias"] = (num_out,)
        if self.qk_norm != "none":
            heads = {"q": self.num_heads, "k": self.num_kv_heads} if self.qk_norm == "projection" else {"q": 1, "k": 1}
            shapes |= {f"self_attn.{name}_norm.weight": (num * self.head_dim,) for name, num in heads.items()}
        return shapes

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors as a checkpoint stores them."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (num_out, *num_in) in self.tensor_shapes().items():
            stored = self.stored_part(name)[0]
            others = shapes.get(stored, (0,))[0] if stored != name else 0
            shapes[stored] = (others + num_out, *num_in)
        return shapes

    def stored_part(self, name: str) -> tuple[str, np.ndarray | None]:
        """The stored tensor that a layer's tensor is in, and which of its rows it is; None: all of them, in order."""
        module, _, kind = name.rpartition(".")
        shapes = self.tensor_shapes()
        rows = np.arange(shapes[name][0])
        num_heads = {"self_attn.q_proj": self.num_heads, "self_attn.k_proj": self.num_kv_heads}.get(module)
        is_moved = num_heads is not None and self.num_rotated < self.head_dim
        if num_heads is not None and is_moved:
            rows = self._in_halves(num_heads)
        for fused, parts in FUSED.items() if self.is_fused else ():
            if module in parts:
                before = parts[: parts.index(module)]
                return f"{fused}.{kind}", rows + sum(shapes[f"{part}.{kind}"][0] for part in before)
        return name, rows if is_moved else None

    @property
    def ropes(self) -> list[tuple[float, ...]]:
        """The frequencies of layers that see all rows, and of those with a window where there are any."""
        if self.window is None:
            return [self.rope_frequencies]
        return [self.rope_frequencies, self.sliding_rope_frequencies or self.rope_frequencies]

    @property
    def num_rotated(self) -> int:
        """How many values of a head are rotated."""
        return 2 * sum(frequency > 0 for frequency in self.rope_frequencies)

    def query_scales(self, layer: int) -> np.ndarray:
        """What the values of a head's query are multiplied by on their way to scores, that of keys included: float32
        [head_dim].
        """
        base = self.head_dim**-0.5 if self.score_scale is None else self.score_scale
        is_rotated = np.array(self.rope_frequencies * 2) > 0
        scale = 1.0 if layer in self.unrotated_layers else self.rope_scale**2
        scales: np.ndarray = np.where(is_rotated, base * scale, base).astype(np.float32)
        return scales

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

    def _in_halves(self, num_heads: int) -> np.ndarray:
        """Which row of a checkpoint each row of queries or keys is, where a part of each head is rotated.

        There the two halves of that part come first; here the first half of a head is rotated with the second one, so
        each gets half of what is not rotated behind it. Scores, sums over a head, are the same in either order.
        """
        first, second = np.split(np.arange(self.num_rotated), 2)
        rest = np.split(np.arange(self.num_rotated, self.head_dim), 2)
        head = np.concatenate([first, rest[0], second, rest[1]])
        rows: np.ndarray = np.arange(num_heads)[:, None] * self.head_dim + head
        return rows.reshape(-1)


def geometry_of(shape: LayerShape, num_layers: int, vocab_size: int) -> Geometry:
    """The shapes of a whole model."""
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
        window=shape.window,
        sliding_rope_frequencies=list(shape.sliding_rope_frequencies),
    )


def read_layer_shape(path: Path, config: Config, family: Family, max_context: int | None = None) -> LayerShape:
    """The layer fields of a ``config.json``.

    Args:
        max_context: lower the model's own limit.

    Raises:
        CheckpointError: a field is missing, not a number of the kind expected, or asks for what no graph computes.
    """
    config = {**family.defaults, **config}
    hidden_size = positive_int(path, config, "hidden_size")
    heads = _read_heads(path, config, hidden_size)
    activation = str(config.get(family.activation))
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: {family.activation} {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    ropes = read_rope_fields(path, config, positive_int(path, config, "max_position_embeddings"))
    context = _read_context(path, config, ropes[FULL], max_context)
    bias = bool(config.get("attention_bias", False))
    return LayerShape(
        hidden_size=hidden_size,
        intermediate_size=positive_int(path, config, "intermediate_size"),
        rms_norm_eps=positive_number(path, config, "rms_norm_eps"),
        max_context=context,
        qkv_bias=family.qkv_bias or bias,
        output_bias=bias and not family.qkv_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        norms=family.norms,
        norm_offset=family.norm_offset,
        activation=ACTIVATIONS[activation],
        is_fused=family.is_fused,
        remarks=tuple(ropes[FULL].remarks(context)),
        **heads,
        **_read_scales(path, config, family, hidden_size),
        **_read_layers(path, config, family, ropes, heads["head_dim"], context),
    )


def _read_heads(path: Path, config: Config, hidden_size: int) -> dict[str, Any]:
    num_heads = positive_int(path, config, "num_attention_heads")
    num_kv_heads = positive_int(path, config, "num_key_value_heads", num_heads)
    head_dim = positive_int(path, config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise CheckpointError(f"{path}: {num_heads} attention heads do not share {num_kv_heads} key-value heads evenly")
    if head_dim % HEAD_DIM_MULTIPLE:
        raise CheckpointError(
            f"{path}: head_dim {head_dim} is not a multiple of {HEAD_DIM_MULTIPLE}; the attention operator of ONNX "
            "Runtime takes no other, so this model cannot be exported"
        )
    return {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}


def _read_scales(path: Path, config: Config, family: Family, hidden_size: int) -> dict[str, Any]:
    """What Gemma and Granite multiply and cap."""

    def number(field: str, default: float | None = None) -> float | None:
        if field not in family.reads | family.defaults.keys() or (config.get(field) is None and default is None):
            return default
        return positive_number(path, config, field, default)

    query = number("query_pre_attn_scalar")
    return {
        "score_scale": number("attention_multiplier") if query is None else query**-0.5,
        "score_cap": number("attn_logit_softcapping"),
        "logit_cap": number("final_logit_softcapping"),
        "embedding_scale": number("embedding_multiplier", hidden_size**0.5 if family.scales_embedding else 1.0),
        "residual_scale": number("residual_multiplier", 1.0),
        "logit_divisor": number("logits_scaling", 1.0),
    }


def _read_layers(
    path: Path, config: Config, family: Family, ropes: Mapping[str, RopeFields], head_dim: int, context: int
) -> dict[str, Any]:
    """Which layers have a window, and which are rotated and how."""
    layers = range(positive_int(path, config, "num_hidden_layers"))
    _check_list(path, config, "no_rope_layers", len(layers))
    sliding = frozenset(layer for layer in layers if has_window(path, config, family, layer))
    window = positive_int(path, config, "sliding_window", context) if sliding else context
    full, local = (_read_rope(path, ropes[kind], head_dim, context) for kind in (FULL, SLIDING))
    if local == full and window >= context:  # no layer differs from another
        sliding = frozenset()
    if sliding and local["rope_scale"] != full["rope_scale"]:
        raise CheckpointError(f"{path}: rope types that scale attention for some layers alone are not supported")
    return {
        **full,
        "sliding_layers": sliding,
        "window": window if sliding else None,
        "sliding_rope_frequencies": local["rope_frequencies"] if sliding and local != full else (),
        "unrotated_layers": frozenset(layer for layer in layers if not family.rotates(config, layer)),
    }


def _read_rope(path: Path, fields: RopeFields, head_dim: int, context: int) -> dict[str, Any]:
    share = positive_number(path, fields.values, "partial_rotary_factor", 1.0)
    num_rotated = int(head_dim * share)
    if share > 1 or num_rotated % 2 or num_rotated < 2:
        raise CheckpointError(f"{path}: partial_rotary_factor {share} of heads of {head_dim} values is not supported")
    rope = fields.rope(num_rotated, context)
    unrotated = (0.0,) * ((head_dim - num_rotated) // 2)
    return {"rope_frequencies": rope.frequencies + unrotated, "rope_scale": rope.scale}


def _check_list(path: Path, config: Config, field: str, num_layers: int) -> None:
    values = config.get(field)
    if values is not None and (not isinstance(values, list) or len(values) < num_layers):
        raise CheckpointError(f"{path}: {field} is {values!r:.80}, expected a list with one entry for each layer")


def _read_context(path: Path, config: Config, rope: RopeFields, max_context: int | None) -> int:
    own = rope.longest
    if rope.kind == "linear":
        # Vicuna 16k keeps its stretched context in a field of its own.
        own = max(own, positive_int(path, config, "max_sequence_length", own))
    if max_context is not None and not 1 <= max_context <= own:
        raise CheckpointError(f"{path}: --max-context {max_context} is outside 1 to {own}, the model's own limit")
    return max_context or own
