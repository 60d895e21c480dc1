"""The two ends of a link: ``open_link`` connects and says Hello, ``LinkServer`` listens and answers Welcome."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from flowspec_edge.core import wire
from flowspec_edge.core.cluster.address import Address, is_host
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    OtherKeyError,
    OtherVersionError,
    ProtocolError,
    release_frames,
    system_words,
)
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.auth import Credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.server import ServedApp, serve_app
from flowspec_edge.net.standstill import THIS_PROCESS

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimeouts:
    """``connect_s``: from the first packet to Hello and Welcome; a LAN takes milliseconds, a busy board a second.

    ``heartbeat_s``: a control link on which nothing came for so long asks whether the peer is there; 0 turns it off.
    ``answer_s``: a peer that says nothing for so long after that is lost. The sum is what the loss of a peer may cost
    at most, and the second part how long a peer's event loop may be busy; a question is 8 bytes, so it may come often.
    """

    connect_s: float = 5.0
    heartbeat_s: float = 0.4
    answer_s: float = 1.25


DEFAULT_TIMEOUTS = LinkTimeouts()
OPENING = LinkTimeouts(connect_s=1.4)
"""Whoever opens a ring has texts that wait; a node that takes longer than this to say Welcome is left out. The system
repeats a first packet that was lost after a second."""


async def open_link(
    host: str,
    port: int,
    hello: wire.Hello,
    *,
    node: str = "",
    credentials: Credentials | None = None,
    timeouts: LinkTimeouts = DEFAULT_TIMEOUTS,
) -> tuple[Link, wire.Welcome]:
    """Connect to a peer; it counts as joined only after its Welcome. ``node`` is its expected name, where known.

    Without ``credentials`` nothing is encrypted, and only nodes without a key answer.

    Raises:
        OtherKeyError: the peer has another cluster key, or only one of the two has any.
        OtherVersionError: the peer speaks another version of the protocol.
        NodeUnavailableError: nothing answers in time, the peer refuses, or it is not ``node``.
    """
    peer, address = node or "(not yet known)", Address(host, port)
    _check_address(peer, host, port)
    session = aiohttp.ClientSession()
    link: Link | None = None
    try:
        async with asyncio.timeout(timeouts.connect_s):
            link = await _connect(session, address, hello, peer, credentials, timeouts)
            link.send(hello)
            welcome = wire.expect(await link.receive(), wire.Welcome, peer)
        if node and welcome.node != node:
            raise NodeUnavailableError(f"peer {peer}: at {address} answers {welcome.node} instead; look for it again")
        link.peer = welcome.node
        return link, welcome
    except BaseException as cause:
        await (link.close() if link is not None else session.close())
        release_frames(cause)  # aiohttp's errors lie in reference cycles
        _raise_named(cause, f"peer {peer} at {address}", port, timeouts, is_linked=link is not None)
        raise


@web.middleware
async def _refuse_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No page of the web is a node. Browsers let them connect to this machine, and say in Origin whose they are."""
    if "Origin" in request.headers:
        return web.Response(status=403, text="pages of the web may not use a node\n")
    return await handler(request)


def _check_address(peer: str, host: str, port: int) -> None:
    if not is_host(host) or not 0 < port < 2**16:
        raise NodeUnavailableError(f"peer {peer} cannot be reached: {f'{host}:{port}'!r:.80} is no address")


def _raise_named(cause: BaseException, who: str, port: int, timeouts: LinkTimeouts, *, is_linked: bool) -> None:
    """Say why a link was not opened, where it was the peer or the network."""
    if not is_linked and (mismatch := _key_mismatch(cause)):
        raise OtherKeyError(f"{who} {mismatch}") from cause
    if isinstance(cause, OtherVersionError):
        raise OtherVersionError(f"{who} refused the link: {cause}") from cause
    if isinstance(cause, LinkLostError | ProtocolError):
        raise NodeUnavailableError(f"{who} refused the link: {cause}") from cause
    if isinstance(
        cause, OSError | aiohttp.ClientError | ValueError
    ):  # ValueError: no URL; OSError includes TimeoutError
        why = f"no answer within {timeouts.connect_s:g} s" if isinstance(cause, TimeoutError) else _said(cause)
        raise NodeUnavailableError(
            f"{who} cannot be reached ({why}); check that `flowspec node` runs there "
            f"and that no firewall blocks port {port}"
        ) from cause


def _said(cause: Exception) -> str:
    """What the system said, in one line, or the server at the other end."""
    if isinstance(cause, aiohttp.WSServerHandshakeError):
        return f"it answers {cause.status}, as no node does"
    return system_words(cause)


def _key_mismatch(cause: BaseException | None) -> str | None:
    """What is wrong with the keys, where that is why a link could not be opened."""
    while cause is not None:
        # An alert is known by OpenSSL's own name for it, which ssl gives as the reason, not by a text for people.
        if isinstance(cause, ssl.SSLCertVerificationError) or "ALERT" in (getattr(cause, "reason", None) or ""):
            return "has another cluster key; give both the same one: flowspec key show there, flowspec key set here"
        if isinstance(cause, ssl.SSLError):
            return (
                "does not encrypt: it was started with --insecure, or runs something else; start it with the cluster "
                "key"
            )
        if isinstance(cause, aiohttp.ServerDisconnectedError):  # what a TLS listener does to a request in the clear
            return (
                "closed the connection at once, as a node with a cluster key does where there is none; copy its key: "
                "flowspec key show there, flowspec key set here"
            )
        cause = cause.__cause__ or cause.__context__
    return None


async def _connect(
    session: aiohttp.ClientSession,
    address: Address,
    hello: wire.Hello,
    peer: str,
    credentials: Credentials | None,
    timeouts: LinkTimeouts,
) -> Link:
    websocket = await session.ws_connect(
        f"{'https' if credentials else 'http'}://{address}/link/{hello.purpose}",
        ssl=credentials.client if credentials else True,
        compress=0,
    )

    async def let_go() -> None:
        await _let_go(websocket)
        await session.close()

    # aiohttp gives a client no public way to its transport.
    transport = websocket._writer.transport
    heartbeat = _heartbeat(hello.purpose, timeouts)
    link = Link(transport, hello.purpose, peer, is_client=True, heartbeat=heartbeat, hello=hello, let_go=let_go)
    THIS_PROCESS.add(link)
    return link


async def _let_go(websocket: aiohttp.ClientWebSocketResponse | web.WebSocketResponse) -> None:
    """End aiohttp's part of a link whose connection has ended: all has been said, and it only finds that out. The error
    that it finds would lie in a reference cycle with it."""
    await websocket.close()
    if (error := websocket.exception()) is not None:
        release_frames(error)


def _heartbeat(purpose: str, timeouts: LinkTimeouts) -> tuple[float, float] | None:
    """After how much silence a peer is asked, and how long it may take to answer."""
    return (timeouts.heartbeat_s, timeouts.answer_s) if purpose == wire.CONTROL and timeouts.heartbeat_s else None


class LinkServer:
    """Accepts links and gives each, after Hello and Welcome, to ``on_link``; the link is closed when that returns."""

    def __init__(
        self, welcome: Callable[[], wire.Welcome], on_link: Callable[[Link], Awaitable[None]], timeouts: LinkTimeouts
    ) -> None:
        self._welcome = welcome
        self._on_link = on_link
        self._timeouts = timeouts
        self._links: set[Link] = set()
        self._served: ServedApp | None = None

    @classmethod
    async def start(
        cls,
        host: str,
        port: int,
        welcome: Callable[[], wire.Welcome],
        on_link: Callable[[Link], Awaitable[None]],
        *,
        credentials: Credentials | None = None,
        timeouts: LinkTimeouts = DEFAULT_TIMEOUTS,
        app: web.Application | None = None,
    ) -> LinkServer:
        """Listen on ``host:port`` (port 0: any free one). ``app`` may bring further routes for the same port.

        With ``credentials`` every route is encrypted, and for holders of the cluster key alone.

        Raises:
            NodeUnavailableError: the address cannot be listened on.
        """
        server = cls(welcome, on_link, timeouts)
        app = app or web.Application()
        app.middlewares.append(_refuse_pages)
        for purpose in (wire.CONTROL, wire.DATA):
            app.router.add_get(f"/link/{purpose}", server._accept)
        tls = credentials.server if credentials else None
        server._served = await serve_app(app, host or LOOPBACK, port, tls=tls)
        return server

    @property
    def port(self) -> int:
        assert self._served is not None
        return self._served.port

    async def close(self) -> None:
        """Close every link, then stop listening; ends all tasks, within about four seconds at worst."""
        await asyncio.gather(*(link.close() for link in self._links))
        assert self._served is not None
        await self._served.close()

    async def _accept(self, request: web.Request) -> web.StreamResponse:
        purpose = request.path.rpartition("/")[2]
        websocket, transport = web.WebSocketResponse(compress=False), request.transport
        if transport is None or not websocket.can_prepare(request).ok:
            return web.Response(status=400, text="a link begins with the handshake of a WebSocket\n")
        # The link reads from before the handshake's answer on, so that no byte behind it goes to aiohttp.
        heartbeat = _heartbeat(purpose, self._timeouts)
        link = Link(transport, purpose, f"at {request.remote}", is_client=False, heartbeat=heartbeat)
        self._links.add(link)
        try:
            await websocket.prepare(request)
            await self._greet(link)
            await self._on_link(link)
        except (ProtocolError, OtherVersionError) as cause:
            _log.warning("%s", cause)
            await link.close(cause)
        except FlowspecError as cause:
            _log.info("%s", cause)
        except ConnectionResetError:  # the client has left before the answer to its handshake
            raise
        except Exception as cause:  # a bug; the peer is to hear of it, and others go on
            _log.exception("peer %s: its link has failed", link.peer)
            await link.close(
                ProtocolError(f"the node at the other end failed ({type(cause).__name__}), which is a bug")
            )
        finally:
            await link.close()
            self._links.discard(link)
            if websocket.prepared:
                await _let_go(websocket)
        return websocket

    async def _greet(self, link: Link) -> None:
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                hello = wire.expect(await link.receive(), wire.Hello, link.peer)
        except TimeoutError:
            raise ProtocolError(f"peer {link.peer}: no Hello within {self._timeouts.connect_s:g} s") from None
        welcome = self._welcome()
        if hello.protocol != wire.PROTOCOL_VERSION:
            raise OtherVersionError(
                f"{hello.node} speaks protocol {hello.protocol}, {welcome.node} speaks {wire.PROTOCOL_VERSION}; "
                "run one flowspec version on both"
            )
        if hello.purpose != link.purpose:
            raise ProtocolError(f"peer {hello.node}: Hello for a {hello.purpose} link on the {link.purpose} path")
        link.accept(hello)
        THIS_PROCESS.add(link)
        link.send(welcome)
