"""Layer curves: what one layer takes this board, as a line over the rows of a chunk; measured once, and kept.

A curve is measured with a few of the model's own layers, and kept by everything that it depends on: the shape of a
layer, precision, threads, runtime. A node that has no layers yet learns it from the first forwards that it runs. One
that was measured while the board was busy is corrected by forwards that are quicker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.device.throttling import MAX_SLOWDOWN, StepWatch
from flowspec_edge.core.line import Line, LineFit, fit_line
from flowspec_edge.core.planning.placement import stage_memory_bytes
from flowspec_edge.engine.timing import RUNTIME, StageUnderTest
from flowspec_edge.errors import StateError
from flowspec_edge.files import read_private, state_directory, write_private
from flowspec_edge.manifest import Manifest
from flowspec_edge.node.board import Thermometer
from flowspec_edge.weights.file_locks import EXCLUSIVE, locked

MAX_BLOCKS = 4
"""So many blocks are measured together: a single one of a small model drowns in what a run costs by itself."""
LAYER_SIZES = (1, 4, 16, 64)
SIZE_LIMIT_S = 1.5
"""Time for each size: a slow board runs fewer repeats."""
TURN_NAME = "measuring.lock"
LEARN_FORWARDS = 20
"""Forwards from which a curve can be learned; chunks of several sizes are among them."""

_log = logging.getLogger(__name__)


class Measurements:
    """A node's curves, in its state directory, and how far its board is from them at present. ``rests`` tells how many
    times as long it takes because it rests.
    """

    def __init__(
        self, num_threads: int, thermometer: Thermometer | None = None, rests: Callable[[], float] = lambda: 1.0
    ) -> None:
        self._num_threads = num_threads
        self._thermometer, self._rests = thermometer, rests
        self._busy = asyncio.Lock()
        self._recorder: StageRecorder | None = None  # of the last stage that began

    async def slowdown(self) -> float:
        """How many times its curve this board takes at present; one that was too slow for long is corrected."""
        if self._recorder is not None:
            await self._recorder.correct()
        watch = self._recorder.watch if self._recorder is not None else StepWatch()
        thermal = await asyncio.to_thread(self._thermometer) if self._thermometer is not None else None
        slowdown = watch.slowdown(time.monotonic(), thermal) * self._rests()
        return min(slowdown, MAX_SLOWDOWN)

    def kept(self, manifest: Manifest, precision: str) -> Line | None:
        """The curve of one layer of this model, where it is known. A file that cannot be read is as good as none."""
        try:
            text = read_private(self._path(manifest, precision))
            found = json.loads(text) if text is not None else None
            line = Line(float(found["fixed_ms"]), float(found["row_ms"])) if found is not None else None
        except (StateError, ValueError, KeyError, TypeError) as cause:
            _log.warning("a kept layer curve is not used: %s", cause)
            return None
        return line if line is not None and line.at(1) > 0 and min(line.fixed, line.per_row) >= 0 else None

    async def curve(self, bundle: Bundle, precision: str, free_bytes: int) -> Line:
        """The curve of one layer, measured where it is not known; that takes some seconds, once."""
        async with self._busy:
            line = self.kept(bundle.manifest, precision)
            if line is None:
                line = await asyncio.to_thread(self._measure_in_turn, bundle, precision, free_bytes)
        return line

    def keep(self, manifest: Manifest, precision: str, line: Line, how: str) -> None:
        """For the next time; a full disk is no reason not to go on now."""
        found: dict[str, float | str] = {"fixed_ms": line.fixed, "row_ms": line.per_row, "model": manifest.name}
        found |= {"precision": precision, "how": how, "date": time.strftime("%Y-%m-%d")}
        try:
            write_private(self._path(manifest, precision), json.dumps(found) + "\n")
        except StateError as cause:
            _log.warning("a layer curve is not kept: %s", cause)

    def recorder(self, manifest: Manifest, precision: str | None, num_layers: int) -> StageRecorder:
        """Takes in the forwards of a stage that begins."""
        precision = precision or manifest.precision
        line = self.kept(manifest, precision)
        self._recorder = StageRecorder(self, manifest, precision, num_layers, line)
        return self._recorder

    def _measure_in_turn(self, bundle: Bundle, precision: str, free_bytes: int) -> Line:
        """Measure while no other node of this machine does, which would take its share of the cores. Who has waited for
        another one finds what that has measured.
        """
        with contextlib.ExitStack() as turn:
            with contextlib.suppress(OSError, StateError):  # a full disk is no reason not to go on
                path = state_directory() / TURN_NAME
                path.touch(mode=0o600)
                turn.enter_context(locked(path, EXCLUSIVE, waits=True))
            line = self.kept(bundle.manifest, precision)
            if line is None:
                line = self._measure(bundle, precision, free_bytes)
                self.keep(bundle.manifest, precision, line, "measured")
        return line

    def _measure(self, bundle: Bundle, precision: str, free_bytes: int) -> Line:
        blocks = bundle.manifest.blocks_of(0, bundle.manifest.geometry.num_layers, precision)[:MAX_BLOCKS]
        while len(blocks) > 1 and stage_memory_bytes(blocks) > free_bytes:
            blocks = blocks[:-1]
        num_layers = blocks[-1].stop
        _log.info("measuring %d layers of %s in %s", num_layers, bundle.manifest.name, precision)
        stage = StageUnderTest(bundle.directory, bundle.manifest, 0, num_layers, self._num_threads, precision)
        with contextlib.closing(stage):
            times = [stage.time_ms(size, SIZE_LIMIT_S) for size in LAYER_SIZES]
        return fit_line(LAYER_SIZES, times).scaled(1 / num_layers)

    def _path(self, manifest: Manifest, precision: str) -> Path:
        shape = manifest.geometry
        sizes = (shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        what = (manifest.architecture, precision, *sizes, self._num_threads, RUNTIME, platform.machine())
        return state_directory() / "curves" / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


def _no_rest() -> float:
    return 0.0


@dataclass(slots=True)
class StageRecorder:
    """One stage's forwards: held against the known curve, which is corrected where they are much quicker, or learned
    from where there is none. ``rested_s`` tells how much of the last one was rest.
    """

    measurements: Measurements
    manifest: Manifest
    precision: str
    num_layers: int
    line: Line | None
    watch: StepWatch = field(default_factory=StepWatch)
    rested_s: Callable[[], float] = _no_rest
    _fit: LineFit = field(default_factory=LineFit)
    _sizes: set[int] = field(default_factory=set)
    _num_forwards: int = 0

    def add(self, num_rows: int, ran_s: float) -> None:
        """A forward that was not given up."""
        ran_s = max(ran_s - self.rested_s(), 0.0)
        if self.line is not None:
            self.watch.observe(self.line.at(num_rows) * self.num_layers, ran_s * 1000, time.monotonic())
            return
        self._num_forwards += 1
        self._sizes.add(num_rows)
        self._fit.add(num_rows, ran_s * 1000 / self.num_layers)

    async def correct(self) -> None:
        """Keep a quicker curve where the known one has been too slow for long."""
        if self.line is not None and (share := self.watch.quick_share) is not None:
            self.line, self.watch = self.line.scaled(share), StepWatch()
            await self._keep(self.line, "corrected")

    async def finish(self) -> None:
        """The stage has ended: keep what was learned."""
        self.rested_s = _no_rest  # it holds the stage, and this is held until another one begins
        await self.correct()
        if self._num_forwards >= LEARN_FORWARDS and len(self._sizes) > 1:
            await self._keep(self._fit.line, "learned")

    async def _keep(self, line: Line, how: str) -> None:
        await asyncio.to_thread(self.measurements.keep, self.manifest, self.precision, line, how)
