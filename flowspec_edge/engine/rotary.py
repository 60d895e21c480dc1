"""Cosines and sines of the rotary embedding, one pair of tables for all layers of a stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from flowspec_edge.engine.graphs import as_ort_value
from flowspec_edge.errors import StageFailedError
from flowspec_edge.manifest import ROTARY_COS, ROTARY_SIN


class RotaryTables:
    """Tables that are long enough for the longest session so far, [slots, head_dim / 2] float32.

    Angles are float32 products, as in the training of models. Cosines and sines are computed in float64 and rounded
    once, so that every processor has the same bits.
    """

    def __init__(self, frequencies: Sequence[float]) -> None:
        self._frequencies = np.array(frequencies, np.float32)
        self._num_slots = 0
        self._inputs: dict[str, ort.OrtValue] = {}

    def reach(self, num_slots: int) -> dict[str, ort.OrtValue]:
        """Tables of at least ``num_slots``, by the graphs' input names.

        Tables of 1,000 slots for heads of 128 values take 16 ms to make (x86, a busy core).

        Raises:
            StageFailedError: there is not enough memory.
        """
        if num_slots <= self._num_slots:
            return self._inputs
        try:
            angles = np.outer(np.arange(num_slots, dtype=np.float32), self._frequencies)  # [slots, head_dim / 2]
            self._inputs = {
                name: as_ort_value(function(angles, dtype=np.float64).astype(np.float32))
                for name, function in ((ROTARY_COS, np.cos), (ROTARY_SIN, np.sin))
            }
        except MemoryError as cause:
            raise StageFailedError(
                f"no memory for rotary tables of {num_slots} slots ({cause}); ask for fewer tokens"
            ) from cause
        self._num_slots = num_slots
        return self._inputs
