"""Writes attention in the operators of ONNX so that a row has the same bits in every tree and chunk.

docs/design.md, "The same bits in every tree", tells why each operator is there. All of them are ONNX's own, but for two
of ONNX Runtime: the rotary embedding, and a product with a transposed factor and a scale.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from exporter.config import LayerShape
from exporter.onnx_file import Writer
from flowspec_edge.engine.attention_inputs import HeadGroups
from flowspec_edge.manifest import (
    ATTENTION_PADDING,
    CACHE_SLOTS,
    OLDER_BIAS,
    OLDER_MASK,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
    RECENT_BIAS,
    RECENT_SLOTS,
    ROTARY_COS,
    ROTARY_SIN,
    ROUNDS_CACHE,
    of_sliding_layers,
)

LEAST_EXPONENT = -87.0
"""exp() of less is no normal float32, and ten times slower. It takes the place of masked scores, whose weights become 0
by the mask; that of a visible score so far below the largest one changes nothing that float32 could tell.
"""


def write_attention(to: Writer, query: str, key: str, value: str, layer: int, shape: LayerShape) -> str:
    """Rotate, write keys and values to their slots, and attend.

    ``query``, ``key`` and ``value`` are [1, rows, heads * head_dim], and so is what is returned. The cache is that of
    the layer ``layer``.
    """
    present = f"{PRESENT_KEY}.{layer}", f"{PRESENT_VALUE}.{layer}"
    num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    seen = [ROTARY_COS, ROTARY_SIN, OLDER_BIAS, OLDER_MASK, RECENT_BIAS]
    cos, sin, older_bias, older_mask, recent_bias = (
        map(of_sliding_layers, seen) if layer in shape.sliding_layers else seen
    )
    if layer not in shape.unrotated_layers:
        query = to.add("RotaryEmbedding", query, POSITION_IDS, cos, sin, num_heads=num_heads)
        key = to.add("RotaryEmbedding", key, POSITION_IDS, cos, sin, num_heads=num_kv_heads)
    scales = shape.query_scales(layer)
    score_scale = float(scales[-1])
    if (scales != scales[-1]).any():  # a rope that scales what it rotates alone
        query = to.add("Mul", query, to.constant(np.tile(scales / scales[-1], num_heads)))

    def by_head(rows: str) -> str:  # [num_kv_heads, rows, head_dim]
        return to.add("Transpose", to.reshape(rows, -1, num_kv_heads, head_dim), perm=[1, 0, 2])

    with_one = to.add("Pad", by_head(_rounded(to, value)), to.constant([0, 1]), to.constant(1.0), to.constant([2]))
    to.add("ScatterND", f"{PAST_KEY}.{layer}", CACHE_SLOTS, by_head(_rounded(to, key)), outputs=present[:1])
    to.add("ScatterND", f"{PAST_VALUE}.{layer}", CACHE_SLOTS, with_one, outputs=present[1:])
    rows_axis = to.constant([1])
    padded = to.add("Pad", query, ATTENTION_PADDING, to.constant(0.0), rows_axis)
    grouped = to.add("Reshape", padded, to.sizes(to.size(OLDER_BIAS, 0), -1, num_heads * head_dim))
    body = _group_body(to, present, shape, score_scale)
    scanned = older_bias, older_mask, RECENT_SLOTS, recent_bias
    groups = to.add("Scan", grouped, *scanned, num_scan_inputs=1 + len(scanned), body=body)
    rows = to.reshape(groups, 1, -1, num_heads * head_dim)
    return to.add("Slice", rows, to.constant([0]), to.size(query, 1), rows_axis)


def _rounded(to: Writer, rows: str) -> str:
    """The rows as a cache in float16 gives them back, where the session is to have one. ONNX Runtime drops the branch
    that is not taken when it loads the graph.
    """

    def branch(name: str, *kinds: int) -> onnx.GraphProto:
        inner = to.subgraph()
        found = rows
        for kind in kinds:
            found = inner.add("Cast", found, to=kind)
        result = found if kinds else inner.add("Identity", found)
        return helper.make_graph(
            inner.nodes, name, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)]
        )

    branches = {
        "then_branch": branch("half", TensorProto.FLOAT16, TensorProto.FLOAT),
        "else_branch": branch("whole"),
    }
    return to.add("If", ROUNDS_CACHE, **branches)


def _group_body(around: Writer, caches: tuple[str, str], shape: LayerShape, score_scale: float) -> onnx.GraphProto:
    """The graph that attends for one group of rows.

    Its heads are [num_kv_heads, parts, rows, heads], where each product with the cache is of one key-value head and of
    one part of the heads that share it.
    """
    keys, values = caches
    num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    shared = HeadGroups.of(num_heads, num_kv_heads)
    parts, heads = shared.num_products // num_kv_heads, shared.num_heads
    num_slots = around.size(keys, 2)
    score_sizes = around.sizes(num_kv_heads, parts, -1, heads, num_slots)
    weight_sizes = around.sizes(num_kv_heads, parts, -1, num_slots)
    to = around.subgraph()
    query, bias, mask, recent_slots, recent_bias = (to.new_name() for _ in range(5))
    by_head = to.add("Transpose", to.reshape(query, -1, num_kv_heads, parts, heads, head_dim), perm=[1, 2, 0, 3, 4])
    flat = to.reshape(by_head, num_kv_heads, parts, -1, head_dim)
    cap = shape.score_cap or 1.0
    scores = to.add("FusedMatMul", flat, keys, transB=1, alpha=score_scale / cap)
    if shape.score_cap is not None:
        scores = to.add("Mul", to.add("Tanh", scores), to.constant(cap))
    scores = to.add("Reshape", scores, score_sizes)  # [num_kv_heads, parts, rows, heads, slots]
    columns = to.add("Unsqueeze", recent_slots, to.constant([0, 1, 3]))
    columns = to.add("Expand", columns, to.constant([num_kv_heads, parts, 1, heads, 1]))
    recent = to.add("Add", to.add("GatherElements", scores, columns, axis=4), recent_bias)
    older_weights, recent_weights = _weigh(to, to.add("Add", scores, bias), mask, recent)
    older_sums = to.add("MatMul", to.add("Reshape", older_weights, weight_sizes), values)
    older_sums = to.reshape(older_sums, num_kv_heads, parts, -1, heads, head_dim + 1)
    recent_sums = to.add("MatMul", recent_weights, to.add("Gather", values, recent_slots, axis=2))
    sums = to.add("Transpose", to.add("Add", older_sums, recent_sums), perm=[2, 0, 1, 3, 4])
    weighted, total = to.new_name(), to.new_name()
    to.add("Split", sums, to.constant([head_dim, 1]), outputs=(weighted, total), axis=4)
    attended = to.reshape(to.add("Div", weighted, total), -1, num_heads * head_dim)
    return _as_graph(to, attended, num_heads * head_dim, (query, bias, mask, recent_slots, recent_bias))


def _as_graph(to: Writer, attended: str, width: int, inputs: tuple[str, ...]) -> onnx.GraphProto:
    query, bias, mask, recent_slots, recent_bias = inputs
    sizes: dict[str, list[str | int | None]] = {
        query: ["group_rows", width],
        bias: [1, 1, "group_rows", 1, "slots"],
        mask: [1, 1, "group_rows", 1, "slots"],
        recent_slots: ["group_rows", "recent"],
        recent_bias: [1, 1, "group_rows", 1, "recent"],
    }
    kinds = {recent_slots: TensorProto.INT64}
    return helper.make_graph(
        to.nodes,
        "group",
        [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), size) for name, size in sizes.items()],
        [helper.make_tensor_value_info(attended, TensorProto.FLOAT, sizes[query])],
        to.constants,
    )


def _weigh(to: Writer, older: str, mask: str, recent: str) -> tuple[str, str]:
    """The weights of older and recent ancestors from their scores: exponents below the largest score of both."""
    last = to.constant([4])
    largest = to.add(
        "Max",
        to.add("ReduceMax", older, last, keepdims=1),
        to.add("ReduceMax", recent, last, keepdims=1),
    )
    exponents = to.add("Max", to.add("Sub", older, largest), to.constant(LEAST_EXPONENT))
    return to.add("Mul", to.add("Exp", exponents), mask), to.add("Exp", to.add("Sub", recent, largest))
