"""How a node opens a stage for an origin: it gets the weights, loads the layers, connects, and hosts the stage then.

A stage lives as long as its control link. When that ends, however it ends, the stage does; its layers stay loaded for
a while (``kept_layers.py``), unless the stage failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.limits import TREE_MARGIN
from flowspec_edge.core.planning.placement import stage_memory_bytes
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.engine.arithmetic import arithmetic_of
from flowspec_edge.engine.kept_caches import KeptCaches
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    ProtocolError,
    StageFailedError,
    release_frames,
)
from flowspec_edge.files import open_record, records_text
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import OPENING, open_link
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.arrivals import Arrivals
from flowspec_edge.node.curves import Measurements, StageRecorder
from flowspec_edge.node.kept_layers import KeptLayers, LoadedStage, TakenParts
from flowspec_edge.node.layer_loading import digests_of, load_runner, requested
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.precision_choice import PrecisionChoice
from flowspec_edge.node.resources import MemoryAccount, NodeSettings, OpenStages
from flowspec_edge.node.resting import RestingRunner
from flowspec_edge.node.sensor_watch import SensorWatch
from flowspec_edge.node.stage_host import StageHost, StageLinks
from flowspec_edge.tasks import in_thread, run_until_first_ends
from flowspec_edge.weights.supply import FetchProgress, OnFetch, StageRequest, WeightSupply

PROGRESS_S = 0.25
"""How often an origin is told how far a fetch is: as often as a display needs."""
FAILURE_S = 2.0
"""How long a failed stage keeps its data links open for the origin to end the ring."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOpener:
    """Opens stages, and hosts them, with what a node has for all of them."""

    settings: NodeSettings
    precisions: PrecisionChoice
    open_stages: OpenStages
    memory: MemoryAccount
    arrivals: Arrivals
    kept: KeptLayers
    caches: KeptCaches
    measurements: Measurements
    supply: WeightSupply
    board: Board
    watch: SensorWatch
    activity: Activity
    on_fetch: OnFetch

    async def serve(self, control: Link, request: wire.OpenStage) -> None:
        """Until the origin closes the control link. Whatever else ends the stage is told to the origin."""
        executor = ThreadPoolExecutor(1, thread_name_prefix=f"stage {request.start}")
        try:
            async with contextlib.AsyncExitStack() as held:
                held.callback(executor.shutdown, wait=False, cancel_futures=True)
                try:
                    held.enter_context(self.open_stages.admit(control.peer))
                    await _Opening(self, control, request, executor, held).serve()
                except FlowspecError as cause:
                    await _report(control, cause)
                    raise
                except Exception as cause:  # a bug; the origin is not to wait for what will not come
                    _log.exception("the stage of layers [%d, %d) has failed", request.start, request.stop)
                    failure = StageFailedError(
                        f"failed, which is a bug in flowspec-edge ({type(cause).__name__}: {str(cause)[:500]}); the "
                        f"log of {self.settings.name} has the details"
                    )
                    await _report(control, failure)
                    raise failure.again() from cause
        except FlowspecError as told:  # the origin has been told
            release_frames(told)


@dataclass(frozen=True, slots=True)
class _Opening:
    """One stage, from the origin's request to its end. ``held`` holds what it takes, and lets go of it in the end."""

    node: StageOpener
    control: Link
    request: wire.OpenStage
    executor: ThreadPoolExecutor
    held: contextlib.AsyncExitStack

    async def serve(self) -> None:
        request, board = self.request, self.node.board
        self.held.enter_context(self.node.arrivals.expect(f"{request.ring}/{request.hop}"))
        stage, load_ms, fetched_bytes = await self._load()
        manifest, runner = stage.bundle.manifest, board.pace(stage.runner, request.hop)
        recorder = self._recorder(stage)
        if (watch := self.node.watch).caps:
            runner = resting = RestingRunner(runner, lambda: watch.duty)
            if recorder is not None:
                recorder.rested_s = lambda: resting.rested_s
        ahead = await self._connect_ahead()
        arithmetic = arithmetic_of(self._precision or manifest.precision)
        if request.row_kind != "float32":
            arithmetic += f", rows rounded to {request.row_kind} behind layer {request.stop - 1}"
        self.control.send(wire.StageOpened(request.ring, stage.memory_bytes, load_ms, fetched_bytes, arithmetic))
        behind = await self._take_behind()
        geometry = manifest.geometry
        itself: dict[str, Any] = {
            "is_last": request.stop == geometry.num_layers,
            "embeds": request.start == 0,
            "vocab_size": geometry.vocab_size,
            "hidden_size": geometry.hidden_size,
        }
        host = StageHost(
            Stage(**itself),
            Journal("stage", itself, open_record("stage"), has_text=records_text()),
            runner,
            StageLinks(self.control, behind, ahead),
            board,
            self.executor,
            max_capacity=geometry.max_context + TREE_MARGIN,
            row_kind=request.row_kind,
            activity=self.node.activity,
            recorder=recorder,
            energy=watch.energy,
        )
        self.held.push_async_callback(host.refuse_offender)
        async with host:
            await host.wait_ended()

    async def _load(self) -> tuple[LoadedStage, int, int]:
        """The stage, of parts that are loaded already and others; how many ms that took, and the bytes fetched."""
        node, report = self.node, _FetchReport(self.control, self.node.on_fetch)
        wanted = requested(self.request, node.precisions)
        with contextlib.ExitStack() as files, contextlib.ExitStack() as taking:
            supplied = self._supply(wanted, files, taking, report)
            bundle, taken, memory_bytes = await _unless_left(
                self.control, supplied, "the weights of its stage were here"
            )
            began = time.monotonic()
            loading = in_thread(self.executor, load_runner, bundle, wanted, node.settings, taken.parts, node.caches)
            runner = await loading
            stage = LoadedStage(bundle, runner, memory_bytes, files.pop_all())
        await self.held.enter_async_context(stage_in_use(node.kept, stage, self.control, self.executor))
        return stage, round((time.monotonic() - began) * 1000), report.num_bytes

    async def _supply(
        self, wanted: StageRequest, files: contextlib.ExitStack, taking: contextlib.ExitStack, report: _FetchReport
    ) -> tuple[Bundle, TakenParts, int]:
        """The weights, fetched where they are missing and held by ``files``; what is loaded of them already, until
        ``taking`` is closed; and the memory reserved for the stage.
        """
        node = self.node
        manifest = await node.supply.manifest(wanted)
        taken = await node.kept.take(digests_of(wanted, manifest))
        taking.callback(node.kept.free, taken)
        self.held.enter_context(node.kept.using(self.control))
        memory_bytes = stage_memory_bytes(manifest.blocks_of(wanted.start, wanted.stop, wanted.precision))
        self.held.enter_context(node.memory.reserve(self.control, memory_bytes))
        node.kept.make_room(node.memory.free_bytes)
        await node.kept.freed()
        bundle = await node.supply.stage(wanted, manifest, files, report.tell, loaded=taken.parts.keys())
        return bundle, taken, memory_bytes

    @property
    def _precision(self) -> str | None:
        return self.node.precisions.of(self.request.bundle, self.request.precision)

    def _recorder(self, stage: LoadedStage) -> StageRecorder | None:
        if not self.node.board.is_measured:
            return None
        num_layers = self.request.stop - self.request.start
        recorder = self.node.measurements.recorder(stage.bundle.manifest, self._precision, num_layers)
        self.held.push_async_callback(recorder.finish)
        return recorder

    async def _connect_ahead(self) -> Link:
        request, settings = self.request, self.node.settings
        try:
            ahead, _ = await open_link(
                request.next_host,
                request.next_port,
                settings.hello(wire.DATA, f"{request.ring}/{request.hop + 1}"),
                node=request.next_node,
                credentials=settings.credentials,
                timeouts=OPENING,
            )
        except NodeUnavailableError as cause:
            raise LinkLostError(str(cause), neighbour=request.next_node) from cause
        self.held.push_async_callback(ahead.close)
        self.held.callback(self._let_go, ahead)
        return ahead

    async def _take_behind(self) -> Link:
        """The node before may still be fetching; the origin knows how long to wait for it, and leaves if it must."""
        behind = self.node.arrivals.data_link(f"{self.request.ring}/{self.request.hop}", is_limited=False)
        link = await _unless_left(
            self.control, self.held.enter_async_context(behind), "the data link to its stage was open"
        )
        self.held.callback(self._let_go, link)
        return link

    def _let_go(self, link: Link) -> None:
        """Where the origin has left, nobody needs the data links. A neighbour that was lost would not answer a goodbye,
        and whoever asks for the layers next would wait for that."""
        if not self.control.is_open:
            link.abort()


@dataclass(slots=True)
class _FetchReport:
    """Tells the origin and this node's user how far a fetch is. ``num_bytes`` have come."""

    control: Link
    on_fetch: OnFetch
    num_bytes: int = 0
    told_at: float = 0.0

    def tell(self, progress: FetchProgress) -> None:
        self.on_fetch(progress)
        self.num_bytes = progress.num_bytes
        now = time.monotonic()
        is_due = progress.report is not None or now - self.told_at >= PROGRESS_S
        if is_due and self.control.is_open:
            self.told_at = now
            self.control.send(wire.StageProgress(self.control.hello.ring, progress.num_bytes, progress.total_bytes))


@contextlib.asynccontextmanager
async def stage_in_use(
    kept: KeptLayers, stage: LoadedStage, control: Link, executor: ThreadPoolExecutor
) -> AsyncIterator[None]:
    """A stage that a ring uses. Afterwards it is kept for the next one, unless it failed; then it is freed at once.

    A peer that was lost or broke the rules is no failure of the stage. Where the end is cancelled, it is freed too.
    """
    is_sound = False
    with contextlib.ExitStack() as lost:
        lost.callback(kept.free, stage)
        try:
            yield
            is_sound = True
        except (LinkLostError, ProtocolError):
            is_sound = True
            raise
        finally:
            await in_thread(executor, stage.runner.free_caches)  # behind the last forward
            if is_sound:
                lost.pop_all()
                kept.keep(stage, control)


async def _report(control: Link, cause: FlowspecError) -> None:
    """Tell the origin, and give it time to end the ring: data links that close first put the blame on this node."""
    _log.log(logging.WARNING if isinstance(cause, ProtocolError) else logging.INFO, "%s", cause)
    if control.is_open:
        neighbour = cause.neighbour if isinstance(cause, LinkLostError) else ""
        control.send(wire.StageFailure(str(cause), neighbour))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAILURE_S):
                await control.wait_closed()


async def _unless_left(control: Link, coroutine: Coroutine[Any, Any, _T], what: str) -> _T:
    """What ``coroutine`` returns. An origin that leaves before that ends it, and that is a LinkLostError."""
    returned: list[_T] = []

    async def run() -> None:
        returned.append(await coroutine)

    async def watch() -> None:
        await control.wait_closed()
        raise LinkLostError(f"peer {control.peer}: left before {what}")

    await run_until_first_ends(run(), watch())
    return returned[0]
