"""Finds and authenticates a node's peers.

``core/cluster/membership.py`` decides; this module greets, listens and remembers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self

from flowspec_edge.core import wire
from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address, parse_address
from flowspec_edge.core.cluster.interfaces import WayOut, ways_out
from flowspec_edge.core.cluster.membership import Failure, Membership, Peer
from flowspec_edge.core.journal import Journal
from flowspec_edge.errors import (
    FlowspecError,
    NodeUnavailableError,
    OtherKeyError,
    OtherVersionError,
    ProtocolError,
    StateError,
)
from flowspec_edge.files import open_record
from flowspec_edge.net.addresses import NODE_PORT, own_addresses, read_verdicts
from flowspec_edge.net.discovery import Announcement, Announcer, Browser
from flowspec_edge.net.link import DEFAULT_TIMEOUTS, open_link
from flowspec_edge.net.neighbourhood import Neighbourhood, remember_peers, remembered_peers
from flowspec_edge.net.network_watch import NetworkWatch

MAX_WAITING_EVENTS = 1024
"""Hints from outside that may wait for their turn. Further ones are ignored, and come again."""

_KINDS = {
    errno.ECONNREFUSED: ms.REFUSED,
    errno.EHOSTUNREACH: ms.NO_ROUTE,
    errno.ENETUNREACH: ms.NO_ROUTE,
    errno.EHOSTDOWN: ms.NO_ROUTE,
    errno.ETIMEDOUT: ms.TIMED_OUT,
}
_log = logging.getLogger(__name__)

Report = Callable[[ms.MembershipAction], None]
OnFound = Callable[[Sequence[Announcement]], None]
"""Told, while nodes are looked for, of those that were found so far."""


class Directory:
    """The directory of a node's peers.

    It is made by :meth:`start`, and is used as an async context or closed by ``close``.
    """

    def __init__(self, where: Neighbourhood, node: str, port: int, version: str, report: Report | None) -> None:
        self.where = where
        self._version, self._port = version, port
        self._report = report
        itself: dict[str, Any] = {
            "node": node,
            "cluster": where.cluster,
            "fingerprint": where.fingerprint,
            "began": time.monotonic(),
            "own": self._own_addresses(),
            "is_local": where.is_local,
        }
        self.membership = Membership(**itself)
        self._journal = Journal("membership", itself, open_record("membership"))
        self.mdns_error: str | None = None
        self._company_at: float | None = None  # when the first peer answered
        self._events: asyncio.Queue[ms.MembershipEvent] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._browser: Browser | None = None
        self._announcer: Announcer | None = None

    @classmethod
    async def start(
        cls, where: Neighbourhood, *, node: str, port: int = 0, version: str, report: Report | None = None
    ) -> Directory:
        """Begin to look for peers. A node that listens at ``port`` announces itself, and tells its peers the port.

        Where mDNS cannot be used, a warning is logged, and peers are still found in the other ways.
        """
        directory = cls(where, node, port, version, report)
        networks = directory._networks()
        await directory._open_mdns()
        for address in where.peers:
            directory.tell(ms.AddressLearned(address, ms.TYPED))
        for address in remembered_peers(where) if where.remembers else ():
            directory.tell(ms.AddressLearned(address, ms.REMEMBERED))
        directory._spawn(directory._run(), "directory")
        if not where.is_local:
            directory._spawn(directory._watch_networks(networks), "networks")
        return directory

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Withdraw the announcement and stop looking."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._close_mdns()

    @property
    def company_s(self) -> float:
        """For how long there have been peers; 0 while none has answered."""
        return time.monotonic() - self._company_at if self._company_at is not None else 0.0

    @property
    def found(self) -> list[Announcement]:
        """The peers that are there now, in the order of their names."""
        return [
            Announcement(
                node=peer.node,
                host=peer.address.host,
                port=peer.address.port,
                cluster=self.where.cluster,
                version=peer.version,
                fingerprint=self.where.fingerprint,
            )
            for peer in sorted(self.membership.peers.values(), key=lambda peer: peer.node)
        ]

    async def wait_for(
        self, is_enough: Callable[[list[Announcement]], bool], timeout_s: float | None
    ) -> list[Announcement]:
        """Wait until the peers are enough, at most ``timeout_s``. Returns the peers that are there then."""
        try:
            async with asyncio.timeout(timeout_s):
                while not is_enough(self.found):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self.found

    async def wait_settled(self, timeout_s: float, on_change: OnFound) -> list[Announcement]:
        """Wait until nobody else is expected, at most ``timeout_s``. Returns the peers that are there then."""
        until = time.monotonic() + timeout_s
        while (left := min(self.membership.settles_at(), until) - time.monotonic()) > 0:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._changed.wait()
            on_change(self.found)
        return self.found

    def tell(self, event: ms.MembershipEvent) -> None:
        """Take an event in. Of hints, which anyone may send, no more wait than MAX_WAITING_EVENTS."""
        is_hint = isinstance(event, ms.RecordHeard | ms.RecordGone | ms.AddressLearned)
        if not is_hint or self._events.qsize() < MAX_WAITING_EVENTS:
            self._events.put_nowait(event)

    def doubt(self, node: str) -> None:
        """A link to this node was lost: greet it now, wherever it was found."""
        self.tell(ms.PeerDoubted(node))

    def hear_of(self, board: Announcement) -> None:
        """This node has just answered at its address: greet it now, if it counts as lost."""
        self.tell(ms.AddressLearned(Address(board.host, board.port), ms.REMEMBERED))

    def take_peers(self, host: str, told: wire.Peers) -> wire.Peers:
        """Take the addresses that a member which connected from ``host`` has told, and return those known here.

        Raises:
            ProtocolError: the member told something that is no address.
        """
        if not told.port < 65536:
            raise ProtocolError(f"Peers.port is {told.port}, not a port")
        if told.port:
            self.tell(ms.AddressLearned(Address(host, told.port), ms.CALLED))
        for address in _parse_told(told):
            self.tell(ms.AddressLearned(address, ms.TOLD))
        return self._known()

    def _known(self) -> wire.Peers:
        return wire.Peers(self._port, [str(address) for address in self.membership.known])

    def _own_addresses(self) -> frozenset[Address]:
        return frozenset(Address(host, self._port) for host in own_addresses(self.where.host) if self._port)

    async def _run(self) -> None:
        while True:
            deadline, now = self.membership.next_deadline(), time.monotonic()
            event: ms.MembershipEvent = ms.TimePassed()
            try:
                async with asyncio.timeout(None if deadline is None else max(deadline - now, 0)):
                    event = await self._events.get()
            except TimeoutError:
                pass
            for action in self._journal.handle(self.membership, event, time.monotonic()):
                self._perform(action)
            if not self.membership.peers:
                self._company_at = None
            elif self._company_at is None:
                self._company_at = time.monotonic()
            self._changed.set()

    def _perform(self, action: ms.MembershipAction) -> None:
        match action:
            case ms.GreetPeer(address):
                self._spawn(self._greet(address), f"greeting {address}")
            case ms.RememberPeers(addresses):
                if self.where.remembers:
                    self._spawn(self._remember(addresses), "remembering peers")
            case _:
                if self._report is not None:
                    self._report(action)

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _greet(self, address: Address) -> None:
        """Exchange with a peer who it is, and which peers each of the two knows."""
        hello = wire.Hello(self.membership.node, self._version, wire.PROTOCOL_VERSION, wire.CONTROL, "")
        try:
            link, welcome = await open_link(address.host, address.port, hello, credentials=self.where.credentials)
            try:
                link.send(self._known())
                async with asyncio.timeout(DEFAULT_TIMEOUTS.connect_s):
                    answer = wire.expect(await link.receive(), wire.Peers, welcome.node)
                known = tuple(_parse_told(answer))
            finally:
                await link.close()
        except (FlowspecError, OSError) as cause:  # TimeoutError is an OSError
            text = str(cause) or f"peer at {address} did not say within {DEFAULT_TIMEOUTS.connect_s:g} s whom it knows"
            self.tell(ms.PeerFailed(address, Failure(failure_kind(cause), text)))
            return
        peer = Peer(welcome.node, address, welcome.version, welcome.free_memory_bytes, tuple(welcome.bundles))
        self.tell(ms.PeerAnswered(address, peer, known, link.peer_host))

    async def _remember(self, addresses: Sequence[Address]) -> None:
        try:
            await asyncio.to_thread(remember_peers, self.where, addresses)
        except StateError as cause:
            _log.warning("peers are not remembered: %s", cause)

    async def _open_mdns(self) -> None:
        """Hear and be heard on the networks that this machine is in now."""
        try:
            if self._browser is not None:
                await self._browser.close()
                self._browser = None
            self._browser = Browser(self.tell, host=self.where.host)
            if self._announcer is not None:
                await self._announcer.renew()
            elif self._port:
                self._announcer = await Announcer.start(
                    Announcement(
                        node=self.membership.node,
                        host=self.where.host,
                        port=self._port,
                        cluster=self.where.cluster,
                        version=self._version,
                        fingerprint=self.where.fingerprint,
                    )
                )
            self.mdns_error = None
        except (NodeUnavailableError, OSError) as cause:
            if self.mdns_error != str(cause):  # logged once, however often addresses change
                _log.warning(
                    "%s. Going on without it: peers are reached by address (--peer HOST:PORT), and tell of others",
                    cause,
                )
            self.mdns_error = str(cause)

    async def _close_mdns(self) -> None:
        if self._announcer is not None:
            await self._announcer.close()
        if self._browser is not None:
            await self._browser.close()
        self._announcer = self._browser = None

    def _networks(self) -> tuple[list[WayOut], frozenset[Address]]:
        return ways_out(read_verdicts()), self._own_addresses()

    async def _watch_networks(self, before: tuple[list[WayOut], frozenset[Address]]) -> None:
        with contextlib.closing(NetworkWatch()) as watch:
            while True:
                has_slept = await watch.wait()
                now = self._networks()
                if now != before or has_slept:
                    before = now
                    ways, own = now
                    _log.info("this machine's networks: %s", ", ".join(map(str, ways)) or "none")
                    self._events.put_nowait(ms.NetworksChanged(own))
                    await self._open_mdns()


async def find_peers(
    where: Neighbourhood,
    *,
    node: str,
    version: str,
    num_nodes: int | None = None,
    timeout_s: float,
    settle_s: float = 0.0,
    on_found: OnFound = lambda nodes: None,
) -> list[Announcement]:
    """:func:`search_peers` with a directory for this one search."""
    async with await Directory.start(where, node=node, version=version) as directory:
        return await search_peers(
            directory, num_nodes=num_nodes, timeout_s=timeout_s, settle_s=settle_s, on_found=on_found
        )


async def search_peers(
    directory: Directory,
    *,
    num_nodes: int | None = None,
    timeout_s: float,
    settle_s: float = 0.0,
    on_found: OnFound = lambda nodes: None,
) -> list[Announcement]:
    """Look for the nodes of a cluster until ``num_nodes`` have answered.

    Where ``num_nodes`` is None, the search ends when all are known that those tell that have answered, and at the
    latest ``settle_s`` after the first one. ``on_found`` is told who was found so far.

    Raises:
        NodeUnavailableError: after ``timeout_s`` no node or fewer than ``num_nodes`` have answered. The text names
            those that were heard of but cannot be used.
    """

    def is_enough(nodes: list[Announcement]) -> bool:
        on_found(nodes)
        return len(nodes) >= (num_nodes or 1)

    found = await directory.wait_for(is_enough, timeout_s)
    if found and num_nodes is None:
        found = await directory.wait_settled(settle_s - directory.company_s, on_found)
    where, others = directory.where, _others(directory)
    place = "on this machine" if where.is_local else "on this network"
    if not found:
        raise NodeUnavailableError(
            f"no node of cluster {where.cluster} found {place} within {timeout_s:g} s{others}; start one with: "
            f"flowspec node --cluster {where.cluster}"
        )
    if num_nodes is not None and len(found) < num_nodes:
        names = ", ".join(announcement.node for announcement in found)
        raise NodeUnavailableError(
            f"{len(found)} of {num_nodes} nodes of cluster {where.cluster} found {place} within {timeout_s:g} s "
            f"({names}){others}; start the others with flowspec node, or ask for fewer with --nodes"
        )
    return found[:num_nodes]


def _others(directory: Directory) -> str:
    """The nodes and addresses that were heard of but cannot be used, for the end of an error's text."""
    members = directory.membership
    names = {
        record.node
        for record in members.records.values()
        # Clusters of other labels on one machine, as tests and demos have them, are meant to be separate.
        if not members.is_ours(record) and (record.cluster == members.cluster or not directory.where.is_local)
    }
    names |= {str(address) for address, hint in members.hints.items() if hint.failure is not None}
    if not names:
        return ""
    listed = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
    return f" (heard of but not usable: {listed}; flowspec doctor says why)"


def failure_kind(cause: BaseException | None) -> str:
    """The kind of failure (see ``Failure``) that an error, or one of its causes, stands for."""
    if isinstance(cause, OtherKeyError):
        return ms.OTHER_KEY
    if isinstance(cause, OtherVersionError):
        return ms.OTHER_VERSION
    while cause is not None:
        behind = getattr(cause, "os_error", cause)  # aiohttp wraps the error of the socket
        if isinstance(behind, TimeoutError):
            return ms.TIMED_OUT
        if isinstance(behind, socket.gaierror):
            return ms.NO_NAME
        if isinstance(behind, OSError) and behind.errno in _KINDS:
            return _KINDS[behind.errno]
        cause = cause.__cause__
    return ms.BROKEN


def _parse_told(told: wire.Peers) -> list[Address]:
    if len(told.addresses) > ms.MAX_TOLD:
        raise ProtocolError(f"Peers with {len(told.addresses)} addresses; at most {ms.MAX_TOLD} are told (MAX_TOLD)")
    parsed = [parse_address(text, NODE_PORT) for text in told.addresses]
    if None in parsed:
        raise ProtocolError(f"Peers tell {told.addresses[parsed.index(None)]!r:.80}, which is no address")
    return [address for address in parsed if address is not None]
