"""Rounds activations as this processor's kernels do that multiply them with blocks of weights.

ONNX Runtime's MatMulNBits rounds activations to 8 bits with a scale for each block, or not at all (processors without
instructions for products of bytes). A value on the border of two steps falls to another one on Arm than on x86. Nothing
tells which, so a small product of such values is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnxruntime

from exporter.onnx_file import Writer, floats
from flowspec_edge.manifest import SESSION_SETTINGS

INTEGER_ACTIVATIONS = 4
"""The accuracy level at which MatMulNBits multiplies bytes: the only one with fast kernels."""
_NUM_ROWS, _NUM_BLOCKS, _NUM_OUT = 4, 8, 16
Round = Callable[[np.ndarray, int], np.ndarray]


def round_activations(rows: np.ndarray, bits: int, block_size: int) -> np.ndarray:
    """The rows, float32 [rows, num_in], as products with blocks of that kind take them."""
    return _rounding(bits, block_size)(rows, block_size)


def round_by_block(rows: np.ndarray, block_size: int) -> np.ndarray:
    """127 steps to either side, a scale for each block."""
    blocks = rows.reshape(len(rows), -1, block_size)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.rint(blocks * np.where(largest > 0, np.float32(127) / largest, np.float32(0)))
    rounded: np.ndarray = (steps * (largest / np.float32(127))).reshape(rows.shape)
    return rounded


def round_by_scale(rows: np.ndarray, block_size: int) -> np.ndarray:
    """The same as Arm does it: the scale first and then its reciprocal, and the middle of two steps away from 0."""
    blocks = rows.reshape(len(rows), -1, block_size)
    scale = np.abs(blocks).max(axis=2, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = blocks * np.where(scale > 0, np.float32(1) / scale, np.float32(0))
    steps = np.trunc(exact)
    steps += np.copysign(np.abs(exact - steps) >= 0.5, exact)
    rounded: np.ndarray = (steps * scale).reshape(rows.shape)
    return rounded


def leave(rows: np.ndarray, block_size: int) -> np.ndarray:
    """No rounding at all."""
    return rows


@cache
def _rounding(bits: int, block_size: int) -> Round:
    """The rounding whose product with random weights is nearest to that of ONNX Runtime."""
    random = np.random.default_rng(0)
    num_in = _NUM_BLOCKS * block_size
    rows = _on_borders(random, block_size)
    middle = 2 ** (bits - 1)
    levels = random.integers(0, 2 * middle, (_NUM_OUT, _NUM_BLOCKS, block_size), np.uint8)
    packed = levels if bits == 8 else levels[..., ::2] | levels[..., 1::2] << 4
    scales = random.random((_NUM_OUT, _NUM_BLOCKS), np.float32)
    to = Writer()
    to.add(
        "MatMulNBits",
        "rows",
        to.constant(packed, np.uint8),
        to.constant(scales),
        outputs=("product",),
        K=num_in,
        N=_NUM_OUT,
        bits=bits,
        block_size=block_size,
        accuracy_level=INTEGER_ACTIVATIONS,
    )
    model = to.model([floats("rows", "rows", num_in)], [floats("product", "rows", _NUM_OUT)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    for setting in SESSION_SETTINGS:
        options.add_session_config_entry(*setting)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"rows": rows})[0]
    matrix = ((levels.astype(np.float32) - middle) * scales[..., None]).reshape(_NUM_OUT, -1)
    errors = {round_: np.abs(round_(rows, block_size) @ matrix.T - found).max() for round_ in _ROUNDINGS}
    return min(errors, key=lambda round_: errors[round_])


def _on_borders(random: np.random.Generator, block_size: int) -> np.ndarray:
    """Rows in which each value but the largest of its block lies as near to the middle of two steps as it can."""
    largest = 1 + random.random((_NUM_ROWS, _NUM_BLOCKS, 1), np.float32)
    steps = random.integers(-127, 127, (_NUM_ROWS, _NUM_BLOCKS, block_size)).astype(np.float32) + np.float32(0.5)
    steps[:, :, 0] = 127
    rows: np.ndarray = (steps * (largest / np.float32(127))).reshape(_NUM_ROWS, -1)
    return rows


_ROUNDINGS = (round_by_block, round_by_scale, leave)
