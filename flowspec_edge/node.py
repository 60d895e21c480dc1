"""A running process: it listens for links, serves layer ranges to whoever opens a stage, and takes in its own rings' returns.

It wires and decides nothing. A stage lives as long as its control link: the origin opens it, and when that link ends,
however it ends, the layers are freed. Data links find their place by name, ``ring/hop``: every ring has a new name and
links of its own, so nothing of an earlier ring can ever arrive in a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from flowspec_edge import __version__
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.address import Address
from flowspec_edge.core.fetching import Source
from flowspec_edge.core.generation import TREE_MARGIN
from flowspec_edge.core.placement import stage_memory_bytes
from flowspec_edge.core.stage import Stage
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import (
    ClusterKeyError,
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    ProtocolError,
)
from flowspec_edge.kept_stage import KeptStage, Key, LoadedStage
from flowspec_edge.measuring import Measurements, StageRecorder, Thermometer, answer_measuring
from flowspec_edge.net.addresses import is_loopback
from flowspec_edge.net.auth import Credentials
from flowspec_edge.net.directory import Directory, Report
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import Link, LinkServer, open_link
from flowspec_edge.net.neighbourhood import Neighbourhood
from flowspec_edge.net.weight_server import WeightServer
from flowspec_edge.precision_choice import chosen_precision
from flowspec_edge.supply import Bundle as Bundle
from flowspec_edge.supply import FetchProgress, OnFetch, StageRequest, WeightSupply
from flowspec_edge.tasks import run_until_first_ends
from flowspec_edge.weight_cache import WeightCache

DEMO_BUNDLE = Path(__file__).parent / "demo_bundle"

DATA_LINK_S = 120.0
"""How long a data link and the stage that expects it wait for each other: the slower of the two may be reading gigabytes."""
PROGRESS_S = 0.25
"""How often an origin is told how far a fetch is: as often as a display needs."""
FAILURE_S = 2.0
"""How long a failed stage keeps its data links open for the origin to end the ring."""
MEMORY_SHARE = 0.8
"""How much of the memory that is free at the start a node offers; the rest is for caches and the system."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """``cluster`` is the label that nodes must share to find each other; memory is what the node offers, in bytes.

    ``num_threads`` run one stage. An ``announced`` node is found by others and serves layers; one that is not only takes
    in what returns from its own rings. Beyond loopback it needs ``credentials``, or has to be told to be insecure. Without a
    ``cache`` it fetches no weights and serves its own bundles alone. Port 0 is ``preferred_port`` where that is free, else any.
    ``peers`` were typed; a node that ``remembers`` peers looks for those of its earlier runs as well.
    Its stages run in ``precision``; where that is None in what was chosen for their bundle by measurement, or in its own.
    ``thermometer`` tells of the board's heat, where it can.
    """

    name: str
    cluster: str
    host: str = "127.0.0.1"
    port: int = 0
    bundles: tuple[Bundle, ...] = ()
    memory_bytes: int = 0
    num_threads: int = 1
    is_announced: bool = True
    credentials: Credentials | None = None
    is_insecure: bool = False
    cache: WeightCache | None = None
    preferred_port: int = 0
    peers: tuple[Address, ...] = ()
    remembers: bool = False
    precision: str | None = None
    thermometer: Thermometer | None = None

    @property
    def neighbourhood(self) -> Neighbourhood:
        return Neighbourhood(
            cluster=self.cluster,
            host=self.host,
            credentials=self.credentials,
            peers=self.peers,
            remembers=self.remembers,
        )


class Runner(Protocol):
    """Runs a stage's layers. See ``StageRunner``."""

    def open_cache(self, session: int, capacity: int) -> None: ...

    def free_cache(self, session: int) -> None: ...

    def run(
        self,
        forward: ev.RunForward,
        is_cancelled: Callable[[], bool],
        tapped: dict[int, ev.Floats] | None = None,
    ) -> ev.Floats: ...


class Board:
    """What a node runs on: it computes and sends as fast as it can. An emulated one takes its own time (bench/emulate.py)."""

    is_measured: ClassVar[bool] = True
    """Whether what runs here tells what this machine can do."""

    def pace(self, runner: StageRunner, stage: int) -> Runner:
        """The runner to use for stage ``stage`` of a ring."""
        return runner

    def send(self, link: Link, message: wire.Message) -> None:
        """Raises what ``Link.send`` does."""
        link.send(message)

    def close(self) -> None:
        """Its node has ended."""


def unique_name() -> str:
    """This machine's name and six digits by chance: freshly flashed cards all have one name, and often one process id."""
    return f"{socket.gethostname()}-{secrets.token_hex(3)}"


def available_memory_bytes() -> int:
    """What Linux says is available without swapping, less a reserve; see MEMORY_SHARE."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(int(line.split()[1]) * 1024 * MEMORY_SHARE)
    return 0


class Node:
    """Listens, announces itself, and hosts stages. Made by :meth:`start`."""

    def __init__(self, settings: NodeSettings, board: Board) -> None:
        self.settings = settings
        self.board = board
        self.on_fetch: OnFetch = lambda progress: None
        tls = settings.credentials.client if settings.credentials else None
        self._files = ThreadPoolExecutor(1, thread_name_prefix="files")
        self.supply = WeightSupply(settings.bundles, settings.cache, self._files, tls)
        self.weights = WeightServer(self.supply.find)
        self.kept = KeptStage()
        self.measurements = Measurements(settings.num_threads, settings.thermometer)
        self._expected: set[str] = set()
        self._data_links: dict[str, asyncio.Future[Link]] = {}
        self._reserved_bytes = 0
        self._server: LinkServer | None = None
        self._directory: Directory | None = None
        self._is_started = asyncio.Event()

    @classmethod
    async def start(cls, settings: NodeSettings, board: Board | None = None, report: Report | None = None) -> Node:
        """Listen and, if wanted, announce and look for peers; ``report`` is told who comes and goes.

        Raises:
            ClusterKeyError: the address can be reached from other machines, and there is no key.
            NodeUnavailableError: the address cannot be listened on.
        """
        if not (is_loopback(settings.host) or settings.credentials or settings.is_insecure):
            raise ClusterKeyError(
                f"node {settings.name}: {settings.host} is open to the network, and there is no cluster key; make one with "
                "flowspec key new, or copy the one of another board with flowspec key set"
            )
        node = cls(settings, board or Board())
        try:
            node._server = await node._listen(settings.port or settings.preferred_port)
        except NodeUnavailableError:
            if settings.port or not settings.preferred_port:
                raise
            node._server = await node._listen(0)  # another node of this machine has it
        if settings.is_announced:
            try:
                node._directory = await Directory.start(
                    settings.neighbourhood, node=settings.name, port=node.port, version=__version__, report=report
                )
            except BaseException:
                await node.close()
                raise
        node._is_started.set()
        return node

    async def _listen(self, port: int) -> LinkServer:
        return await LinkServer.start(
            self.settings.host,
            port,
            self._welcome,
            self._take_link,
            credentials=self.settings.credentials,
            app=self.weights.build_app(),
        )

    async def close(self) -> None:
        """Say goodbye, end every link and stage, stop listening."""
        if self._directory is not None:
            await self._directory.close()
        if self._server is not None:
            await self._server.close()
        await self.kept.close()
        self.weights.close()
        self._files.shutdown(wait=False, cancel_futures=True)
        self.board.close()

    @property
    def port(self) -> int:
        assert self._server is not None
        return self._server.port

    def precision_of(self, digest: str) -> str | None:
        """What a bundle's layers run in here; None for the bundle's own precision."""
        return self.settings.precision or chosen_precision(digest)

    @property
    def announcement(self) -> Announcement:
        settings = self.settings
        return Announcement(
            node=settings.name,
            host=settings.host,
            port=self.port,
            cluster=settings.cluster,
            version=__version__,
            fingerprint=settings.credentials.fingerprint if settings.credentials else "",
        )

    def hello(self, purpose: str, ring: str) -> wire.Hello:
        return wire.Hello(self.settings.name, __version__, wire.PROTOCOL_VERSION, purpose, ring)

    @contextlib.asynccontextmanager
    async def data_link(self, name: str, timeout_s: float | None = DATA_LINK_S) -> AsyncIterator[Link]:
        """The incoming data link of that name, as soon as the peer has opened it.

        Raises:
            LinkLostError: it did not come in time.
        """
        arrival = self._arrival(name)
        try:
            async with asyncio.timeout(timeout_s):
                link = await asyncio.shield(arrival)
        except TimeoutError:
            raise LinkLostError(
                f"the data link {name} was not opened within {timeout_s or 0:.0f} s; is the node before stuck?"
            ) from None
        finally:
            self._data_links.pop(name, None)
        try:
            yield link
        finally:
            await link.close()

    @contextlib.contextmanager
    def reserve(self, num_bytes: int) -> Iterator[None]:
        """Take this much off what the node offers, while a stage needs it."""
        self._reserved_bytes += num_bytes
        try:
            yield
        finally:
            self._reserved_bytes -= num_bytes

    @contextlib.contextmanager
    def expect(self, name: str) -> Iterator[None]:
        """A data link of that name will be taken, however long that may be from now."""
        self._expected.add(name)
        try:
            yield
        finally:
            self._expected.discard(name)
            self._data_links.pop(name, None)

    @property
    def free_bytes(self) -> int:
        """Of the memory that it offers."""
        return max(self.settings.memory_bytes - self._reserved_bytes, 0)

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(
            self.settings.name, __version__, self.free_bytes, self.supply.digests, self.supply.can_fetch
        )

    async def exchange_peers(self, link: Link, told: wire.Peers) -> None:
        """Take the addresses that a member told, and tell ours. Whoever is faster than our start waits for it."""
        await self._is_started.wait()
        known = wire.Peers(0, [])
        if self._directory is not None:
            known = self._directory.take_peers(link.peer_host, told)
        link.send(known)

    def _arrival(self, name: str) -> asyncio.Future[Link]:
        return self._data_links.setdefault(name, asyncio.get_running_loop().create_future())

    async def _take_link(self, link: Link) -> None:
        if link.purpose == wire.CONTROL:
            await StageHost(self, link).run()
            return
        name = link.hello.ring
        arrival = self._arrival(name)
        if arrival.done():
            raise ProtocolError(f"peer {link.peer}: a second data link {name}")
        arrival.set_result(link)
        closed = asyncio.create_task(link.wait_closed(), name=f"end of {name}")
        try:
            await asyncio.wait({closed}, timeout=DATA_LINK_S)
            if self._data_links.get(name) is arrival and name not in self._expected:
                del self._data_links[name]
                raise ProtocolError(f"peer {link.peer}: nobody here expected the data link {name}")
            await closed
        finally:
            closed.cancel()


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
        links.enter_context(self.node.kept.using(key, self.control))
        if stage is not None:
            links.enter_context(self.node.reserve(stage.memory_bytes))
        else:
            files = contextlib.AsyncExitStack()
            links.push_async_callback(files.aclose)
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
        """The plan's, or this node's choice; None for the bundle's own."""
        return request.precision or self.node.precision_of(request.bundle)

    async def _lay_down(self, key: Key, stage: LoadedStage) -> None:
        """The stage has ended: keep it, unless it failed."""
        if not self._is_sound:
            await stage.files.aclose()
            return
        self._cancelled.set()

        def free_caches() -> None:  # behind the last forward
            for session in self._sessions:
                stage.runner.free_cache(session)

        await self._in_thread(free_caches)
        await self.node.kept.keep(key, stage)

    async def _in_thread(self, function: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def _supplied(
        self, request: wire.OpenStage, files: contextlib.AsyncExitStack, links: contextlib.AsyncExitStack
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
            links.enter_context(self.node.reserve(memory_bytes))
            bundle = await files.enter_async_context(supply.stage(wanted, manifest, self._tell_progress))
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
                case wire.OpenSession(session, capacity, cancels, is_tapped, num_prompt):
                    if capacity > self._max_capacity:
                        raise ProtocolError(
                            f"a session of {capacity} rows exceeds the {self._max_capacity} that this model can use"
                        )
                    self._tell(ev.SessionRequested(session, capacity, cancels, is_tapped, num_prompt))
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
            self._tell(
                ev.ChunkArrived(
                    message.session, message.rows, message.num_wanted, message.hidden, message.turn, message.passages
                )
            )

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
            tapped: dict[int, ev.Floats] = {}
            wanted = (tapped,) if forward.is_tapped else ()
            began = time.monotonic()
            hidden = await loop.run_in_executor(self._executor, self._runner.run, forward, cancelled.is_set, *wanted)
            if self._recorder is not None and not cancelled.is_set():
                self._recorder.add(len(forward.rows), time.monotonic() - began)
            self._tell(ev.ForwardFinished(hidden, tapped))

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
                case ev.SendChunk(session, rows, num_wanted, hidden, turn, passages):
                    chunk = wire.ChunkMessage(self._num_sent, session, rows, num_wanted, hidden, turn, passages)
                    self._send(self._ahead, chunk)
                    self._num_sent += 1
                case ev.GrantCredit(num_chunks):
                    self._send(self._behind, wire.Credit(num_chunks))
                case ev.SendTapped(session, layer, ids, hidden):
                    self._send(self.control, wire.TappedRows(session, layer, ids, hidden))

    def _send(self, link: Link, message: wire.Message) -> None:
        self.node.board.send(link, message)


async def ask_nodes(
    found: Sequence[Announcement], cluster: str, credentials: Credentials | None = None
) -> list[dict[str, Any]]:
    """What each node found says of itself: JSON objects with name, address, version, free memory and state."""
    hello = wire.Hello(unique_name(), __version__, wire.PROTOCOL_VERSION, wire.CONTROL, "")

    async def ask(peer: Announcement) -> dict[str, Any]:
        device = {"node": peer.node, "address": f"{peer.host}:{peer.port}", "version": peer.version, "cluster": cluster}
        try:
            link, welcome = await open_link(peer.host, peer.port, hello, node=peer.node, credentials=credentials)
        except NodeUnavailableError as cause:
            return {**device, "free_memory_bytes": None, "bundles": [], "state": str(cause)}
        await link.close()
        return {
            **device,
            "free_memory_bytes": welcome.free_memory_bytes,
            "bundles": welcome.bundles,
            "state": "ready",
        }

    return list(await asyncio.gather(*(ask(peer) for peer in found)))
