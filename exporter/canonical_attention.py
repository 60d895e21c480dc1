"""Writes attention in the operators of ONNX so that a row has the same bits in every tree and chunk.

docs/design.md, "The same bits in every tree", tells why each operator is there. All of them are ONNX's own, but for two
of ONNX Runtime: the rotary embedding, and a product with a transposed factor and a scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flowspec_edge.engine.attention_inputs import HeadGroups
from flowspec_edge.manifest import OLDER_BIAS, OLDER_MASK, RECENT_BIAS, RECENT_SLOTS, ROUNDS_CACHE

DOMAIN = "flowspec"
PLACEHOLDER = f"{DOMAIN}::CanonicalAttention"
"""The node that torch's exporter writes; ONNX Runtime does not know it."""
RUNTIME_DOMAIN = "com.microsoft"
RUNTIME_OPERATORS = ("RotaryEmbedding", "FusedMatMul")
LEAST_EXPONENT = -87.0
"""exp() of less is no normal float32, and ten times slower. It takes the place of masked scores, whose weights become 0
by the mask; that of a visible score so far below the largest one changes nothing that float32 could tell.
"""


def expand_attention(path: Path) -> None:
    """Replace each placeholder in an ONNX file. Weights in files beside it are left alone."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    nodes: list[onnx.NodeProto] = []
    inputs = {graph_input.name: graph_input.type.tensor_type.shape.dim for graph_input in graph.input}
    for node in graph.node:
        if node.domain == DOMAIN:
            writer = _Writer(node.name)
            _write_attention(writer, node, head_dim=inputs[node.input[3]][3].dim_value)
            nodes += writer.nodes
            graph.initializer.extend(writer.constants)
        else:
            nodes.append(node)
    if len(nodes) == len(graph.node):
        return
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.array(False), ROUNDS_CACHE))
    opsets = {opset.domain: opset.version for opset in model.opset_import if opset.domain != DOMAIN}
    del model.opset_import[:]
    model.opset_import.extend(
        helper.make_opsetid(domain, version) for domain, version in {**opsets, RUNTIME_DOMAIN: 1}.items()
    )
    onnx.save(model, path)


class _Writer:
    """Nodes and constants so far. All names begin with ``name``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: Any) -> str:
        """The name of a constant: int64, or float32 where it has a decimal point."""
        array = np.asarray(value)
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        name = f"{self.name}/constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op_type: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any) -> str:
        """Add a node, and return its first output's name."""
        name = f"{self.name}/{op_type}_{len(self.nodes)}"
        domain = RUNTIME_DOMAIN if op_type in RUNTIME_OPERATORS else ""
        self.nodes.append(helper.make_node(op_type, inputs, outputs or (name,), name=name, domain=domain, **attributes))
        return outputs[0] if outputs else name

    def reshape(self, name: str, *sizes: int) -> str:
        return self.add("Reshape", name, self.constant(sizes))

    def size(self, name: str, axis: int) -> str:
        """The size of one axis, int64 [1]."""
        return self.add("Shape", name, start=axis, end=axis + 1)

    def sizes(self, *parts: str | int) -> str:
        """A shape of sizes that are known and names of those that are not."""
        named = [part if isinstance(part, str) else self.constant([part]) for part in parts]
        return self.add("Concat", *named, axis=0)


def _write_attention(to: _Writer, node: onnx.NodeProto, head_dim: int) -> None:
    """Rotate, write keys and values to their slots, and attend."""
    query, key, value, past_key, past_value, cos, sin, position_ids, slots, padding = node.input[:10]
    older_bias, older_mask, recent_slots, recent_bias = node.input[10:]
    attended, present_key, present_value = node.output
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    num_heads, num_kv_heads = attributes["num_heads"], attributes["num_kv_heads"]
    rotated = to.add("RotaryEmbedding", query, position_ids, cos, sin, num_heads=num_heads)
    rotated_key = to.add("RotaryEmbedding", key, position_ids, cos, sin, num_heads=num_kv_heads)

    def by_head(rows: str) -> str:  # [num_kv_heads, rows, head_dim]
        return to.add("Transpose", to.reshape(rows, -1, num_kv_heads, head_dim), perm=[1, 0, 2])

    with_one = to.add("Pad", by_head(_rounded(to, value)), to.constant([0, 1]), to.constant(1.0), to.constant([2]))
    to.add("ScatterND", past_key, slots, by_head(_rounded(to, rotated_key)), outputs=(present_key,))
    to.add("ScatterND", past_value, slots, with_one, outputs=(present_value,))
    rows_axis = to.constant([1])
    padded = to.add("Pad", rotated, padding, to.constant(0.0), rows_axis)
    grouped = to.add("Reshape", padded, to.sizes(to.size(older_bias, 0), -1, num_heads * head_dim))
    body = _group_body(to, (present_key, present_value), num_heads, num_kv_heads, head_dim)
    scanned = older_bias, older_mask, recent_slots, recent_bias
    groups = to.add("Scan", grouped, *scanned, num_scan_inputs=1 + len(scanned), body=body)
    rows = to.reshape(groups, 1, -1, num_heads * head_dim)
    to.add("Slice", rows, to.constant([0]), to.size(query, 1), rows_axis, outputs=(attended,))


def _rounded(to: _Writer, rows: str) -> str:
    """The rows as a cache in float16 gives them back, where the session is to have one. ONNX Runtime drops the branch
    that is not taken when it loads the graph.
    """

    def branch(name: str, *kinds: int) -> onnx.GraphProto:
        inner = _Writer(f"{to.name}/{name}_{len(to.nodes)}")
        found = rows
        for kind in kinds:
            found = inner.add("Cast", found, to=kind)
        result = found if kinds else inner.add("Identity", found)
        return helper.make_graph(
            inner.nodes, inner.name, [], [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)]
        )

    branches = {
        "then_branch": branch("half", TensorProto.FLOAT16, TensorProto.FLOAT),
        "else_branch": branch("whole"),
    }
    return to.add("If", ROUNDS_CACHE, **branches)


def _group_body(
    around: _Writer, caches: tuple[str, str], num_heads: int, num_kv_heads: int, head_dim: int
) -> onnx.GraphProto:
    """The graph that attends for one group of rows.

    Its heads are [num_kv_heads, parts, rows, heads], where each product with the cache is of one key-value head and of
    one part of the heads that share it.
    """
    keys, values = caches
    shared = HeadGroups.of(num_heads, num_kv_heads)
    parts, heads = shared.num_products // num_kv_heads, shared.num_heads
    num_slots = around.size(keys, 2)
    score_sizes = around.sizes(num_kv_heads, parts, -1, heads, num_slots)
    weight_sizes = around.sizes(num_kv_heads, parts, -1, num_slots)
    to = _Writer(f"{around.name}/group")
    query, bias, mask, recent_slots, recent_bias = (
        f"{to.name}/{name}" for name in ("query", OLDER_BIAS, OLDER_MASK, RECENT_SLOTS, RECENT_BIAS)
    )
    by_head = to.add("Transpose", to.reshape(query, -1, num_kv_heads, parts, heads, head_dim), perm=[1, 2, 0, 3, 4])
    flat = to.reshape(by_head, num_kv_heads, parts, -1, head_dim)
    scores = to.add("FusedMatMul", flat, keys, transB=1, alpha=float(head_dim) ** -0.5)
    scores = to.add("Reshape", scores, score_sizes)  # [num_kv_heads, parts, rows, heads, slots]
    columns = to.add("Unsqueeze", recent_slots, to.constant([0, 1, 3]))
    columns = to.add("Expand", columns, to.constant([num_kv_heads, parts, 1, heads, 1]))
    recent = to.add("Add", to.add("GatherElements", scores, columns, axis=4), recent_bias)
    older_weights, recent_weights = _weigh(to, to.add("Add", scores, bias), mask, recent)
    older_sums = to.add("MatMul", to.add("Reshape", older_weights, weight_sizes), values)
    older_sums = to.reshape(older_sums, num_kv_heads, parts, -1, heads, head_dim + 1)
    recent_sums = to.add("MatMul", recent_weights, to.add("Gather", values, recent_slots, axis=2))
    sums = to.add("Transpose", to.add("Add", older_sums, recent_sums), perm=[2, 0, 1, 3, 4])
    weighted, total = f"{to.name}/weighted", f"{to.name}/total"
    to.add("Split", sums, to.constant([head_dim, 1]), outputs=(weighted, total), axis=4)
    attended = to.reshape(to.add("Div", weighted, total), -1, num_heads * head_dim)
    return _as_graph(to, attended, num_heads * head_dim, (query, bias, mask, recent_slots, recent_bias))


def _as_graph(to: _Writer, attended: str, width: int, inputs: tuple[str, ...]) -> onnx.GraphProto:
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
        to.name,
        [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), size) for name, size in sizes.items()],
        [helper.make_tensor_value_info(attended, TensorProto.FLOAT, sizes[query])],
        to.constants,
    )


def _weigh(to: _Writer, older: str, mask: str, recent: str) -> tuple[str, str]:
    """The weights of older and recent ancestors from their scores: exponents below the largest score of both."""
    last = to.constant([4])
    largest = to.add(
        "Max",
        to.add("ReduceMax", older, last, keepdims=1),
        to.add("ReduceMax", recent, last, keepdims=1),
    )
    exponents = to.add("Max", to.add("Sub", older, largest), to.constant(LEAST_EXPONENT))
    return to.add("Mul", to.add("Exp", exponents), mask), to.add("Exp", to.add("Sub", recent, largest))
