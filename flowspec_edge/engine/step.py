"""Inputs and rows of forwards, as graphs are bound to them."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.core.rows import Floats
from flowspec_edge.engine.graphs import as_ort_value
from flowspec_edge.manifest import HIDDEN, HIDDEN_OUT, POSITION_IDS

Arrays = dict[str, NDArray[np.generic]]


class Step:
    """Inputs and rows of forwards of one shape. They are bound once, and changed in place from forward to forward."""

    def __init__(self, inputs: Arrays, hidden_size: int) -> None:
        self._inputs = inputs
        num_rows = inputs[POSITION_IDS].shape[1]
        self.rows: tuple[Floats, Floats] = (  # a block reads one and writes the other, and the next one the other way
            np.zeros((1, num_rows, hidden_size), np.float32),
            np.zeros((1, num_rows, hidden_size), np.float32),
        )
        self._values = {name: as_ort_value(array) for name, array in inputs.items()}
        self._row_values = [as_ort_value(array) for array in self.rows]

    def bind(self, number: int, binding: ort.IOBinding) -> None:
        """Bind the graph that is ``number`` in its chain."""
        for name, value in {**self._values, HIDDEN: self._row_values[number % 2]}.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(HIDDEN_OUT, self._row_values[1 - number % 2])

    def fill(self, hidden: Floats) -> None:
        """The rows that the first block reads. Rows of padding behind them are zeros."""
        self.rows[0][0, : len(hidden)] = hidden
        self.rows[0][0, len(hidden) :] = 0.0

    def take(self, inputs: Arrays) -> bool:
        """Take the inputs of another forward, if they have the same shapes."""
        if any(self._inputs[name].shape != array.shape for name, array in inputs.items()):
            return False
        for name, array in inputs.items():
            self._inputs[name][...] = array
        return True
