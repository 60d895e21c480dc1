"""Whoever connects and wants nothing costs little, keeps nobody out, and is closed. Sockets are real, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import resource
import socket
import subprocess
import sys
from asyncio.sslproto import SSLProtocol
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from flowspec_edge.net import door as doors
from flowspec_edge.net import server as servers
from flowspec_edge.net.auth import Credentials, derive_credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.door import Door
from flowspec_edge.net.link import LinkServer, open_link
from tests.net.conftest import make_hello, make_welcome

HALF_A_HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(32)  # of TLS; the rest never comes
HALF_A_REQUEST = b"GET /link/control HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def ours() -> Credentials:
    return derive_credentials(bytes(range(20)))


@contextlib.asynccontextmanager
async def serving(credentials: Credentials | None) -> AsyncIterator[int]:
    async def take(link: Link) -> None:
        await link.wait_closed()

    server = await LinkServer.start("127.0.0.1", 0, make_welcome, take, credentials=credentials)
    try:
        async with asyncio.timeout(30):
            yield server.port
    finally:
        await server.close()


class Crowd:
    """Sockets that connect and say ``said``; ``num_open`` of them are still open."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def at(cls, port: int, num_sockets: int, said: bytes = b"") -> AsyncIterator[Crowd]:
        crowd, loop = cls(), asyncio.get_running_loop()
        try:
            for _ in range(num_sockets):
                one = socket.socket()
                crowd.sockets.append(one)
                one.setblocking(False)
                with contextlib.suppress(OSError):
                    await loop.sock_connect(one, ("127.0.0.1", port))
                    one.send(said)
            yield crowd
        finally:
            for one in crowd.sockets:
                one.close()

    @property
    def num_open(self) -> int:
        return sum(self._is_open(one) for one in self.sockets)

    def _is_open(self, one: socket.socket) -> bool:
        try:
            while one.recv(65536):  # what it was told before
                pass
            return False
        except BlockingIOError:
            return True
        except OSError:
            return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def without_collections() -> Iterator[None]:
    """Python does not look for reference cycles by itself, as in a process that idles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def num_tls_connections() -> int:
    return sum(isinstance(one, SSLProtocol) for one in gc.get_objects())


async def come_in(port: int, credentials: Credentials | None) -> None:
    link, _ = await open_link("127.0.0.1", port, make_hello(), credentials=credentials)
    await link.close()


@pytest.mark.parametrize("is_encrypted", [True, False])
async def test_of_silent_sockets_the_oldest_leave_and_members_come_in(
    ours: Credentials, is_encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "MAX_SILENT_PER_ADDRESS", 40)
    credentials = ours if is_encrypted else None
    async with serving(credentials) as port:
        async with Crowd.at(port, 300) as crowd:
            await come_in(port, credentials)
            await until(lambda: crowd.num_open <= 40)
            assert crowd.num_open >= 39, "the member came last, and was silent for a moment too"
            assert not any(map(crowd._is_open, crowd.sockets[:260]))


@pytest.mark.parametrize(("is_encrypted", "said"), [(True, HALF_A_HELLO), (False, HALF_A_REQUEST), (False, b"x")])
async def test_of_those_who_speak_and_ask_for_nothing_few_stay(
    ours: Credentials, is_encrypted: bool, said: bytes, without_collections: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "HANDSHAKE_S", 60.0)
    credentials = ours if is_encrypted else None
    async with serving(credentials) as port:
        async with Crowd.at(port, 300, said) as crowd:
            await until(lambda: crowd.num_open <= doors.MAX_NEW_PER_ADDRESS)
            await until(lambda: num_tls_connections() <= doors.MAX_NEW_PER_ADDRESS)
            await come_in(port, credentials)


async def test_silence_ends_with_the_time_for_a_handshake(ours: Credentials, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "HANDSHAKE_S", 0.1)
    for credentials in (ours, None):
        async with serving(credentials) as port:
            async with Crowd.at(port, 10) as crowd:
                await until(lambda crowd=crowd: crowd.num_open == 0)  # type: ignore[misc]


async def test_a_request_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "REQUEST_S", 0.1)
    async with serving(None) as port:
        link, _ = await open_link("127.0.0.1", port, make_hello())
        async with Crowd.at(port, 10, HALF_A_REQUEST) as crowd:
            await until(lambda: crowd.num_open == 0)
        assert link.is_open, "its first request has come, and it may stay"
        await link.close()


async def test_a_link_stays_whose_request_came_with_the_handshakes_end(
    ours: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "REQUEST_S", 0.05)
    async with serving(ours) as port:
        links = [(await open_link("127.0.0.1", port, make_hello(), credentials=ours))[0] for _ in range(10)]
        await asyncio.sleep(0.3)
        assert all(link.is_open for link in links)
        for link in links:
            await link.close()


async def test_memory_goes_back_when_a_crowd_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[bool] = []
    monkeypatch.setattr(doors, "CALM_S", 0.0)
    monkeypatch.setattr(doors, "give_back_freed", lambda: given_back.append(True))
    door = Door(None, 5.0)
    await door.listen("127.0.0.1", 0, asyncio.Protocol, 128)
    port = door.sockets[0].getsockname()[1]
    try:
        async with Crowd.at(port, doors.CROWD - 1, b"x"):
            await until(lambda: len(door._new) == doors.CROWD - 1)
        await until(lambda: not len(door._new))
        assert not given_back, "these few are no crowd"
        async with Crowd.at(port, 1, b"x"):
            await until(lambda: len(door._new) == 1)
            async with Crowd.at(port, 1, b"x"):
                await until(lambda: len(door._new) == 2)
            await asyncio.sleep(0.01)
            assert not given_back, "somebody is there"
        await until(lambda: given_back == [True])
    finally:
        door.close()


async def test_nothing_is_left_of_tls_connections_that_came_to_nothing(
    ours: Credentials, monkeypatch: pytest.MonkeyPatch, without_collections: None
) -> None:
    monkeypatch.setattr(doors, "CALM_S", 0.0)
    async with serving(ours) as port:
        async with Crowd.at(port, doors.MAX_NEW_PER_ADDRESS, b"no handshake") as crowd:
            await until(lambda: crowd.num_open == 0)
        await until(lambda: num_tls_connections() == 0)


class FullListener:
    """A listening socket of a process that has no descriptors left."""

    def accept(self) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    def fileno(self) -> int:
        return -1


async def test_without_descriptors_silent_connections_give_way_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doors, "FULL_RETRY_S", 0.0)
    door = Door(None, 5.0)
    await door.listen("127.0.0.1", 0, asyncio.Protocol, 128)
    try:
        async with Crowd.at(door.sockets[0].getsockname()[1], doors.NUM_FREED + 6) as crowd:
            await until(lambda: len(door._silent) == doors.NUM_FREED + 6)
            full: Any = FullListener()
            door._accept(full)
            await until(lambda: crowd.num_open == 6)
            for _ in range(50):
                door._accept(full)
                await asyncio.sleep(0)
            assert not len(door._silent)
            async with Crowd.at(door.sockets[0].getsockname()[1], 3):
                await until(lambda: len(door._silent) == 3)
    finally:
        door.close()
    assert [record.message for record in caplog.records] == [
        "no connection can be accepted (Too many open files); see ulimit -n"
    ]


async def test_who_leaves_before_the_answer_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    has_left = asyncio.Event()

    async def answer_late(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        has_left.set()
        response = web.StreamResponse()
        await response.prepare(request)
        return response

    app = web.Application()
    app.router.add_get("/", answer_late)
    served = await servers.serve_app(app, "127.0.0.1", 0)
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://127.0.0.1:{served.port}/")
    await served.close()
    assert has_left.is_set() and not caplog.records


def test_the_soft_limit_of_descriptors_is_raised() -> None:
    code = """
import resource
from flowspec_edge.net.door import raise_descriptor_limit
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
raise_descriptor_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert int(found) == (doors.MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, doors.MAX_DESCRIPTORS))
