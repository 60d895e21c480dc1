"""One stage on a node, for one ring: from its opening over the control link to the end of that link."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.limits import TREE_MARGIN
from flowspec_edge.core.planning.placement import stage_memory_bytes
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import FlowspecError, LinkLostError, ProtocolError
from flowspec_edge.net.link import Link, open_link
from flowspec_edge.node.kept_stage import Key, LoadedStage
from flowspec_edge.node.measuring import StageRecorder, answer_measuring
from flowspec_edge.tasks import run_until_first_ends
from flowspec_edge.weights.supply import FetchProgress, StageRequest

if TYPE_CHECKING:
    from flowspec_edge.node.node import Node, Runner

PROGRESS_S = 0.25
"""How often an origin is told how far a fetch is: as often as a display needs."""
FAILURE_S = 2.0
"""How long a failed stage keeps its data links open for the origin to end the ring."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class StageHost:
    """One stage for one ring, from the control link's opening to its end."""

    node: Node
    control: Link
    _ahead: Link = field(init=False)
    _behind: Link = field(init=False)
    _runner: Runner = field(init=False)
    _core: Stage = field(init=False)
    _max_capacity: int = field(init=False)
    _sessions: set[int] = field(default_factory=set)  # that have a cache here
    _is_sound: bool = False  # whether the runner may be used again
    _executor: ThreadPoolExecutor = field(init=False)
    _forwards: asyncio.Queue[tuple[ev.RunForward, threading.Event]] = field(default_factory=asyncio.Queue)
    _cancelled: threading.Event = field(default_factory=threading.Event)  # of the newest forward, which has its own
    _num_sent: int = 0
    _recorder: StageRecorder | None = None
    _fetched_bytes: int = 0
    _told_at: float = 0.0

    async def run(self) -> None:
        """Serve until the origin closes the control link. Whatever else ends the stage is told to the origin."""
        request = await answer_measuring(self.node, self.control)
        if request is None:  # a peer that only wanted to be welcomed, or to measure
            return
        if not isinstance(request, wire.OpenStage):
            raise ProtocolError(f"peer {self.control.peer}: {type(request).__name__} came where OpenStage was expected")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"stage {request.start}")
        try:
            async with contextlib.AsyncExitStack() as links:
                try:
                    await self._serve(request, links)
                    self._is_sound = True
                except FlowspecError as cause:
                    self._is_sound = isinstance(cause, LinkLostError | ProtocolError)  # others failed
                    await self._report(cause)
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)

    async def _report(self, cause: FlowspecError) -> None:
        """Tell the origin, and give it time to end the ring: data links that close first would put the blame on this node."""
        _log.info("%s", cause)
        if self.control.is_open:
            self.control.send(wire.StageFailure(str(cause)))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FAILURE_S):
                    await self.control.wait_closed()

    async def _serve(self, request: wire.OpenStage, links: contextlib.AsyncExitStack) -> None:
        """Take the stage if it is still loaded, or load it; afterwards it stays for whoever comes next."""
        links.enter_context(self.node.expect(f"{request.ring}/{request.hop}"))
        key = (request.bundle, request.start, request.stop, self._precision_of(request) or "")
        began = time.monotonic()
        stage = await self.node.kept.take(key)
        links.enter_context(self.node.kept.using(self.control))
        if stage is not None:
            links.enter_context(self.node.reserve(self.control, stage.memory_bytes))
        else:
            files = links.enter_context(contextlib.ExitStack())
            bundle, memory_bytes = await self._supplied(request, files, links)
            began = time.monotonic()
            runner = await self._in_thread(self._load, bundle, request)
            stage = LoadedStage(bundle, runner, memory_bytes, files.pop_all())
        links.push_async_callback(self._lay_down, key, stage)
        load_ms = round((time.monotonic() - began) * 1000)
        geometry = stage.bundle.manifest.geometry
        self._core = Stage(is_last=request.stop == geometry.num_layers)
        self._max_capacity = geometry.max_context + TREE_MARGIN
        self._runner = self.node.board.pace(stage.runner, request.hop)
        if self.node.board.is_measured:
            precision, num_layers = self._precision_of(request), request.stop - request.start
            self._recorder = self.node.measurements.recorder(stage.bundle.manifest, precision, num_layers)
            links.push_async_callback(self._recorder.finish)
        self._ahead, _ = await open_link(
            request.next_host,
            request.next_port,
            self.node.hello(wire.DATA, f"{request.ring}/{request.hop + 1}"),
            node=request.next_node,
            credentials=self.node.settings.credentials,
        )
        links.push_async_callback(self._ahead.close)
        self.control.send(wire.StageOpened(request.ring, stage.memory_bytes, load_ms, self._fetched_bytes))
        await run_until_first_ends(self._read_control(), self._work(f"{request.ring}/{request.hop}", links))

    def _precision_of(self, request: wire.OpenStage) -> str | None:
        return self.node.precision_of(request.bundle, request.precision)

    async def _lay_down(self, key: Key, stage: LoadedStage) -> None:
        """The stage has ended: keep it, unless it failed."""
        self._cancelled.set()

        def free_caches() -> None:  # behind the last forward
            for session in self._sessions:
                stage.runner.free_cache(session)

        with contextlib.ExitStack() as lost:  # as it is also where this is cancelled
            lost.callback(stage.close)
            await self._in_thread(free_caches)
            if self._is_sound:
                lost.pop_all()
                self.node.kept.keep(key, stage, self.control)

    async def _in_thread(self, function: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def _supplied(
        self, request: wire.OpenStage, files: contextlib.ExitStack, links: contextlib.AsyncExitStack
    ) -> tuple[Bundle, int]:
        """The stage's weights, fetched where they are missing and held by ``files``, and the memory that is reserved for them.

        An origin that leaves meanwhile ends that.
        """
        sources = tuple(Source.from_text(text) for text in request.sources)
        precision = self._precision_of(request)
        wanted = StageRequest(request.bundle, request.start, request.stop, sources, precision)
        supply = self.node.supply
        supplied: list[tuple[Bundle, int]] = []

        async def gather() -> None:
            manifest = await supply.manifest(wanted)
            blocks = manifest.blocks_of(request.start, request.stop, precision)
            memory_bytes = stage_memory_bytes(blocks)
            links.enter_context(self.node.reserve(self.control, memory_bytes))
            bundle = await supply.stage(wanted, manifest, files, self._tell_progress)
            supplied.append((bundle, memory_bytes))

        async def watch() -> None:
            await self.control.wait_closed()
            raise LinkLostError(f"peer {self.control.peer}: left before the weights of its stage were here")

        await run_until_first_ends(gather(), watch())
        return supplied[0]

    def _tell_progress(self, progress: FetchProgress) -> None:
        self.node.on_fetch(progress)
        self._fetched_bytes = progress.num_bytes
        now = time.monotonic()
        is_due = progress.report is not None or now - self._told_at >= PROGRESS_S
        if is_due and self.control.is_open:
            self._told_at = now
            self.control.send(wire.StageProgress(self.control.hello.ring, progress.num_bytes, progress.total_bytes))

    async def _work(self, hop_behind: str, links: contextlib.AsyncExitStack) -> None:
        # The node before may still be fetching; the origin knows how long to wait for it, and ends the ring if it must.
        self._behind = await links.enter_async_context(self.node.data_link(hop_behind, None))
        await run_until_first_ends(self._read_chunks(), self._read_credits(), self._run_forwards())

    def _load(self, bundle: Bundle, request: wire.OpenStage) -> StageRunner:
        num_threads = self.node.settings.num_threads
        return StageRunner(
            bundle.directory,
            bundle.manifest,
            request.start,
            request.stop,
            num_threads=num_threads,
            precision=self._precision_of(request),
        )

    async def _read_control(self) -> None:
        async for message in self.control:
            match message:
                case wire.OpenSession(spec):
                    if spec.capacity > self._max_capacity:
                        raise ProtocolError(
                            f"a session of {spec.capacity} rows exceeds the {self._max_capacity} that this model can use"
                        )
                    self._tell(ev.SessionRequested(spec))
                case wire.AdvanceSession(session, at, to):
                    self._tell(ev.AdvanceArrived(session, at, to))
                case wire.BeginTurn(session, turn):
                    self._tell(ev.TurnBegan(session, turn))
                case wire.CloseSession(session):
                    self._tell(ev.SessionEnded(session))
                case _:
                    raise ProtocolError(f"peer {self.control.peer}: {type(message).__name__} came on a control link")

    async def _read_chunks(self) -> None:
        while True:
            message = await self._behind.receive()
            if not isinstance(message, wire.ChunkMessage):
                raise ProtocolError(
                    f"peer {self._behind.peer}: {type(message).__name__} came where a chunk was expected"
                )
            self._tell(ev.ChunkArrived(message.chunk))

    async def _read_credits(self) -> None:
        while True:
            message = await self._ahead.receive()
            if not isinstance(message, wire.Credit):
                raise ProtocolError(f"peer {self._ahead.peer}: {type(message).__name__} came where Credit was expected")
            self._tell(ev.CreditArrived(message.num_chunks))

    async def _run_forwards(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            forward, cancelled = await self._forwards.get()
            began = time.monotonic()
            finished = await loop.run_in_executor(self._executor, self._runner.run, forward, cancelled.is_set)
            if self._recorder is not None and not cancelled.is_set():
                self._recorder.add(len(forward.rows), time.monotonic() - began)
            self._tell(finished)

    def _tell(self, event: ev.StageEvent) -> None:
        for action in self._core.handle(event, time.monotonic()):
            match action:
                case ev.OpenCache(session, capacity):
                    self._runner.open_cache(session, capacity)
                    self._sessions.add(session)
                    self._send(self.control, wire.SessionOpened(session))
                case ev.FreeCache(session):
                    self._runner.free_cache(session)
                    self._sessions.discard(session)
                case ev.RunForward():
                    self._cancelled = threading.Event()
                    self._forwards.put_nowait((action, self._cancelled))
                case ev.CancelForward():
                    self._cancelled.set()
                case ev.SendChunk(chunk):
                    self._send(self._ahead, wire.ChunkMessage(self._num_sent, chunk))
                    self._num_sent += 1
                case ev.GrantCredit(num_chunks):
                    self._send(self._behind, wire.Credit(num_chunks))
                case ev.SendTapped(session, layer, ids, hidden):
                    self._send(self.control, wire.TappedRows(session, layer, ids, hidden))

    def _send(self, link: Link, message: wire.Message) -> None:
        self.node.board.send(link, message)
