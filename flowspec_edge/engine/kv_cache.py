"""The KV cache of one session of a stage, which grows as it is used."""

from __future__ import annotations

import contextlib
import math
import mmap
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.core.limits import SLOTS_PER_STEP
from flowspec_edge.core.rows import SlotMove
from flowspec_edge.engine.graphs import as_ort_value


class KvCache:
    """Keys and values of some layers, in arrays that the graphs update in place.

    Products with them take all slots there are, so there are never many more than are used. Behind its values a slot
    that was written has a 1, by which the product adds up the weights as it adds up values.

    Where ``is_half`` is set, both are kept in float16, and layers see them in float32 while they run: ``fetch`` and
    ``keep`` go around each run. Graphs round what they write, so what is kept is what was seen.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, *, is_half: bool = False) -> None:
        self.num_slots = 0
        self.is_half = is_half
        # Keys and values of each layer in turn, [kv_heads, 1, slots, head_dim], and one value more behind values. Each
        # is an array of its own: one after the other grows, so there is hardly ever more than is needed.
        self._kept: list[NDArray[np.floating]] = [
            np.zeros((num_kv_heads, 1, 0, width), np.float16 if is_half else np.float32)
            for _ in range(num_layers)
            for width in (head_dim, head_dim + 1)
        ]
        self._seen: list[NDArray[np.floating]] = []  # the same as graphs see them; of some layers where they are halves

    @property
    def num_bytes(self) -> int:
        """Of what is kept."""
        return sum(array.nbytes for array in self._kept)

    def has(self, num_slots: int) -> bool:
        """Whether graphs see so many."""
        return num_slots <= self.num_slots and bool(self._seen)

    def reach(self, num_slots: int, layers_at_once: int = 1) -> None:
        """Have at least ``num_slots``. Where it grows, the arrays are others than before, and must be bound anew; those
        who hold the old ones keep their memory.

        In float16 there is room for ``layers_at_once`` layers to be seen.

        Raises:
            MemoryError: the system gives no more. What it gave is kept, and used by the next attempt.
        """
        if self.has(num_slots):
            return
        self._seen = []
        steps = max(-(-num_slots // SLOTS_PER_STEP) * SLOTS_PER_STEP, *(array.shape[2] for array in self._kept))
        shorter = [place for place, array in enumerate(self._kept) if array.shape[2] < steps]
        if shorter:
            self._check_room(steps)
        for place in shorter:
            self._kept[place] = _grown(self._kept[place], steps)
        if self.is_half:
            self._seen = [zeros_on_small_pages(array.shape) for array in self._kept[:2]] * layers_at_once
        else:
            self._seen = self._kept
        self.num_slots = steps

    def seen(self, start: int, stop: int) -> list[ort.OrtValue]:
        """Keys and values of each of the layers ``[start, stop)`` in turn, for their graph."""
        first = 0 if self.is_half else 2 * start
        return [as_ort_value(array) for array in self._seen[first : first + 2 * (stop - start)]]

    def move(self, moves: Sequence[SlotMove]) -> None:
        """Close the gaps that dropped rows left."""
        for source, target, length in moves:
            for array in self._kept:
                array[:, :, target : target + length] = array[:, :, source : source + length]

    def rest(self) -> None:
        """No forward runs for a while: have only what is kept. The arrays must be bound anew afterwards."""
        self._seen = []

    def fetch(self, start: int, stop: int, num_slots: int) -> None:
        """Let the layers ``[start, stop)`` see the first ``num_slots``."""
        for kept, seen in self._converted(start, stop):
            seen[:, :, :num_slots] = kept[:, :, :num_slots]

    def keep(self, start: int, stop: int, slots: slice) -> None:
        """Keep what the layers ``[start, stop)`` wrote to ``slots``."""
        for kept, seen in self._converted(start, stop):
            kept[:, :, slots] = seen[:, :, slots]

    def _converted(self, start: int, stop: int) -> Iterator[tuple[NDArray[np.floating], NDArray[np.floating]]]:
        if self.is_half:
            yield from zip(self._kept[2 * start : 2 * stop], self._seen, strict=False)

    def _check_room(self, num_slots: int) -> None:
        """Raise MemoryError where the system has less left than is needed to grow, which it would give nevertheless, to
        end the process when it is used.
        """
        slot_bytes = [array.shape[0] * array.shape[3] * array.itemsize for array in self._kept]
        needed, left = num_slots * (sum(slot_bytes) + max(slot_bytes)) - self.num_bytes, memory_left()
        if needed > left:
            raise MemoryError(f"{needed} bytes are needed, {left} are left")


def _grown(array: NDArray[np.floating], num_slots: int) -> NDArray[np.floating]:
    """A copy with room for ``num_slots``. The old one is there until it is let go of."""
    heads, one, used, width = array.shape
    grown = zeros_on_small_pages((heads, one, num_slots, width), array.dtype)
    grown[:, :, :used] = array
    return grown


def memory_left(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that Linux can give without swapping; very many where it does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else sys.maxsize


def zeros_on_small_pages(shape: tuple[int, ...], kind: npt.DTypeLike = np.float32) -> NDArray[np.floating]:
    """Zeros in a mapping of their own, of which the system gives small pages as they are used.

    Raises:
        MemoryError: the system gives no such mapping.
    """
    num_bytes = math.prod(shape) * np.dtype(kind).itemsize
    try:
        memory = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as cause:
        raise MemoryError(f"{num_bytes} bytes: {cause.strerror}") from cause
    with contextlib.suppress(OSError):  # a kernel without huge pages does not know the word
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, kind, math.prod(shape)).reshape(shape)
