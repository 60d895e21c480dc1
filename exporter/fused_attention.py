"""Attention over a cache of fixed capacity as one operator, for draft heads.

It is the fastest, but other rows in the cache may change a row's last bits: draft heads' bits decide nothing.
"""

from __future__ import annotations

from typing import Protocol

from onnx import TensorProto, ValueInfoProto, helper

from exporter.onnx_file import Writer, floats, integers
from flowspec_edge.manifest import (
    ATTENTION_BIAS,
    ATTENTION_PADDING,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
    ROTARY_COS,
    ROTARY_SIN,
    SEQLENS_K,
    TOTAL_LENGTH,
)


class HeadSizes(Protocol):
    """Of a layer's attention."""

    @property
    def num_heads(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


def write_fused_attention(to: Writer, query: str, key: str, value: str, layer: int, shape: HeadSizes) -> str:
    """Add the attention of one layer, and return its output, [1, rows, num_heads * head_dim].

    Row ``r`` of the chunk takes slot ``total - rows + r``. It sees the slots up to its own (parents come before
    children), and the bias is added to its scores. The operator ignores position ids when there is no past, so callers
    keep ``rows < total``. The last ``padding[1]`` of the rows are zeros, added here and removed again from the result.
    """
    axis, zero = to.constant([1]), to.constant(0.0)
    padded = [to.add("Pad", rows, ATTENTION_PADDING, zero, axis) for rows in (query, key, value)]
    caches = [f"{name}.{layer}" for name in (PAST_KEY, PAST_VALUE)]
    attended = to.new_name()
    to.add(
        "GroupQueryAttention",
        *(*padded, *caches, SEQLENS_K, TOTAL_LENGTH, ROTARY_COS, ROTARY_SIN, POSITION_IDS, ATTENTION_BIAS),
        outputs=(attended, f"{PRESENT_KEY}.{layer}", f"{PRESENT_VALUE}.{layer}"),
        num_heads=shape.num_heads,
        kv_num_heads=shape.num_kv_heads,
        do_rotary=1,
    )
    return to.add("Slice", attended, to.constant([0]), to.size(query, 1), axis)


def fused_inputs(shape: HeadSizes) -> list[ValueInfoProto]:
    """The inputs of a graph with it beside its rows and caches."""
    return [
        integers(ATTENTION_PADDING, 2),
        floats(ATTENTION_BIAS, 1, 1, "attention_rows", "total"),
        integers(POSITION_IDS, 1, "attention_rows"),
        helper.make_tensor_value_info(SEQLENS_K, TensorProto.INT32, [1]),
        helper.make_tensor_value_info(TOTAL_LENGTH, TensorProto.INT32, []),
        floats(ROTARY_COS, "positions", shape.head_dim // 2),
        floats(ROTARY_SIN, "positions", shape.head_dim // 2),
    ]


def fused_caches(shape: HeadSizes, layer: int) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Keys and values of a layer, as they go in and come out."""
    size = 1, shape.num_kv_heads, "capacity", shape.head_dim
    past, present = (
        [f"{name}.{layer}" for name in pair] for pair in ((PAST_KEY, PAST_VALUE), (PRESENT_KEY, PRESENT_VALUE))
    )
    return [floats(name, *size) for name in past], [floats(name, *size) for name in present]
