"""Cosines and sines of the rotary embedding, one pair of tables for all layers of a stage."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.core.rows import Floats
from flowspec_edge.engine.graphs import as_ort_value
from flowspec_edge.errors import StageFailedError
from flowspec_edge.manifest import ROTARY_COS, ROTARY_SIN, of_sliding_layers

BLOCK_SLOTS = 1024
"""Slots that are computed at once; they take 16 ms for heads of 128 values (x86, a busy core)."""
KEPT_SLOTS = 4096
"""Slots that stay when no session is open: 2 MB for heads of 128 values. Hardly a session is longer."""


class RotaryTables:
    """Tables that are long enough for the longest session so far, [slots, head_dim / 2] float32.

    ``ropes`` has the frequencies of a model's layers, and behind them those of its layers with a window where it has
    such.

    They take memory only as far as texts have come. Angles are float32 products, as in the training of models. Cosines
    and sines are computed in float64 and rounded once, so that every processor has the same bits.

    Only one thread at a time may fill tables or shrink them.
    """

    def __init__(self, ropes: Sequence[Sequence[float]]) -> None:
        self._ropes = [np.array(frequencies, np.float32) for frequencies in ropes]
        self._tables = Tables(self._ropes, 0)

    def reach(self, num_slots: int) -> Tables:
        """Tables of at least ``num_slots``, of which nothing may be computed yet.

        Raises:
            StageFailedError: there is not enough memory.
        """
        if num_slots > self._tables.num_slots:
            try:
                self._tables = Tables(self._ropes, num_slots)
            except (MemoryError, OSError, OverflowError) as cause:
                raise StageFailedError(
                    f"no memory for rotary tables of {num_slots} slots ({cause}); ask for fewer tokens"
                ) from cause
        return self._tables

    def shrink(self) -> None:
        """No session is open: keep KEPT_SLOTS at most."""
        self._tables.shrink()


class Tables:
    """A pair of tables for each rope. ``inputs`` has them by the graphs' input names."""

    def __init__(self, ropes: Sequence[NDArray[np.float32]], num_slots: int) -> None:
        self.num_slots = num_slots
        self._ropes = ropes[:1] if all(np.array_equal(rope, ropes[0]) for rope in ropes) else ropes
        self._num_filled = 0
        shape = num_slots, len(ropes[0])
        num_bytes, flags = max(4 * math.prod(shape), 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = [mmap.mmap(-1, num_bytes, flags=flags) for _ in range(2 * len(self._ropes))]
        self._arrays: list[Floats] = [
            np.frombuffer(memory, np.float32, math.prod(shape)).reshape(shape) for memory in self._memory
        ]
        self.inputs: dict[str, ort.OrtValue] = {}
        if num_slots:
            names = ROTARY_COS, ROTARY_SIN
            self.inputs |= zip(names, map(as_ort_value, self._arrays[:2]), strict=True)
            if len(ropes) > 1:  # of layers with a window: the same tables where their rope is the same
                self.inputs |= zip(map(of_sliding_layers, names), map(as_ort_value, self._arrays[-2:]), strict=True)

    def fill(self, positions: NDArray[np.int64]) -> None:
        """Make sure that the rows of these positions are computed, as far as the tables go."""
        needed = min(int(positions.max()) + 1, self.num_slots)
        while self._num_filled < needed:
            stop = min(self._num_filled + BLOCK_SLOTS, self.num_slots)
            part = slice(self._num_filled, stop)
            positions = np.arange(part.start, stop, dtype=np.float32)
            for frequencies, cos, sin in zip(self._ropes, self._arrays[::2], self._arrays[1::2], strict=True):
                angles = np.outer(positions, frequencies)  # [slots, head_dim / 2]
                cos[part], sin[part] = (function(angles, dtype=np.float64) for function in (np.cos, np.sin))
            self._num_filled = stop

    def shrink(self) -> None:
        """Give back what is behind KEPT_SLOTS."""
        if self._num_filled > KEPT_SLOTS:
            for memory in self._memory:  # whole pages, since KEPT_SLOTS are
                memory.madvise(mmap.MADV_DONTNEED, KEPT_SLOTS * len(self._ropes[0]) * 4)
            self._num_filled = KEPT_SLOTS
