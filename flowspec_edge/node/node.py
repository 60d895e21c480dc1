"""A running process: it listens for links, serves layer ranges to whoever opens a stage, and takes in its own rings' returns.

It wires and decides nothing. A stage lives as long as its control link: the origin opens it, and when that link ends,
however it ends, the stage does (``stage_host.py``). Data links find their place by name, ``ring/hop``: every ring has a new name and
links of its own, so nothing of an earlier ring can ever arrive in a later one.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import (
    ClusterKeyError,
    LinkLostError,
    NodeUnavailableError,
    ProtocolError,
)
from flowspec_edge.net.addresses import is_loopback
from flowspec_edge.net.auth import Credentials
from flowspec_edge.net.directory import Directory, Report
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import Link, LinkServer, open_link
from flowspec_edge.net.neighbourhood import Neighbourhood
from flowspec_edge.node.kept_stage import KeptStage
from flowspec_edge.node.measuring import Measurements, Thermometer
from flowspec_edge.node.precision_choice import chosen_precision
from flowspec_edge.node.stage_host import StageHost
from flowspec_edge.version import __version__
from flowspec_edge.weights.cache import WeightCache
from flowspec_edge.weights.server import WeightServer
from flowspec_edge.weights.supply import OnFetch, WeightSupply

DATA_LINK_S = 120.0
"""How long a data link and the stage that expects it wait for each other: the slower of the two may be reading gigabytes."""
MEMORY_SHARE = 0.8
"""How much of the memory that is free at the start a node offers; the rest is for caches and the system."""


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

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished: ...


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
        self._reserved_bytes: dict[Link, int] = {}
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
        self.kept.close()
        self.weights.close()
        self._files.shutdown(wait=False, cancel_futures=True)
        self.board.close()

    @property
    def port(self) -> int:
        assert self._server is not None
        return self._server.port

    def precision_of(self, digest: str, planned: str = "") -> str | None:
        """What a bundle's layers run in here: what was set by hand, planned, or chosen; None for the bundle's own precision."""
        return self.settings.precision or planned or chosen_precision(digest)

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
    def reserve(self, control: Link, num_bytes: int) -> Iterator[None]:
        """Take this much off what the node offers, while the stage of that control link needs it."""
        self._reserved_bytes[control] = num_bytes
        try:
            yield
        finally:
            del self._reserved_bytes[control]

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
        """Of the memory that it offers. Stages that are ending have none: whoever opens another waits (KeptStage)."""
        reserved = sum(num_bytes for control, num_bytes in self._reserved_bytes.items() if control.is_open)
        return max(self.settings.memory_bytes - reserved, 0)

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
