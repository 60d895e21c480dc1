"""Weights of 8 bits in the files, unpacked to float32 when a device loads them, and weights of 4 bits multiplied as they are.

Each block of 32 weights along the input axis shares a scale. The arithmetic stays float32, so that rows verified in a tree
agree with rows of a chain to 1e-6, as they do with the checkpoint's own weights. Rounding activations to 8 bits as well
(MatMulNBits at accuracy level 4) would be three times as fast, but magnifies the last bit: where the slots of a row's
ancestors lie changes the order of attention's sums, and a difference of 1e-7 there becomes one of 3e-2 behind it, which
turns near ties between two tokens. Packed weights with float32 activations (accuracy level 1) agree too, and take four
times as long: 13.1 against 4.1 ms for 16 rows of the demo model's 8 layers (x86, one thread).
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

from exporter.matmuls import parameter_name
from flowspec_edge.errors import CheckpointError

BLOCK_SIZE = 32
INTEGER_ACTIVATIONS = 4
"""Accuracy level of MatMulNBits at which it multiplies bytes: the only one with fast kernels at 4 bits."""


def store_in_8_bits(path: Path) -> dict[str, torch.Tensor]:
    """Quantise every weight matrix of an ONNX file in place; sessions unpack them to float32.

    Returns:
        The dequantised matrices by torch parameter name, as ``torch.nn.Linear`` keeps them: float32
        [out_features, in_features].
    """
    model, weights = _quantize(path, 8)
    _unpack_at_load(model)
    onnx.save(model, path)
    return weights


def quantize_to_4_bits(path: Path) -> dict[str, torch.Tensor]:
    """Quantise every weight matrix of an ONNX file in place, to be multiplied as they are. Returns what
    :func:`store_in_8_bits` does.
    """
    model, weights = _quantize(path, 4)
    onnx.save(model, path)
    return weights


def _quantize(path: Path, bits: int) -> tuple[onnx.ModelProto, dict[str, torch.Tensor]]:
    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    level = INTEGER_ACTIVATIONS if bits == 4 else None
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK_SIZE, is_symmetric=True, bits=bits, accuracy_level=level)
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer.process()
    model = quantizer.model.model
    left_over = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    if left_over:
        raise CheckpointError(f"{path.name}: {left_over[0]} could not be quantised; export with --precision fp32")
    return model, dequantized_weights(model)


def dequantized_weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """What the MatMulNBits nodes of a graph multiply by, named after the torch module each node came from."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        packed, scales = (numpy_helper.to_array(initializers[name]) for name in node.input[1:3])
        num_in, num_out = _matrix_size(node)
        bits = next(attribute.i for attribute in node.attribute if attribute.name == "bits")
        if bits == 4:  # the even one of a pair in the lower half
            packed = np.stack([packed & 15, packed >> 4], axis=-1)
        levels = packed.reshape(num_out, -1, BLOCK_SIZE).astype(np.float32) - 2 ** (bits - 1)
        matrix = (levels * scales.reshape(num_out, -1, 1)).reshape(num_out, -1)[:, :num_in]
        weights[parameter_name(node)] = torch.from_numpy(np.ascontiguousarray(matrix))
    return weights


def _unpack_at_load(model: onnx.ModelProto) -> None:
    """Replace each MatMulNBits by a MatMul with a weight computed from constants alone, which sessions fold once."""
    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            nodes.append(node)
            continue
        rows, packed_name, scales_name = node.input[:3]
        num_in, num_out = _matrix_size(node)
        scales = numpy_helper.to_array(initializers[scales_name]).reshape(num_out, -1, 1)
        initializers[scales_name].CopyFrom(numpy_helper.from_array(scales, scales_name))
        levels = (numpy_helper.to_array(initializers[packed_name]).reshape(num_out, -1, BLOCK_SIZE) ^ 0x80).view(
            np.int8
        )
        initializers[packed_name].CopyFrom(numpy_helper.from_array(levels, packed_name))
        name = node.name
        constants = {
            f"{name}/padded": [num_out, -1],
            f"{name}/start": [0],
            f"{name}/stop": [num_in],
            f"{name}/axis": [1],
        }
        graph.initializer.extend(
            numpy_helper.from_array(np.array(value, dtype=np.int64), key) for key, value in constants.items()
        )
        padded, *bounds = constants
        steps = [
            ("Cast", [packed_name], {"to": onnx.TensorProto.FLOAT}),
            ("Mul", [f"{name}/Cast", scales_name], {}),
            ("Reshape", [f"{name}/Mul", padded], {}),
            ("Slice", [f"{name}/Reshape", *bounds], {}),
            ("Transpose", [f"{name}/Slice"], {"perm": [1, 0]}),
        ]
        nodes += [
            helper.make_node(op_type, inputs, [f"{name}/{op_type}"], name=f"{name}/{op_type}", **attributes)
            for op_type, inputs, attributes in steps
        ]
        nodes.append(helper.make_node("MatMul", [rows, f"{name}/Transpose"], node.output, name=name))
    del graph.node[:]
    graph.node.extend(nodes)


def _matrix_size(node: onnx.NodeProto) -> tuple[int, int]:
    """Input and output features of a MatMulNBits node."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return attributes["K"], attributes["N"]
