"""Quantises weights to 8 bits, which a device unpacks to float32 when it loads them, or to 4 bits, which are multiplied
as they are.

Each block of 32 weights along the input axis shares a scale. At 8 bits the arithmetic stays float32, so that rows
verified in a tree agree with rows of a chain to 1e-6, as they do with the checkpoint's own weights. Packed 8-bit
weights with float32 activations (MatMulNBits at accuracy level 1) agree too, but take four times as long: 13.1 against
4.1 ms for 16 rows of the demo model's 8 layers (x86, one thread). See docs/design.md, "Precision".
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from exporter.matmuls import parameter_name, save_graph
from flowspec_edge.errors import CheckpointError

BLOCK_SIZE = 32
BLOCKED_OPSET = 21
"""The first opset in which DequantizeLinear knows blocks."""
INTEGER_ACTIVATIONS = 4
"""The accuracy level at which MatMulNBits multiplies bytes: the only one with fast kernels at 4 bits."""


def store_in_8_bits(source: Path, path: Path) -> dict[str, torch.Tensor]:
    """Write ``source`` to ``path`` with every weight matrix in 8 bits, which sessions unpack to float32.

    Returns:
        The dequantised matrices by torch parameter name, as ``torch.nn.Linear`` keeps them: float32
        [out_features, in_features].
    """
    model, weights = _quantize(source, 8)
    _unpack_at_load(model)
    save_graph(model, path)
    return weights


def quantize_to_4_bits(source: Path, path: Path) -> dict[str, torch.Tensor]:
    """Write ``source`` to ``path`` with every weight matrix in 4 bits, which are multiplied as they are.

    Returns:
        The dequantised matrices, as :func:`store_in_8_bits` does.
    """
    model, weights = _quantize(source, 4)
    save_graph(model, path)
    return weights


def _quantize(source: Path, bits: int) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    level = INTEGER_ACTIVATIONS if bits == 4 else None
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=bits, accuracy_level=level)
    quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer.process()
    model = quantizer.model.model
    left_over = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    if left_over:
        raise CheckpointError(f"{source.name}: {left_over[0]} could not be quantised; export with --precision fp32")
    return model, dequantized_weights(model)


def dequantized_weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """The matrices that the MatMulNBits nodes of a graph stand for, by torch parameter name."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        packed, scales = (numpy_helper.to_array(initializers[name]) for name in node.input[1:3])
        num_in, num_out = _matrix_size(node)
        bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        if bits == 4:  # of a pair, the even weight is in the lower half
            packed = np.stack([packed & 15, packed >> 4], axis=-1)
        levels = packed.reshape(num_out, -1, BLOCK_SIZE).astype(np.float32) - 2 ** (bits - 1)
        matrix = (levels * scales.reshape(num_out, -1, 1)).reshape(num_out, -1)[:, :num_in]
        weights[parameter_name(node)] = torch.from_numpy(np.ascontiguousarray(matrix))
    return weights


def _unpack_at_load(model: onnx.ModelProto) -> None:
    """Replace each MatMulNBits by a MatMul whose weight sessions unpack once, when they load.

    One operator unpacks it: with several in a row, each would hold the block's weights in float32 once more while
    loading.
    """
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            nodes.append(node)
            continue
        rows, packed_name, scales_name = node.input[:3]
        num_in, num_out = _matrix_size(node)
        packed = numpy_helper.to_array(initializers[packed_name]).reshape(num_out, -1)[:, :num_in]
        levels = np.ascontiguousarray((packed ^ 0x80).view(np.int8).T)  # [in_features, out_features]
        scales = np.ascontiguousarray(numpy_helper.to_array(initializers[scales_name]).reshape(num_out, -1).T)
        initializers[packed_name].CopyFrom(numpy_helper.from_array(levels, packed_name))
        initializers[scales_name].CopyFrom(numpy_helper.from_array(scales, scales_name))
        weight = f"{node.name}/weight"
        nodes += [
            helper.make_node(
                "DequantizeLinear", [packed_name, scales_name], [weight], name=weight, axis=0, block_size=BLOCK_SIZE
            ),
            helper.make_node("MatMul", [rows, weight], node.output, name=node.name),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    for opset in model.opset_import:
        if not opset.domain:
            opset.version = max(opset.version, BLOCKED_OPSET)


def _matrix_size(node: onnx.NodeProto) -> tuple[int, int]:
    """Input and output features of a MatMulNBits node."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return attributes["K"], attributes["N"]
