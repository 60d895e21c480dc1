"""ONNX Runtime sessions and caches: the parts that stages and drafters share.

Every graph with a cache is run in the same way: its new rows are written to the next slots of a cache that is updated
in place. Slot 0 is reserved, because the attention operator ignores position ids while its past is empty.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.core.rows import SlotMove
from flowspec_edge.engine.huge_pages import on_huge_pages
from flowspec_edge.engine.memory import frugal_allocation
from flowspec_edge.engine.padding import MAX_ATTENTION_PADDING, attention_padding
from flowspec_edge.errors import BundleError, StageFailedError
from flowspec_edge.manifest import (
    ATTENTION_BIAS,
    ATTENTION_PADDING,
    HIDDEN_OUT,
    PAST_KEY,
    PAST_VALUE,
    POSITION_IDS,
    PRESENT_KEY,
    PRESENT_VALUE,
    SEQLENS_K,
    SESSION_SETTINGS,
    TOTAL_LENGTH,
)

Floats = NDArray[np.float32]

MASKED = np.float32(-10000.0)
"""Added to the score of a row that may not be seen; exp() of it is exactly 0 in float32."""


def load_graph(path: Path, num_threads: int) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU.

    Raises:
        BundleError: the file is not a graph that this ONNX Runtime can run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Spinning threads of one stage would take the cores from its neighbours on the same device.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for setting in SESSION_SETTINGS:
        options.add_session_config_entry(*setting)
    try:
        with on_huge_pages(), frugal_allocation():
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as cause:  # ONNX Runtime raises its own types, none of them exported
        raise BundleError(f"{path}: not a graph that ONNX Runtime {ort.__version__} can load ({cause})") from cause


class KvCache:
    """Keys and values of some layers, in one array that the graphs update in place.

    The array has room for all slots of the session's limit, but takes memory only for pages that were written to. With
    huge pages, which NumPy asks for, the first row would take nearly all of it.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, capacity: int, head_dim: int) -> None:
        # Rows of padding take slots behind those in use.
        shape = (2 * num_layers, 1, num_kv_heads, capacity + MAX_ATTENTION_PADDING, head_dim)
        self._stack: Floats = _zeros_on_small_pages(shape)  # [2 layers, 1, kv_heads, capacity, head_dim]
        self.values = [as_ort_value(layer) for layer in self._stack]

    @property
    def num_slots(self) -> int:
        return int(self._stack.shape[3])

    @property
    def num_bytes(self) -> int:
        return self._stack.nbytes

    def move(self, moves: Sequence[SlotMove]) -> None:
        """Close the gaps that dropped rows left."""
        for source, target, length in moves:
            self._stack[:, :, :, target : target + length] = self._stack[:, :, :, source : source + length]

    def gather(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy single slots. All sources are read before any target is written."""
        if sources:
            self._stack[:, :, :, targets] = self._stack[:, :, :, sources]


def _zeros_on_small_pages(shape: tuple[int, ...]) -> Floats:
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


class StepInputs:
    """The inputs that each forward of a session needs besides its rows, with the padding that attention needs.

    ``numbers``, by the graphs' input names, are changed in place, so that a session binds them once.
    """

    def __init__(self, min_rows: int) -> None:
        self.min_rows = min_rows
        self._padding, self._last, self._total = np.zeros(2, np.int64), np.zeros(1, np.int32), np.zeros((), np.int32)
        self.numbers = {
            ATTENTION_PADDING: as_ort_value(self._padding),
            SEQLENS_K: as_ort_value(self._last),
            TOTAL_LENGTH: as_ort_value(self._total),
        }

    def set(self, mask: NDArray[np.bool_], positions: NDArray[np.int64]) -> dict[str, ort.OrtValue]:
        """Set the numbers for a forward, and return its further inputs, which are to be bound for this forward alone.

        ``mask`` [rows, total] says which slots a row sees, and ``positions`` are [rows].
        """
        rows, total = mask.shape
        num_padding = attention_padding(rows, total)
        if num_padding:  # a row of padding sees itself alone
            padded = np.zeros((rows + num_padding, total + num_padding), np.bool_)
            padded[:rows, :total] = mask
            padded[rows:, total:] = np.eye(num_padding, dtype=np.bool_)
            mask, total = padded, total + num_padding
            positions = np.concatenate([positions, np.zeros(num_padding, np.int64)])
        self._padding[1] = rows + num_padding - max(rows, self.min_rows)
        self._last[0], self._total[()] = total - 1, total
        bias = np.where(mask, np.float32(0.0), MASKED)
        return {ATTENTION_BIAS: as_ort_value(bias[None, None]), POSITION_IDS: as_ort_value(positions[None])}


def as_ort_value(array: NDArray[Any]) -> ort.OrtValue:
    """A view of ``array`` for ONNX Runtime.

    Raises:
        StageFailedError: the array has gaps. ONNX Runtime would silently copy it, and updates in place would be lost.
    """
    if not array.flags.c_contiguous:
        raise StageFailedError(
            f"an array of shape {array.shape} has gaps; only contiguous memory can be bound in place"
        )
    return ort.OrtValue.ortvalue_from_numpy(array)


def pad_rows(rows: Floats, min_rows: int) -> Floats:
    """``rows`` as [1, rows, width], with zeros added so that there are at least ``min_rows``."""
    if len(rows) < min_rows:
        rows = np.concatenate([rows, np.zeros((min_rows - len(rows), rows.shape[1]), np.float32)])
    return np.ascontiguousarray(rows, np.float32)[None]


class HiddenRows:
    """Rows on their way through a chain of graphs, [1, rows, width].

    Each graph writes to the buffer from which the next one reads, so nothing is copied. The rows given at the start are
    never written to.
    """

    def __init__(self, rows: Floats, min_rows: int) -> None:
        given = pad_rows(rows, min_rows)
        self._buffers = given, np.empty_like(given), np.empty_like(given)
        self._values = [as_ort_value(buffer) for buffer in self._buffers]
        self._from, self._to = 0, 1

    @property
    def array(self) -> Floats:
        """The rows that the last graph wrote. They are overwritten by the graph after the next one."""
        return self._buffers[self._from]

    @property
    def source(self) -> ort.OrtValue:
        return self._values[self._from]

    @property
    def target(self) -> ort.OrtValue:
        return self._values[self._to]

    def advance(self) -> None:
        """Make the target, which a graph has written, the source of the next graph."""
        self._from, self._to = self._to, 3 - self._to


class CachedGraph:
    """A graph over layers ``[start, stop)`` whose cache is bound in place."""

    def __init__(self, path: Path, start: int, stop: int, num_threads: int) -> None:
        self._session = load_graph(path, num_threads)
        self._layers = range(start, stop)

    def bind(self, caches: Sequence[ort.OrtValue], inputs: dict[str, ort.OrtValue]) -> ort.IOBinding:
        """Bind what stays the same during a session.

        ``caches`` has keys and values of each layer in turn; ``inputs`` are rotary tables and a step's numbers by name.
        """
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for index, layer in enumerate(self._layers):
            for offset, (past, present) in enumerate(((PAST_KEY, PRESENT_KEY), (PAST_VALUE, PRESENT_VALUE))):
                binding.bind_ortvalue_input(f"{past}.{layer}", caches[2 * index + offset])
                binding.bind_ortvalue_output(f"{present}.{layer}", caches[2 * index + offset])
        return binding

    def bind_step(self, binding: ort.IOBinding, inputs: dict[str, ort.OrtValue], hidden_out: ort.OrtValue) -> None:
        """Bind what changes with each forward: its further inputs, and the rows that it writes."""
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(HIDDEN_OUT, hidden_out)

    def run_bound(self, binding: ort.IOBinding) -> None:
        """Run the graph. Raises StageFailedError where ONNX Runtime refuses."""
        try:
            self._session.run_with_iobinding(binding)
        except Exception as cause:  # ONNX Runtime raises its own types, none of them exported
            raise StageFailedError(f"layers [{self._layers.start}, {self._layers.stop}) failed: {cause}") from cause
