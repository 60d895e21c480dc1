"""Closed connections leave nothing that Python would have to look for: with TLS each has 300 KB. Sockets are real."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from flowspec_edge.core import wire
from flowspec_edge.errors import FlowspecError
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.auth import Credentials, derive_credentials
from flowspec_edge.net.link import LinkServer, LinkTimeouts, open_link
from tests.left_behind import uncollected
from tests.net.conftest import make_hello, make_welcome

SOON = LinkTimeouts(connect_s=0.05)
NUM = 3
UNUSED_PORT = 9  # nobody listens there, whom a port of ours may be given to

Ending = Callable[[int, wire.Hello, Credentials | None], Awaitable[None]]


async def closed(port: int, hello: wire.Hello, credentials: Credentials | None) -> None:
    link, _ = await open_link(LOOPBACK, port, hello, credentials=credentials)
    await link.close()


async def given_up(port: int, hello: wire.Hello, credentials: Credentials | None) -> None:
    link, _ = await open_link(LOOPBACK, port, hello, credentials=credentials)
    link.abort()
    for _ in range(2):
        with pytest.raises(FlowspecError, match="given up here"):
            link.send(wire.Credit(1))
    await link.close()


async def broken(port: int, hello: wire.Hello, credentials: Credentials | None) -> None:
    link, _ = await open_link(LOOPBACK, port, hello, credentials=credentials)
    link._transport.abort()
    with pytest.raises(FlowspecError, match="link was lost"):
        await link.receive()
    await link.close()


async def refused(port: int, hello: wire.Hello, credentials: Credentials | None) -> None:
    with pytest.raises(FlowspecError, match="cannot be reached"):
        await open_link(LOOPBACK, UNUSED_PORT, hello, credentials=credentials)


async def of_another_key(port: int, hello: wire.Hello, credentials: Credentials | None) -> None:
    other = derive_credentials(bytes(20)) if credentials else derive_credentials(bytes(range(20)))
    with pytest.raises(FlowspecError, match="key"):
        await open_link(LOOPBACK, port, hello, credentials=other)


async def unanswered(port: int, hello: wire.Hello, credentials: Credentials | None) -> None:
    server = await asyncio.start_server(lambda reader, writer: None, LOOPBACK, 0)
    async with server:
        silent_port = server.sockets[0].getsockname()[1]
        with pytest.raises(FlowspecError, match="no answer within"):
            await open_link(LOOPBACK, silent_port, hello, credentials=credentials, timeouts=SOON)


@contextlib.asynccontextmanager
async def serving(credentials: Credentials | None) -> AsyncIterator[int]:
    server = await LinkServer.start(LOOPBACK, 0, make_welcome, lambda link: link.wait_closed(), credentials=credentials)
    try:
        async with asyncio.timeout(30):
            yield server.port
    finally:
        await server.close()


@pytest.mark.parametrize("has_key", [False, True], ids=["clear", "tls"])
@pytest.mark.parametrize("purpose", [wire.CONTROL, wire.DATA])
@pytest.mark.parametrize("ending", [closed, given_up, broken, refused, of_another_key, unanswered])
async def test_nothing_is_left_of_a_link_however_it_ends(ending: Ending, purpose: str, has_key: bool) -> None:
    credentials = derive_credentials(bytes(range(20))) if has_key else None
    async with serving(credentials) as port:
        with uncollected() as left:
            for _ in range(NUM):
                await ending(port, make_hello(purpose), credentials)
            await left.until_nothing()
