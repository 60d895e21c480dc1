"""ONNX Runtime sessions: the parts that stages and drafters share. Every graph with a cache updates it in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from flowspec_edge.engine.huge_pages import on_huge_pages
from flowspec_edge.engine.memory import frugal_allocation
from flowspec_edge.errors import BundleError, StageFailedError
from flowspec_edge.manifest import (
    HIDDEN_OUT,
    PAST_KEY,
    PAST_VALUE,
    PRESENT_KEY,
    PRESENT_VALUE,
    ROUNDS_CACHE,
    SESSION_SETTINGS,
)

Floats = NDArray[np.float32]


def load_graph(path: Path, num_threads: int, *, rounds_cache: bool = False) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU. One that ``rounds_cache`` writes to a cache only what float16 can tell.

    Raises:
        BundleError: the file is not a graph that this ONNX Runtime can run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # A session's own arena would keep what its largest chunk needed, once for each layer: the C library's heap serves
    # one layer after the other. And of each shape of inputs it would keep a plan, 4 KB for each pair of rows and slots.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    # Spinning threads of one stage would take the cores from its neighbours on the same device.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for setting in SESSION_SETTINGS:
        options.add_session_config_entry(*setting)
    try:
        model = _set_to_round(path.read_bytes()) if rounds_cache else str(path)
        with on_huge_pages(), frugal_allocation():
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as cause:  # ONNX Runtime raises its own types, none of them exported
        raise BundleError(f"{path}: not a graph that ONNX Runtime {ort.__version__} can load ({cause})") from cause


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


def _set_to_round(model: bytes) -> bytes:
    """Set the constant ROUNDS_CACHE of a graph: ONNX Runtime has no way to do so while it loads one.

    In protobuf, where the fields of a tensor are in the order of their numbers, its name (8) is followed by its data
    (9), of one byte.
    """
    name = ROUNDS_CACHE.encode()
    before = bytes([8 << 3 | 2, len(name)]) + name + bytes([9 << 3 | 2, 1])
    if model.count(before + b"\0") != 1:
        raise ValueError(f"no constant {ROUNDS_CACHE}, so it cannot have a cache in float16")
    return model.replace(before + b"\0", before + b"\1")


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
    """A graph over layers ``[start, stop)`` whose cache is bound in place.

    A row has the same bits in all chunks that have a multiple of ``row_multiple`` rows; 0 stands for no such number,
    and None until the block has been asked.
    """

    def __init__(self, path: Path, start: int, stop: int, num_threads: int, *, rounds_cache: bool = False) -> None:
        self.num_threads = num_threads
        self.row_multiple: int | None = None
        self._session = load_graph(path, num_threads, rounds_cache=rounds_cache)
        self._layers = range(start, stop)

    def bind(self, caches: Sequence[ort.OrtValue], inputs: dict[str, ort.OrtValue]) -> ort.IOBinding:
        """Bind what stays the same during a session.

        ``caches`` has keys and values of each layer in turn; ``inputs`` are others that stay, by name.
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
