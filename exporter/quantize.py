"""Eight-bit weights, and the float weights they stand for.

Each block of 32 weights along the input axis shares a scale; ONNX Runtime's MatMulNBits quantises the activations of
a row by themselves (accuracy level 4), so a row's result does not depend on its neighbours. Dynamic quantisation
with one scale for the whole chunk would break that, and with it lossless verification.
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

from flowspec_edge.errors import CheckpointError

BITS = 8
BLOCK_SIZE = 32
ACCURACY_LEVEL = 4
_ZERO_POINT = 128  # of symmetric weights stored unsigned


def quantize_graph(path: Path) -> dict[str, torch.Tensor]:
    """Quantise every weight matrix of an ONNX file in place.

    Returns:
        The dequantised matrices by torch parameter name, as ``torch.nn.Linear`` keeps them: float32
        [out_features, in_features].
    """
    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    config = DefaultWeightOnlyQuantConfig(
        block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, bits=BITS
    )
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=config)
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer.process()
    model = quantizer.model.model
    left_over = [node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    if left_over:
        raise CheckpointError(f"{path.name}: {left_over[0]} could not be quantised; export with --precision fp32")
    onnx.save(model, path)
    return dequantized_weights(model)


def dequantized_weights(model: onnx.ModelProto) -> dict[str, torch.Tensor]:
    """What the MatMulNBits nodes of a graph multiply by, named after the torch module each node came from."""
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        packed, scales = (numpy_helper.to_array(initializers[name]) for name in node.input[1:3])
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        num_in, num_out = attributes["K"], attributes["N"]
        levels = packed.reshape(num_out, -1, BLOCK_SIZE).astype(np.float32) - _ZERO_POINT
        matrix = (levels * scales.reshape(num_out, -1, 1)).reshape(num_out, -1)[:, :num_in]
        # Node names follow the module path: /layers.0/self_attn/q_proj/MatMul_Q8
        parameter = ".".join(part for part in node.name.split("/")[:-1] if part) + ".weight"
        weights[parameter] = torch.from_numpy(np.ascontiguousarray(matrix))
    return weights
