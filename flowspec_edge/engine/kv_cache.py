"""The KV cache of one session of a stage, which grows as it is used."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from flowspec_edge.core.rows import Floats, SlotMove
from flowspec_edge.engine.graphs import as_ort_value

SLOTS_PER_STEP = 128
"""A cache has a multiple of this many slots: ONNX Runtime adds up a product in blocks of this many terms, or of a
multiple, and so a block is always at the same slots.
"""


class KvCache:
    """Keys and values of some layers, in two arrays that the graphs update in place.

    Products with them take all slots there are, so there are never many more than are used. Behind its values a slot
    that was written has a 1, by which the product adds up the weights as it adds up values.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self.num_slots = 0
        self._num_layers, self._num_kv_heads = num_layers, num_kv_heads
        self._keys = self._empty(head_dim)  # [layers, kv_heads, 1, slots, head_dim]
        self._values = self._empty(head_dim + 1)
        self.values: list[ort.OrtValue] = []

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    def reach(self, num_slots: int) -> bool:
        """Have at least ``num_slots``. Returns whether the arrays are others than before, and must be bound anew.

        Raises:
            MemoryError: the system gives no more.
        """
        if num_slots <= self.num_slots:
            return False
        steps = -(-num_slots // SLOTS_PER_STEP) * SLOTS_PER_STEP
        self.values = []  # they hold the arrays
        self._keys = _grown(self._keys, steps)
        self._values = _grown(self._values, steps)
        self.num_slots = steps
        layers = zip(self._keys, self._values, strict=True)
        self.values = [as_ort_value(array) for both in layers for array in both]
        return True

    def move(self, moves: Sequence[SlotMove]) -> None:
        """Close the gaps that dropped rows left."""
        for source, target, length in moves:
            for array in (self._keys, self._values):
                array[..., target : target + length, :] = array[..., source : source + length, :]

    def _empty(self, width: int) -> Floats:
        return np.zeros((self._num_layers, self._num_kv_heads, 1, 0, width), np.float32)


def _grown(array: Floats, num_slots: int) -> Floats:
    """A copy with room for ``num_slots``. The old one is as large until it is let go of."""
    *outer, used, width = array.shape
    grown = zeros_on_small_pages((*outer, num_slots, width))
    grown[..., :used, :] = array
    return grown


def zeros_on_small_pages(shape: tuple[int, ...]) -> Floats:
    """Zeros in a mapping of their own, of which the system gives small pages as they are used.

    Raises:
        MemoryError: the system gives no such mapping.
    """
    num_bytes = math.prod(shape) * np.dtype(np.float32).itemsize
    try:
        memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as cause:
        raise MemoryError(f"{num_bytes} bytes: {cause.strerror}") from cause
    with contextlib.suppress(OSError):  # a kernel without huge pages does not know the word
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    zeros: Floats = np.frombuffer(memory, np.float32, math.prod(shape)).reshape(shape)
    return zeros
