"""A node stands by for an origin: it loads layers of boards that may be lost, when nothing else runs, and keeps them.

They stand by as long as the control link on which they were asked for, and give way to every stage that needs their
memory. A stage that is opened over them takes them as they are (``kept_layers.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from flowspec_edge.core import wire
from flowspec_edge.core.planning.placement import mib, standby_memory_bytes
from flowspec_edge.errors import FlowspecError, LinkLostError, ProtocolError, StageFailedError
from flowspec_edge.net.connection import Link
from flowspec_edge.node.kept_layers import LoadedStage
from flowspec_edge.node.layer_loading import digests_of, load_runner, requested
from flowspec_edge.node.stage_opening import StageOpener
from flowspec_edge.tasks import in_thread
from flowspec_edge.weights.supply import FetchProgress

QUIET_S = 2.0
"""Layers are loaded when the node has computed nothing for so long: texts of one user follow each other sooner."""
FETCH_BYTES_PER_S = 8 * 2**20
"""Half of what Wi-Fi brings to a board (150 Mbit/s), for others may use it."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


async def stand_by(node: StageOpener, control: Link, request: wire.PrepareLayers) -> None:
    """Until the origin closes the control link; ``request`` is the first that came on it.

    Raises:
        LinkLostError: the link was lost.
        ProtocolError: the origin broke the rules.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="standby")
    standing_by = _StandingBy(node, control, executor)
    try:
        standing_by.prepare(request)
        async for message in control:
            match message:
                case wire.PrepareLayers():
                    standing_by.prepare(message)
                case wire.CancelPreparing():
                    standing_by.cancel()
                case _:
                    raise ProtocolError(f"peer {control.peer}: {type(message).__name__} came where layers stand by")
    finally:
        await standing_by.end()
        executor.shutdown(wait=False, cancel_futures=True)


@dataclass(slots=True)
class _StandingBy:
    """The layers that stand by for one origin, and those that are being prepared."""

    node: StageOpener
    control: Link
    executor: ThreadPoolExecutor
    _ranges: dict[LoadedStage, tuple[int, int]] = field(default_factory=dict)
    _preparing: asyncio.Task[None] | None = None

    async def end(self) -> None:
        self.cancel()
        if self._preparing is not None:
            await asyncio.wait({self._preparing})
        self.node.kept.end_standbys(self._ranges)

    def prepare(self, request: wire.PrepareLayers) -> None:
        if self._preparing is not None and not self._preparing.done():
            raise ProtocolError(f"peer {self.control.peer}: PrepareLayers came before the last one was answered")
        self._preparing = asyncio.create_task(self._answer(request), name=f"standby for {self.control.peer}")
        self._preparing.add_done_callback(self._answer_cancelled)  # it may not even have begun

    def cancel(self) -> None:
        if self._preparing is not None:
            self._preparing.cancel()

    async def _answer(self, request: wire.PrepareLayers) -> None:
        """Prepare, and say what came of it."""
        named = f"layers [{request.start}, {request.stop})"
        try:
            self._say(await self._load(request))
        except FlowspecError as cause:
            self._say(wire.StageFailure(f"{named} cannot stand by: {cause}"))
        except Exception as cause:  # a bug; the origin is not to wait for what will not come
            _log.exception("%s cannot stand by", named)
            self._say(wire.StageFailure(f"failed, which is a bug in flowspec-edge ({type(cause).__name__})"))

    def _answer_cancelled(self, preparing: asyncio.Task[None]) -> None:
        if preparing.cancelled():
            self._say(wire.StageFailure("the layers are not prepared: that was cancelled"))

    def _say(self, message: wire.Message) -> None:
        with contextlib.suppress(LinkLostError, ProtocolError):  # whoever reads the link ends this
            self.control.send(message)

    async def _load(self, request: wire.PrepareLayers) -> wire.LayersPrepared:
        """Fetch what is missing, load it when the node is quiet, and have it stand by. What is being loaded is not
        given up.
        """
        node, num_fetched = self.node, 0

        def count(progress: FetchProgress) -> None:
            nonlocal num_fetched
            num_fetched = progress.num_bytes
            node.on_fetch(progress)

        wanted = replace(requested(request, node.precisions), max_bytes_per_s=FETCH_BYTES_PER_S)
        manifest = await node.supply.manifest(wanted)
        memory_bytes = standby_memory_bytes(manifest.blocks_of(wanted.start, wanted.stop, wanted.precision))
        self._check_room(memory_bytes)
        with contextlib.ExitStack() as files, contextlib.ExitStack() as taking:
            taken = node.kept.loaded(digests_of(wanted, manifest))
            taking.callback(node.kept.free, taken)
            if memory_bytes > self._free_bytes - node.kept.kept_bytes:
                node.kept.drop()
                await node.kept.freed()
            bundle = await node.supply.stage(wanted, manifest, files, count, loaded=taken.parts.keys())
            await node.activity.wait_quiet(QUIET_S)
            self._check_room(memory_bytes)
            began = time.monotonic()
            loading = in_thread(self.executor, load_runner, bundle, wanted, node.settings, taken.parts, node.caches)
            runner = await _to_the_end(loading)
        # The files are let go of: layers that only stand by are in no other stage's way on the disk either.
        stage = LoadedStage(bundle, runner, memory_bytes, contextlib.ExitStack())
        try:
            self._check_room(memory_bytes)  # a stage may have begun meanwhile
        except StageFailedError:
            node.kept.free(stage)
            raise
        self._ranges[stage] = request.start, request.stop
        node.kept.stand_by(stage, self._tell_gone)
        load_ms = round((time.monotonic() - began) * 1000)
        return wire.LayersPrepared(request.start, request.stop, memory_bytes, load_ms, num_fetched)

    @property
    def _free_bytes(self) -> int:
        """The memory that neither stages nor other standbys have."""
        return max(self.node.memory.free_bytes - self.node.kept.standby_bytes, 0)

    def _check_room(self, memory_bytes: int) -> None:
        """Raises StageFailedError where the memory is not free."""
        if memory_bytes > self._free_bytes:
            name = self.node.settings.name
            raise StageFailedError(f"node {name} has {mib(self._free_bytes)} free, and they need {mib(memory_bytes)}")

    def _tell_gone(self, stage: LoadedStage) -> None:
        self._say(wire.LayersGivenBack(*self._ranges.pop(stage)))


async def _to_the_end(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """What it returns, even where that is cancelled meanwhile: a thread that loads cannot be interrupted."""
    task = asyncio.ensure_future(coroutine)
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait({task})
    await asyncio.wait({task})
    return task.result()
