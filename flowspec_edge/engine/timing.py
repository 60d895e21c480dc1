"""Measures what layers, head and draft head cost on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime

from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import MAX_CHUNK_ROWS
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.drafters.eagle3 import load_drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.manifest import Manifest

RUNTIME = f"onnxruntime {onnxruntime.__version__}"
CHUNK_SIZES = (1, 2, 4, 8, 16, 32, 64)
NUM_PAST = 128
"""Rows in the cache before a chunk, as after a usual prompt."""
NUM_REPEATS = 15
"""Each time is the median of this many runs, so that single interruptions do not count."""
HEAD_ROWS = 16
SESSION = 1


class StageUnderTest:
    """Layers ``[start, stop)`` as one stage, with a prompt in its cache.

    Raises:
        BundleError: a file is missing or cannot be loaded.
    """

    def __init__(
        self, directory: Path, manifest: Manifest, start: int, stop: int, num_threads: int, precision: str | None = None
    ) -> None:
        self._stage = StageRunner(directory, manifest, start, stop, num_threads=num_threads, precision=precision)
        self._slots = KvSlots(NUM_PAST + MAX_CHUNK_ROWS)
        self._hidden: ev.Floats | None = None
        if start:
            random = np.random.default_rng(0)
            size = (NUM_PAST, manifest.geometry.hidden_size)
            self._hidden = random.standard_normal(size).astype(np.float32)  # [rows, hidden_size]
        self._stage.open_cache(SESSION, self._slots.capacity)
        self._run([Row(id, id - 1 if id else NO_PARENT, 1) for id in range(NUM_PAST)])

    def time_ms(self, num_rows: int, limit_s: float = 60.0) -> float:
        """Time a chunk of ``num_rows`` in a chain, which is forgotten afterwards. Takes about ``limit_s`` at most."""
        return median_ms(lambda: self._run_and_forget(num_rows), limit_s)

    def close(self) -> None:
        """Free what it took. Nothing can be timed any more."""
        self._stage.close()

    def _run_and_forget(self, num_rows: int) -> None:
        rows = [Row(id, id - 1, 1) for id in range(NUM_PAST, NUM_PAST + num_rows)]
        self._run(rows)
        self._slots.drop([row.id for row in rows])

    def _run(self, rows: list[Row]) -> None:
        hidden = None if self._hidden is None else self._hidden[: len(rows)]
        self._stage.run(ev.RunForward(SESSION, tuple(rows), hidden, self._slots.place(rows)))


def time_head_ms(head: Head, manifest: Manifest) -> float:
    """Time a run of the head over HEAD_ROWS rows."""
    rows = np.zeros((HEAD_ROWS, manifest.geometry.hidden_size), np.float32)
    return median_ms(lambda: head.logits(rows))


def time_draft_ms(
    directory: Path, manifest: Manifest, head: Head, num_rows: int, width: int, num_threads: int
) -> float:
    """Time a pass of the draft head over ``num_rows`` children of one verified row, each with ``width`` proposals."""
    entry = manifest.drafter
    assert entry is not None, "asked only of bundles with a draft head"
    drafter = load_drafter(directory, manifest, head, k=width, num_threads=num_threads)
    drafter.open(SESSION, NUM_PAST + num_rows)
    verified = tuple(Row(id, id - 1, 1) for id in range(1, NUM_PAST))
    hidden = np.zeros((len(verified), max(len(entry.taps), 1) * manifest.geometry.hidden_size), np.float32)
    positions = np.arange(len(verified), dtype=np.int64)
    drafter.run(ev.RunDraft(SESSION, verified, positions, hidden, ()))
    children = tuple(Row(NUM_PAST + number, NUM_PAST - 1, number) for number in range(num_rows))
    job = ev.RunDraft(
        SESSION, children, np.full(num_rows, NUM_PAST - 1, np.int64), np.zeros((0, hidden.shape[1]), np.float32), ()
    )
    return median_ms(lambda: drafter.run(job))


def median_ms(run: Callable[[], object], limit_s: float = 60.0) -> float:
    """The median time of NUM_REPEATS runs, or of as many as begin within ``limit_s``."""
    run()  # the first run allocates
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < NUM_REPEATS and (not times or time.perf_counter() - started < limit_s):
        began = time.perf_counter()
        run()
        times.append((time.perf_counter() - began) * 1000)
    return median(times)
