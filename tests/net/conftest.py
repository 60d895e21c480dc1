"""A pair of links over real loopback sockets, and a check that nothing outlives a test."""

import asyncio
import contextlib
import threading

import pytest

from flowspec_edge.core import wire
from flowspec_edge.net.link import LinkServer, LinkTimeouts, open_link


def make_hello(purpose=wire.CONTROL, protocol=wire.PROTOCOL_VERSION):
    return wire.Hello("pi-hall", "0.1.0", protocol, purpose, "ring-1")


def make_welcome():
    return wire.Welcome("pi-kitchen", "0.1.0", 2**30, ["digest"])


@pytest.fixture(autouse=True)
async def no_leaks():
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

    def __init__(self, near, far, welcome, server):
        self.near, self.far, self.welcome, self.server = near, far, welcome, server


@contextlib.asynccontextmanager
async def listening(on_link, timeouts=None):
    server = await LinkServer.start("127.0.0.1", 0, make_welcome, on_link, timeouts=timeouts or LinkTimeouts())
    try:
        yield server
    finally:
        async with asyncio.timeout(8):
            await server.close()


@contextlib.asynccontextmanager
async def linked(purpose=wire.CONTROL, timeouts=None):
    far, is_done = asyncio.Future(), asyncio.Event()

    async def on_link(link):
        far.set_result(link)
        await is_done.wait()

    async with listening(on_link, timeouts) as server, asyncio.timeout(30):
        near, welcome = await open_link("127.0.0.1", server.port, make_hello(purpose), node="pi-kitchen")
        try:
            yield Pair(near, await far, welcome, server)
        finally:
            is_done.set()
            await near.close()
