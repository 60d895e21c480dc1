"""Copies an ONNX file with every weight matrix in another form: in float16, or in 8 bits with activations of 8 bits.

W8A8 scales each row of activations by itself: its largest magnitude becomes 127 steps around 128. So a row's bits do
not depend on its neighbours, and a matrix-vector product reads one byte per weight. Activations are unsigned because
signed ones are ten times slower on processors whose instruction multiplies unsigned by signed bytes (x86, onnxruntime
1.32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from flowspec_edge.errors import CheckpointError

MAX_FILE_BYTES = 2**31 - 2**24
"""A protobuf file ends at 2 GiB.

A larger graph needs further files for its weights, which a bundle does not describe.
"""
MAX_LEVEL = 127
ZERO_POINT = 128
SMALLEST = 1e-20
"""Rows of zeros have this scale, so that nothing is divided by zero."""

Nodes = list[onnx.NodeProto]


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph with all its weights in one file.

    Raises:
        CheckpointError: the weights do not fit into one file.
    """
    num_bytes = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if num_bytes > MAX_FILE_BYTES:
        raise CheckpointError(
            f"{path.name}: {num_bytes} bytes of weights exceed the {MAX_FILE_BYTES}-byte limit of one ONNX file; "
            "choose a smaller precision, or lower --block-size"
        )
    for tensor in _tensors(model.graph):
        tensor.ClearField("data_location")  # set where weights were read from a file beside the graph
    onnx.save(model, path)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Those of the graph and of the graphs in it."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)


def halve_matrices(source: Path, path: Path) -> dict[str, torch.Tensor]:
    """Store and multiply matrices as float16; everything else stays float32.

    Returns:
        The matrices as float32 by torch parameter name: [out_features, in_features].
    """

    def rewrite(graph: onnx.GraphProto, node: onnx.NodeProto, matrix: np.ndarray, rows: _Rows) -> np.ndarray:
        halved = matrix.astype(np.float16)
        if not np.isfinite(halved).all():
            raise CheckpointError(f"{path.name}: {node.name} has weights beyond float16; choose another precision")
        cast = rows.prepared(
            node.input[0], lambda name, prefix: [_node("Cast", [name], f"{prefix}/half", to=TensorProto.FLOAT16)]
        )
        graph.initializer.append(numpy_helper.from_array(halved, f"{node.name}/half"))
        rows.nodes += [
            _node("MatMul", [f"{cast}/half", f"{node.name}/half"], f"{node.name}/product"),
            helper.make_node("Cast", [f"{node.name}/product"], node.output, name=node.name, to=TensorProto.FLOAT),
        ]
        return halved.astype(np.float32)

    return _rewrite(source, path, rewrite)


def quantize_per_token(source: Path, path: Path) -> dict[str, torch.Tensor]:
    """Quantise matrices to int8, a scale for each output, and their inputs to uint8, a scale for each row.

    Returns:
        The dequantised matrices as float32 by torch parameter name: [out_features, in_features].
    """

    def rewrite(graph: onnx.GraphProto, node: onnx.NodeProto, matrix: np.ndarray, rows: _Rows) -> np.ndarray:
        largest = np.maximum(np.abs(matrix).max(axis=0), SMALLEST).astype(np.float32)
        scales = largest / np.float32(MAX_LEVEL)  # [outputs]
        levels = np.rint(matrix / scales).astype(np.int8)
        prefix = rows.prepared(node.input[0], _quantize_rows)
        name = node.name
        graph.initializer.extend(
            [numpy_helper.from_array(levels, f"{name}/levels"), numpy_helper.from_array(scales, f"{name}/scales")]
        )
        rows.nodes += [
            _node("MatMulInteger", [f"{prefix}/levels", f"{name}/levels", "w8a8/zero_point"], f"{name}/sums"),
            _node("Cast", [f"{name}/sums"], f"{name}/floats", to=TensorProto.FLOAT),
            _node("Mul", [f"{name}/floats", f"{prefix}/scale"], f"{name}/row_scaled"),
            helper.make_node("Mul", [f"{name}/row_scaled", f"{name}/scales"], node.output, name=name),
        ]
        dequantized: np.ndarray = levels.astype(np.float32) * scales
        return dequantized

    constants: dict[str, np.ndarray] = {
        "w8a8/zero_point": np.array(ZERO_POINT, np.uint8),
        "w8a8/last_axis": np.array([-1], np.int64),
        "w8a8/smallest": np.array(SMALLEST, np.float32),
        "w8a8/step": np.array(1 / MAX_LEVEL, np.float32),
        "w8a8/offset": np.array(ZERO_POINT, np.float32),
    }
    return _rewrite(source, path, rewrite, constants)


def _quantize_rows(name: str, prefix: str) -> Nodes:
    return [
        _node("Abs", [name], f"{prefix}/magnitude"),
        _node("ReduceMax", [f"{prefix}/magnitude", "w8a8/last_axis"], f"{prefix}/largest", keepdims=1),
        _node("Max", [f"{prefix}/largest", "w8a8/smallest"], f"{prefix}/positive"),
        _node("Mul", [f"{prefix}/positive", "w8a8/step"], f"{prefix}/scale"),
        _node("Div", [name, f"{prefix}/scale"], f"{prefix}/steps"),
        _node("Round", [f"{prefix}/steps"], f"{prefix}/rounded"),
        _node("Add", [f"{prefix}/rounded", "w8a8/offset"], f"{prefix}/shifted"),
        _node("Cast", [f"{prefix}/shifted"], f"{prefix}/levels", to=TensorProto.UINT8),
    ]


class _Rows:
    """The nodes of the new graph so far. Inputs that several matrices share are prepared once."""

    def __init__(self) -> None:
        self.nodes: Nodes = []
        self._prefixes: dict[str, str] = {}

    def prepared(self, name: str, prepare: Callable[[str, str], Nodes]) -> str:
        """Have ``prepare`` add nodes for the input ``name``, once, and return the prefix of their outputs' names."""
        if name not in self._prefixes:
            self._prefixes[name] = f"{name}/rows"
            self.nodes += prepare(name, self._prefixes[name])
        return self._prefixes[name]


Rewrite = Callable[[onnx.GraphProto, onnx.NodeProto, np.ndarray, _Rows], np.ndarray]


def _rewrite(
    source: Path, path: Path, rewrite: Rewrite, constants: dict[str, np.ndarray] | None = None
) -> dict[str, torch.Tensor]:
    """Write ``source`` to ``path`` with each MatMul by a weight replaced by the nodes that ``rewrite`` adds for it.

    Returns the weights that the new file stands for, by torch parameter name.
    """
    model = onnx.load(source)
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    weights: dict[str, torch.Tensor] = {}
    rows = _Rows()
    for node in list(graph.node):
        if node.op_type == "Gemm" or (node.op_type == "MatMul" and node.input[1] not in initializers):
            raise CheckpointError(f"{path.name}: {node.name} could not be quantised; export with --precision fp32")
        if node.op_type != "MatMul":
            rows.nodes.append(node)
            continue
        matrix = numpy_helper.to_array(initializers[node.input[1]])  # [in_features, out_features]
        stands_for = rewrite(graph, node, matrix, rows)
        weights[parameter_name(node)] = torch.from_numpy(np.ascontiguousarray(stands_for.T))
    kept = {name for node in rows.nodes for name in node.input}
    tensors = [tensor for tensor in graph.initializer if tensor.name in kept]
    tensors += [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(rows.nodes)
    graph.initializer.extend(tensors)
    save_graph(model, path)
    return weights


def parameter_name(node: onnx.NodeProto) -> str:
    """The torch parameter that a MatMul node multiplies by.

    Node names follow the module path: /layers.0/self_attn/q_proj/MatMul is of layers.0.self_attn.q_proj.weight.
    """
    return ".".join(part for part in node.name.split("/")[:-1] if part) + ".weight"


def _node(op_type: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, [output], name=output, **attributes)
