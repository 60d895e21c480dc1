"""Copies an ONNX file that was exported from torch with every weight matrix in another form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exporter.matrices import FloatMatrix
from exporter.onnx_file import IR_VERSION, OPSET, RUNTIME_DOMAIN, Writer, save_model
from exporter.precisions import Precision
from flowspec_edge.errors import CheckpointError


def rewrite_matrices(source: Path, path: Path, precision: Precision) -> tuple[dict[str, np.ndarray], int]:
    """Write the float32 file ``source`` to ``path`` in a precision.

    Returns:
        What the matrices stand for, by torch parameter name: float32 [out_features, in_features]; and the bytes that a
        session takes once it has loaded the file.

    Raises:
        CheckpointError: a matrix cannot have that form, or the weights do not fit into one file.
    """
    model = onnx.load(source)
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    weights: dict[str, np.ndarray] = {}
    memory_bytes, to = 0, Writer()
    for node in graph.node:
        if node.op_type == "Gemm" or (node.op_type == "MatMul" and node.input[1] not in initializers):
            raise CheckpointError(f"{path.name}: {node.name} could not be quantised; export with --precision fp32")
        if node.op_type != "MatMul":
            to.nodes.append(node)
            continue
        matrix = numpy_helper.to_array(initializers[node.input[1]])  # [in_features, out_features]
        form = precision.form(FloatMatrix(np.ascontiguousarray(matrix.T)))
        form.write(to.within(node.name.strip("/")), node.input[0], outputs=tuple(node.output))
        weights[parameter_name(node)] = form.unpacked()
        memory_bytes += form.memory_bytes
    kept = {name for node in to.nodes for name in node.input}
    constants = [*(tensor for tensor in graph.initializer if tensor.name in kept), *to.constants]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(to.nodes)
    graph.initializer.extend(constants)
    for tensor in graph.initializer:
        tensor.ClearField("data_location")  # set where weights were read from a file beside the graph
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    del model.opset_import[:]
    for domain, version in {**opsets, "": OPSET, RUNTIME_DOMAIN: 1}.items():
        model.opset_import.append(helper.make_opsetid(domain, version))
    model.ir_version = IR_VERSION
    save_model(model, to.tensors, path)
    return weights, memory_bytes + to.loaded_bytes()


def parameter_name(node: onnx.NodeProto) -> str:
    """The torch parameter that a MatMul node multiplies by.

    Node names follow the module path: /layers.0/self_attn/q_proj/MatMul is of layers.0.self_attn.q_proj.weight.
    """
    return ".".join(part for part in node.name.split("/")[:-1] if part) + ".weight"
