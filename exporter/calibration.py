"""Looks at what enters each matrix on a text, so that a precision may round by what matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from exporter.config import LayerShape
from exporter.layer_graph import Weights
from exporter.matrices import Matrix, float_product
from exporter.reference import Expected, NumpyLayers
from exporter.steps import Step, text_steps
from flowspec_edge.manifest import HIDDEN

LM_HEAD = "lm_head"
WINDOW = 2048
"""Inputs whose products are taken with each other: those of 14,336 inputs would be 800 MB."""


class Activations:
    """What has been seen of the rows that enter one matrix.

    Attributes:
        largest: the largest magnitude of each input, [num_in].
        squares: the sums of products of each two inputs in one WINDOW, a square matrix for each window; none where they
            are not wanted.
    """

    def __init__(self, num_in: int, *, has_squares: bool) -> None:
        self.largest = np.zeros(num_in, np.float32)
        self._windows = [slice(start, start + WINDOW) for start in range(0, num_in, WINDOW)] if has_squares else []
        self.squares = [np.float32(0) * self.largest[window, None] * self.largest[window] for window in self._windows]

    def add(self, rows: np.ndarray) -> None:
        """Look at further rows, [rows, num_in]."""
        np.maximum(self.largest, np.abs(rows).max(axis=0), out=self.largest)
        for window, squares in zip(self._windows, self.squares, strict=True):
            squares += rows[:, window].T @ rows[:, window]

    def largest_inputs(self, share: float) -> np.ndarray:
        """The inputs with the largest values, a ``share`` of all and at least one: int64, in ascending order."""
        number = max(round(share * len(self.largest)), 1)
        return np.sort(np.argsort(-self.largest, kind="stable")[:number])


class Calibration:
    """Takes the rows of texts through the layers in ``dtype``, and says what entered each matrix.

    In float64 the inputs with the largest values are the same ones on every processor: in float32, in which each adds
    up in an order of its own, two of them that are nearly as large may change places.

    Attributes:
        seen: of the last block, by the names of its matrices without ``.weight``; behind the final norm, of LM_HEAD.
    """

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        embedding: np.ndarray,
        *,
        has_squares: bool,
        dtype: type[np.floating[Any]] = np.float32,
    ) -> None:
        self._has_squares, self._dtype = has_squares, dtype
        self._steps: list[Step] = text_steps(texts)
        self._rows = [embedding[step.tokens].astype(dtype)[None] for step in self._steps]
        self.seen: dict[str, Activations] = {}
        self._entered: np.ndarray | None = None

    def run(self, shape: LayerShape, layers: range, weights: Weights) -> None:
        """Take the rows through a block."""
        self.seen.clear()
        capacity = max(step.num_slots for step in self._steps)
        reference = NumpyLayers(shape, layers, weights, capacity, self._multiply, self._dtype)
        self._rows = [reference.run({HIDDEN: rows}, step) for rows, step in zip(self._rows, self._steps, strict=True)]

    def run_final_norm(self, norm: Expected) -> None:
        """Take the rows through the final norm, and look at them as those that enter the head."""
        self._rows = [norm(rows) for rows in self._rows]
        entering = Activations(self._rows[0].shape[-1], has_squares=self._has_squares)
        for rows in self._rows:
            entering.add(rows[0])
        self.seen = {LM_HEAD: entering}

    def _multiply(self, name: str, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        if rows is not self._entered:  # queries, keys and values are of the same rows, and so are gate and up
            self._entered = rows
            self._seen_last = self.seen.get(name) or Activations(rows.shape[1], has_squares=self._has_squares)
            self._seen_last.add(rows)
        self.seen[name] = self._seen_last
        return float_product(matrix, rows)
