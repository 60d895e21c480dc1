"""Peers over real sockets on loopback are found, authenticated, told of, remembered and lost; rogues get nowhere."""

import asyncio
import contextlib
import errno
import os
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.core import wire
from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.errors import NodeUnavailableError, ProtocolError
from flowspec_edge.net import directory as directories
from flowspec_edge.net.auth import Credentials, derive_credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.directory import Directory, find_peers
from flowspec_edge.net.discovery import Announcement, Announcer
from flowspec_edge.net.link import LinkServer, open_link
from flowspec_edge.net.neighbourhood import Neighbourhood, remember_peers, remembered_peers
from tests.narrowing import instance, present
from tests.net.conftest import make_hello

WAIT_S = 20


@pytest.fixture
def cluster() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def ours() -> Credentials:
    return derive_credentials(bytes(range(20)))


@pytest.fixture(scope="module")
def theirs() -> Credentials:
    return derive_credentials(bytes(20))


class Board:
    """A node's listener and directory, without layers."""

    def __init__(self, name: str, server: LinkServer, directory: Directory, actions: list[ms.MembershipAction]) -> None:
        self.name, self.server, self.directory, self.actions = name, server, directory, actions

    @property
    def address(self) -> Address:
        return Address("127.0.0.1", self.server.port)

    def sees(self) -> set[str]:
        return {peer.node for peer in self.directory.found}

    async def until_it_sees(self, *names: str) -> None:
        wanted = set(names)
        await self.directory.wait_for(lambda found: {peer.node for peer in found} == wanted, WAIT_S)
        assert self.sees() == wanted

    async def close(self) -> None:
        await self.directory.close()
        await self.server.close()


Start = Callable[..., Awaitable[Board]]


@pytest.fixture
async def start(cluster: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Start]:
    boards: list[Board] = []

    async def start(
        name: str,
        *peers: Address,
        credentials: Credentials | None = None,
        label: str = cluster,
        is_heard: bool = True,
        protocol: int = wire.PROTOCOL_VERSION,
    ) -> Board:
        def welcome() -> wire.Welcome:
            return wire.Welcome(name, "0.1.0", 2**30, [])

        async def take(link: Link) -> None:
            async for message in link:
                link.send(board.directory.take_peers(link.peer_host, instance(message, wire.Peers)))

        server = await LinkServer.start("127.0.0.1", 0, welcome, take, credentials=credentials)
        where = Neighbourhood(cluster=label, host="127.0.0.1", credentials=credentials, peers=peers)
        actions: list[ms.MembershipAction] = []
        with contextlib.ExitStack() as stack:
            if not is_heard:
                stack.enter_context(monkeypatch.context()).setattr(Directory, "_open_mdns", no_mdns)
            directory = await Directory.start(
                where, node=name, port=server.port, version="0.1.0", report=actions.append
            )
        board = Board(name, server, directory, actions)
        boards.append(board)
        return board

    yield start
    await asyncio.gather(*(board.close() for board in boards))


async def no_mdns(directory: Directory) -> None:
    """As on a network that drops multicast."""


async def test_three_boards_find_each_other_by_mdns(start: Start, ours: Credentials) -> None:
    hall, attic, shed = [await start(name, credentials=ours) for name in ("hall", "attic", "shed")]
    await hall.until_it_sees("attic", "shed")
    await attic.until_it_sees("hall", "shed")
    await shed.until_it_sees("hall", "attic")
    await shed.close()
    await hall.until_it_sees("attic")
    assert any(isinstance(action, ms.ReportLost) and action.peer.node == "shed" for action in hall.actions)


async def test_without_multicast_one_address_is_enough_for_all(start: Start, ours: Credentials) -> None:
    hall = await start("hall", credentials=ours, is_heard=False)
    others = [await start(name, hall.address, credentials=ours, is_heard=False) for name in ("attic", "shed", "desk")]
    everyone = {"hall", "attic", "shed", "desk"}
    for board in (hall, *others):
        await board.until_it_sees(*(everyone - {board.name}))


async def test_a_peer_that_somebody_lost_is_looked_after_at_once(start: Start) -> None:
    hall = await start("pi-hall")
    attic = await start("pi-attic", hall.address)
    await attic.until_it_sees("pi-hall")
    found = attic.directory.found
    await hall.server.close()
    attic.directory.doubt("pi-hall")
    async with asyncio.timeout(ms.REFRESH_S / 3):
        await attic.until_it_sees()
    attic.directory.hear_of(found[0])
    async with asyncio.timeout(ms.REFRESH_S / 3):
        while not any(isinstance(action, ms.ReportLost) for action in attic.actions):
            await asyncio.sleep(0.01)


@pytest.fixture
def no_multicast_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an emulator or in a locked container: sockets open, but refuse what multicast asks of them."""

    class Socket(socket.socket):
        def setsockopt(self, level: int, option: int, *value: Any) -> None:
            if (level, option) == (socket.IPPROTO_IP, socket.IP_MULTICAST_IF):
                self.close()
                raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
            return super().setsockopt(level, option, *value)

    monkeypatch.setattr(socket, "socket", Socket)


async def test_where_multicast_sockets_cannot_be_opened_a_node_says_so_once_and_goes_on(
    start: Start, ours: Credentials, no_multicast_sockets: None, caplog: pytest.LogCaptureFixture
) -> None:
    hall = await start("hall", credentials=ours)
    (warning,) = caplog.messages
    assert re.search(
        r"mDNS cannot be used here \(.*Protocol not available\).*Going on without it.*--peer HOST:PORT", warning
    )
    attic = await start("attic", hall.address, credentials=ours)
    await hall.until_it_sees("attic")
    await attic.until_it_sees("hall")
    caplog.clear()
    await hall.directory._open_mdns()  # as when its addresses have changed
    assert caplog.messages == []


async def test_other_labels_and_other_keys_stay_apart_and_are_heard_of(
    start: Start, ours: Credentials, theirs: Credentials, cluster: str
) -> None:
    boards = [
        await start("ours", credentials=ours),
        await start("theirs", credentials=theirs),
        await start("plain"),
        await start("elsewhere", credentials=ours, label=f"{cluster}-2"),
    ]
    for board in boards:
        records = board.directory.membership.records
        async with asyncio.timeout(WAIT_S):
            while {"ours", "theirs", "plain", "elsewhere"} - {record.node for record in records.values()}:
                await asyncio.sleep(0.01)
        assert board.sees() == set()
        assert not board.directory.membership.hints


async def test_a_rogue_that_announces_our_fingerprint_is_no_peer(
    start: Start, ours: Credentials, theirs: Credentials, cluster: str
) -> None:
    rogue = await start("rogue", credentials=theirs, label=f"{cluster}-rogue")
    forged = await Announcer.start(
        Announcement(
            node="kitchen",
            host="127.0.0.1",
            port=rogue.server.port,
            cluster=cluster,
            version="0.1.0",
            fingerprint=ours.fingerprint,
        )
    )
    hall = await start("hall", credentials=ours)
    hints = hall.directory.membership.hints
    async with asyncio.timeout(WAIT_S):
        while rogue.address not in hints or hints[rogue.address].failure is None:
            await asyncio.sleep(0.01)
    assert present(hints[rogue.address].failure).kind == ms.OTHER_KEY
    assert hall.sees() == rogue.sees() == set()
    await forged.close()


async def test_looking_finds_those_that_answer_and_says_what_came_to_nothing(
    start: Start, ours: Credentials, theirs: Credentials, cluster: str
) -> None:
    def where(**changes: Any) -> Neighbourhood:
        wanted: dict[str, Any] = {"cluster": cluster, "host": "127.0.0.1", "credentials": ours, **changes}
        return Neighbourhood(**wanted)

    async def look(place: Neighbourhood, **options: Any) -> list[Announcement]:
        wanted: dict[str, Any] = {"timeout_s": 3, **options}
        return await find_peers(place, node="asker", version="0.1.0", **wanted)

    with pytest.raises(
        NodeUnavailableError, match=rf"no node of cluster {cluster} .*flowspec node --cluster {cluster}"
    ):
        await look(where(), timeout_s=0.2)
    hall = await start("hall", credentials=ours)
    (found,) = await look(where(), settle_s=0.2)
    assert (found.node, found.host, found.port) == ("hall", "127.0.0.1", hall.server.port)
    with pytest.raises(NodeUnavailableError, match=r"1 of 2 nodes .*\(hall\).*--nodes"):
        await look(where(), num_nodes=2)
    with pytest.raises(NodeUnavailableError, match=r"heard of but not usable: hall; flowspec doctor"):
        await look(where(credentials=theirs))
    assert not any(isinstance(action, ms.ReportJoined) for action in hall.actions)  # an asker serves nobody


def raise_from(error: Exception | None) -> NodeUnavailableError:
    try:
        raise NodeUnavailableError("x") from error
    except NodeUnavailableError as raised:
        return raised


async def test_what_kept_a_peer_away_has_a_kind(
    start: Start, ours: Credentials, theirs: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def kind_of(address: Address, credentials: Credentials | None = ours) -> str:
        where = Neighbourhood(cluster="x", host="127.0.0.1", credentials=credentials, peers=(address,))
        monkeypatch.setattr(Directory, "_open_mdns", no_mdns)
        async with await Directory.start(where, node="asker", version="0.1.0") as directory:
            hint = None
            async with asyncio.timeout(WAIT_S):
                while hint is None or hint.failure is None:
                    await asyncio.sleep(0.01)
                    hint = directory.membership.hints.get(address)
            return hint.failure.kind

    hall = await start("hall", credentials=ours)
    assert await kind_of(hall.address, theirs) == ms.OTHER_KEY
    assert await kind_of(hall.address, None) == ms.OTHER_KEY
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert await kind_of(Address(*unused.getsockname())) == ms.REFUSED
    with monkeypatch.context() as other:
        newer = make_hello(protocol=99)
        other.setattr(directories, "open_link", lambda host, port, hello, **more: open_link(host, port, newer, **more))
        assert await kind_of(hall.address) == ms.OTHER_VERSION
    assert directories.failure_kind(raise_from(TimeoutError())) == ms.TIMED_OUT
    assert directories.failure_kind(raise_from(socket.gaierror(-2, "unknown"))) == ms.NO_NAME
    assert directories.failure_kind(raise_from(OSError(113, "No route to host"))) == ms.NO_ROUTE
    assert directories.failure_kind(raise_from(None)) == ms.BROKEN


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (wire.Peers(70000, []), "Peers.port is 70000"),
        (wire.Peers(1, ["nowhere:port"]), "'nowhere:port', which is no address"),
        (wire.Peers(1, ["a:1"] * 65), "65 addresses; at most 64"),
    ],
)
async def test_what_is_told_is_checked(start: Start, told: wire.Peers, text: str) -> None:
    hall = await start("hall")
    with pytest.raises(ProtocolError, match=text):
        hall.directory.take_peers("127.0.0.1", told)


def test_peers_are_remembered_by_cluster(state: Path, ours: Credentials, theirs: Credentials) -> None:
    where, other = (
        Neighbourhood(cluster="home", host="0.0.0.0", credentials=c, remembers=True) for c in (ours, theirs)
    )
    hall, attic = Address("10.0.0.1", 7361), Address("10.0.0.2", 7361)
    assert list(remembered_peers(where)) == []
    remember_peers(where, [hall])
    remember_peers(where, [attic])
    remember_peers(other, [Address("10.0.0.3", 1)])
    assert list(remembered_peers(where)) == [attic, hall]
    (state / "peers.json").write_text('{"home/' + ours.fingerprint + '": ["x y", 5, "10.0.0.1"]}')
    assert list(remembered_peers(where)) == [Address("5", 7361), hall]
    (state / "peers.json").write_text("nonsense")
    assert list(remembered_peers(where)) == []
    remember_peers(where, [hall])
    assert list(remembered_peers(where)) == [hall]
