"""The forms in which a graph has a weight matrix: how each is written, what it stands for, and how it multiplies.

A row's bits never depend on its neighbours (docs/design.md, "The same bits in every tree"). So activations that are
rounded to 8 bits have scales of their own for each row, or for each block of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from onnx import TensorProto

from exporter.onnx_file import Writer
from flowspec_edge.errors import CheckpointError

MAX_LEVEL = 127
ZERO_POINT = 128
SMALLEST = 1e-20
"""Rows of zeros have this scale, so that nothing is divided by zero."""
_AT_ONCE = 2**24
"""Weights that are unpacked at once for a product: 64 MB."""


class Matrix(Protocol):
    """A matrix of weights, which maps rows of ``num_in`` values to rows of ``num_out``."""

    @property
    def shape(self) -> tuple[int, int]:
        """``num_out`` and ``num_in``."""
        ...

    @property
    def memory_bytes(self) -> int:
        """What a session that has loaded the matrix keeps of it."""
        ...

    def write(self, to: Writer, rows: str, outputs: tuple[str, ...] = ()) -> str:
        """Add the product with ``rows`` to a graph, and return its output, whose name ``outputs`` may give."""
        ...

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The weights of the outputs ``[start, stop)`` in float32: [outputs, num_in]."""
        ...

    def times(self, rows: np.ndarray) -> np.ndarray:
        """What the graph computes for ``rows``, [rows, num_in], in the same arithmetic: float32 [rows, num_out]."""
        ...


def float_product(matrix: Matrix, rows: np.ndarray) -> np.ndarray:
    """The product in float32, whatever the graph rounds: [rows, num_out]."""
    return np.concatenate([rows @ matrix.unpacked(start, stop).T for start, stop in parts_of(matrix)], axis=-1)


def parts_of(matrix: Matrix) -> Iterator[tuple[int, int]]:
    """Ranges of outputs that are unpacked one after the other."""
    num_out, num_in = matrix.shape
    step = max(_AT_ONCE // num_in, 1)
    return ((start, min(start + step, num_out)) for start in range(0, num_out, step))


@dataclass(frozen=True)
class FloatMatrix:
    """Weights that are multiplied in float32. Files have them in 16 bits where that loses nothing.

    Attributes:
        weights: float32 or float16 [num_out, num_in].
    """

    weights: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return self.weights.shape[0], self.weights.shape[1]

    @property
    def memory_bytes(self) -> int:
        return 4 * self.weights.size

    def take(self, rows: np.ndarray) -> FloatMatrix:
        """The matrix of these rows in this order."""
        return FloatMatrix(self.weights[rows])

    def write(self, to: Writer, rows: str, outputs: tuple[str, ...] = ()) -> str:
        stored, kind = narrowest(self.weights)
        weights = to.tensor("weights", stored.T, kind)
        if kind != TensorProto.FLOAT:
            weights = to.add("Cast", weights, to=TensorProto.FLOAT)  # done once, when a session loads it
        return to.add("MatMul", rows, weights, outputs=outputs)

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.weights[start:stop].astype(np.float32, copy=False)

    def times(self, rows: np.ndarray) -> np.ndarray:
        return float_product(self, rows)


def narrowest(weights: np.ndarray) -> tuple[np.ndarray, int]:
    """The same numbers as bfloat16 (in uint16), else as float16, else as float32, and their type in ONNX."""
    whole = np.ascontiguousarray(weights, np.float32)
    bits = whole.view(np.uint32)
    if not (bits & 0xFFFF).any():
        return (bits >> 16).astype(np.uint16), TensorProto.BFLOAT16
    with np.errstate(over="ignore"):
        halves = whole.astype(np.float16)
    if np.array_equal(halves.astype(np.float32), whole):
        return halves, TensorProto.FLOAT16
    return whole, TensorProto.FLOAT


@dataclass(frozen=True)
class HalfMatrix:
    """Weights and activations in float16."""

    weights: np.ndarray  # float16 [num_out, num_in]

    @classmethod
    def rounded(cls, weights: np.ndarray) -> HalfMatrix:
        """Raises CheckpointError where a weight is beyond float16."""
        with np.errstate(over="ignore"):
            halves = weights.astype(np.float16)
        if not np.isfinite(halves).all():
            raise CheckpointError("has weights beyond float16; choose another precision")
        return cls(halves)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weights.shape[0], self.weights.shape[1]

    @property
    def memory_bytes(self) -> int:
        return 4 * self.weights.size  # where the processor has no arithmetic in float16

    def write(self, to: Writer, rows: str, outputs: tuple[str, ...] = ()) -> str:
        halves = to.prepared("halves", rows, lambda: to.add("Cast", rows, to=TensorProto.FLOAT16))
        product = to.add("MatMul", halves, to.tensor("weights", self.weights.T))
        return to.add("Cast", product, outputs=outputs, to=TensorProto.FLOAT)

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.weights[start:stop].astype(np.float32)

    def times(self, rows: np.ndarray) -> np.ndarray:
        return float_product(self, rows.astype(np.float16).astype(np.float32)).astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class PerTokenMatrix:
    """Weights in int8 with a scale for each output; activations in uint8 with a scale for each row (W8A8).

    The largest magnitude of a row becomes 127 steps around 128. Activations are unsigned because signed ones are ten
    times slower on processors whose instruction multiplies unsigned by signed bytes (x86, onnxruntime 1.32).
    """

    levels: np.ndarray  # int8 [num_out, num_in]
    scales: np.ndarray  # float32 [num_out]

    @classmethod
    def rounded(cls, weights: np.ndarray) -> PerTokenMatrix:
        largest = np.maximum(np.abs(weights).max(axis=1), SMALLEST).astype(np.float32)
        scales = largest / np.float32(MAX_LEVEL)
        return cls(np.rint(weights / scales[:, None]).astype(np.int8), scales)

    @property
    def shape(self) -> tuple[int, int]:
        return self.levels.shape[0], self.levels.shape[1]

    @property
    def memory_bytes(self) -> int:
        return self.levels.nbytes + self.scales.nbytes

    def write(self, to: Writer, rows: str, outputs: tuple[str, ...] = ()) -> str:
        scale = to.prepared("scale of each row", rows, lambda: _scale_rows(to, rows))
        activations = to.prepared("bytes", rows, lambda: _round_rows(to, rows, scale))
        zero_point = to.constant(ZERO_POINT, np.uint8)
        sums = to.add("MatMulInteger", activations, to.tensor("levels", self.levels.T), zero_point)
        scaled = to.add("Mul", to.add("Cast", sums, to=TensorProto.FLOAT), scale)
        return to.add("Mul", scaled, to.tensor("scales", self.scales), outputs=outputs)

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        weights: np.ndarray = self.levels[start:stop].astype(np.float32) * self.scales[start:stop, None]
        return weights

    def times(self, rows: np.ndarray) -> np.ndarray:
        scale = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.float32(SMALLEST)) * np.float32(1 / MAX_LEVEL)
        return float_product(self, np.rint(rows / scale) * scale)


def _scale_rows(to: Writer, rows: str) -> str:
    largest = to.add("ReduceMax", to.add("Abs", rows), to.constant([-1]), keepdims=1)
    return to.add("Mul", to.add("Max", largest, to.constant(SMALLEST)), to.constant(1 / MAX_LEVEL))


def _round_rows(to: Writer, rows: str, scale: str) -> str:
    steps = to.add("Round", to.add("Div", rows, scale))
    return to.add("Cast", to.add("Add", steps, to.constant(float(ZERO_POINT))), to=TensorProto.UINT8)


@dataclass(frozen=True)
class SplitMatrix:
    """A matrix whose product rounds activations, and a few of its columns, which are multiplied in float32.

    Some inputs of a layer are hundreds of times larger than the others. Steps that reach as far as they do leave little
    of the others.

    Attributes:
        rest: the matrix, which these columns' inputs enter as zeros.
        columns: which inputs they multiply, int64 [kept], in ascending order.
        kept: the columns, [num_out, kept].
    """

    rest: Matrix
    columns: np.ndarray
    kept: FloatMatrix

    @classmethod
    def of(cls, weights: np.ndarray, columns: np.ndarray, form: Callable[[np.ndarray], Matrix]) -> SplitMatrix:
        """Split weights, [num_out, num_in]; ``form`` makes a matrix of all that is not kept."""
        rest = weights.copy()
        rest[:, columns] = 0
        return cls(form(rest), columns, FloatMatrix(weights[:, columns]))

    @property
    def shape(self) -> tuple[int, int]:
        return self.rest.shape

    @property
    def memory_bytes(self) -> int:
        return self.rest.memory_bytes + self.kept.memory_bytes

    def write(self, to: Writer, rows: str, outputs: tuple[str, ...] = ()) -> str:
        key = str(self.columns.tolist())
        others = np.ones(self.shape[1], np.float32)
        others[self.columns] = 0
        without = to.prepared(f"without {key}", rows, lambda: to.add("Mul", rows, to.constant(others)))
        alone = to.prepared(f"only {key}", rows, lambda: to.add("Gather", rows, to.constant(self.columns), axis=-1))
        product = self.rest.write(to, without)
        return to.add("Add", product, self.kept.write(to.within("kept"), alone), outputs=outputs)

    def unpacked(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        weights = self.rest.unpacked(start, stop).copy()
        weights[:, self.columns] = self.kept.unpacked(start, stop)
        return weights

    def times(self, rows: np.ndarray) -> np.ndarray:
        without = rows.copy()
        without[:, self.columns] = 0
        product: np.ndarray = self.rest.times(without) + self.kept.times(rows[:, self.columns])
        return product
