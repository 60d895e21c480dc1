"""A pair of links over real loopback sockets, and a check that nothing outlives a test."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from flowspec_edge.core import wire
from flowspec_edge.net.auth import Credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.frames import Opcode
from flowspec_edge.net.link import LinkServer, LinkTimeouts, open_link


def make_hello(purpose: str = wire.CONTROL, protocol: int = wire.PROTOCOL_VERSION) -> wire.Hello:
    return wire.Hello("pi-hall", "0.1.0", protocol, purpose, "ring-1")


def make_welcome() -> wire.Welcome:
    return wire.Welcome("pi-kitchen", "0.1.0", 2**30, ["0" * 64])


def send_raw(link: Link, payload: bytes, opcode: Opcode = Opcode.BINARY) -> None:
    """Past our own end's checks."""
    link._outbox.put(opcode, payload)


@pytest.fixture(autouse=True)
async def no_leaks() -> AsyncIterator[None]:
    """No task and no thread that a test started is left after it."""
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - tasks - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=1)
    assert not left
    assert set(threading.enumerate()) <= threads


class Pair:
    """Two ends of one link: ``near`` connected, ``far`` accepted."""

    def __init__(self, near: Link, far: Link, welcome: wire.Welcome, server: LinkServer) -> None:
        self.near, self.far, self.welcome, self.server = near, far, welcome, server


@contextlib.asynccontextmanager
async def listening(
    on_link: Callable[[Link], Awaitable[None]],
    timeouts: LinkTimeouts | None = None,
    credentials: Credentials | None = None,
) -> AsyncIterator[LinkServer]:
    server = await LinkServer.start(
        "127.0.0.1", 0, make_welcome, on_link, timeouts=timeouts or LinkTimeouts(), credentials=credentials
    )
    try:
        yield server
    finally:
        async with asyncio.timeout(8):
            await server.close()


@contextlib.asynccontextmanager
async def linked(
    purpose: str = wire.CONTROL, timeouts: LinkTimeouts | None = None, credentials: Credentials | None = None
) -> AsyncIterator[Pair]:
    far: asyncio.Future[Link] = asyncio.Future()
    is_done = asyncio.Event()

    async def on_link(link: Link) -> None:
        far.set_result(link)
        await is_done.wait()

    async with listening(on_link, timeouts, credentials) as server, asyncio.timeout(30):
        near, welcome = await open_link(
            "127.0.0.1", server.port, make_hello(purpose), node="pi-kitchen", credentials=credentials
        )
        try:
            yield Pair(near, await far, welcome, server)
        finally:
            is_done.set()
            await near.close()
