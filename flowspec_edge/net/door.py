"""Accepts connections, and bounds what those cost that have not shown yet that they want something.

A connection is silent until its first bytes come, and costs a descriptor. Then it is new until its first request has
come, TLS handshake included, and costs some 300 KB with TLS. Of either kind so many are kept, in total and of one
address; where there are more, the oldest are closed, since a member speaks at once and is through within milliseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import resource
import socket
import ssl
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from flowspec_edge.allocator import give_back_freed
from flowspec_edge.errors import release_frames
from flowspec_edge.net.plain_http import answer_plain_http
from flowspec_edge.net.visitors import Room, Visitor

MAX_SILENT, MAX_SILENT_PER_ADDRESS = 512, 256
"""A descriptor each."""
MAX_NEW, MAX_NEW_PER_ADDRESS = 128, 32
"""Twice as many as a ring of 16 nodes on one machine opens at once; 40 MB and 10 MB with TLS."""
REQUEST_S = 5.0
"""For the first request, once the handshake is done. A member sends it at once."""
LEFT_S = 0.1
"""How often to look whether one has left before it asked."""
ACCEPTS_PER_TURN = 64
"""Connections accepted before other callbacks of the event loop get their turn."""
NUM_FREED = 64
"""Silent connections that are closed where there are no descriptors left."""
FULL_RETRY_S, FULL_LOG_S = 0.2, 60.0
"""Where none of those is silent: when to accept again. And how often to say that there are none left."""
CROWD, CALM_S = 32, 5.0
"""So long after so many have left who asked for nothing, their memory goes back to the system."""
MAX_DESCRIPTORS = 65536
"""More would only make it slow to start other programs."""
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_AddressInfo = tuple[int, int, int, str, Any]
"""Family, kind, protocol, name, address."""

_log = logging.getLogger(__name__)


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may ask for. Its soft limit is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Door:
    """Listens on sockets, and hands the connections whose first bytes have come to the protocols of an application.

    A TLS handshake takes ``handshake_s`` at most, and so does silence before it. With ``explains_tls`` who speaks HTTP
    where TLS is spoken is told so.
    """

    def __init__(self, tls: ssl.SSLContext | None, handshake_s: float, *, explains_tls: bool = False) -> None:
        self._tls, self._handshake_s = tls, handshake_s
        self._explains_tls = explains_tls and tls is not None
        self._factory: Callable[[], asyncio.BaseProtocol] = asyncio.Protocol
        self._loop = asyncio.get_running_loop()
        self._silent = Room(MAX_SILENT, MAX_SILENT_PER_ADDRESS)
        self._new = Room(MAX_NEW, MAX_NEW_PER_ADDRESS)
        self._by_protocol: dict[asyncio.BaseProtocol, Visitor] = {}
        self._num_idle = 0  # who left since memory was given back and had asked for nothing
        self._calming: asyncio.TimerHandle | None = None
        self._retrying: asyncio.TimerHandle | None = None
        self._told_full_at = float("-inf")
        self.sockets: list[socket.socket] = []

    async def listen(self, host: str, port: int, factory: Callable[[], asyncio.BaseProtocol], backlog: int) -> None:
        """Listen on all addresses of ``host``. ``factory`` makes a protocol for each connection.

        Raises:
            OSError: an address cannot be listened on; then none is.
        """
        self._factory = factory
        try:
            for family, kind, protocol, _, address in await self._resolve(host, port):
                listening = socket.socket(family, kind, protocol)
                self.sockets.append(listening)
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listening.setblocking(False)
                listening.bind(address)
                listening.listen(backlog)
        except OSError:
            self.close()
            raise
        self._start_accepting()

    def close(self) -> None:
        """Stop listening, and close all that have not asked for anything."""
        self._stop_accepting()
        for timer in (self._retrying, self._calming):
            if timer is not None:
                timer.cancel()
        for listening in self.sockets:
            listening.close()
        self.sockets = []
        for visitor in (*self._silent, *self._new):
            self._turn_away(visitor)

    async def _resolve(self, host: str, port: int) -> list[_AddressInfo]:
        kind, flags = socket.SOCK_STREAM, socket.AI_PASSIVE
        try:  # a number needs no thread
            found = socket.getaddrinfo(host or None, port, type=kind, flags=flags | socket.AI_NUMERICHOST)
        except socket.gaierror:
            found = await self._loop.getaddrinfo(host, port, type=kind, flags=flags)
        return list(dict.fromkeys(found))

    def watch(self, app: web.Application) -> None:
        """Have the application tell of the first request of each connection."""

        @web.middleware
        async def note(request: web.Request, handler: Handler) -> web.StreamResponse:
            if (visitor := self._by_protocol.get(request.protocol)) is not None:
                visitor.has_asked.set()
            try:
                return await handler(request)
            except ConnectionResetError:  # the client has left before its answer began, and nobody reads this one
                return web.Response()

        app.middlewares.insert(0, note)

    # ------------------------------------------------------------------ accepting

    def _start_accepting(self) -> None:
        for listening in self.sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def _stop_accepting(self) -> None:
        for listening in self.sockets:
            if listening.fileno() >= 0:
                self._loop.remove_reader(listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as cause:
                if cause.errno not in _EXHAUSTED:
                    raise
                self._make_room(cause)
                return
            connection.setblocking(False)
            visitor = Visitor(connection, str(address[0]))
            visitor.timer = self._loop.call_later(self._handshake_s, self._turn_away, visitor)
            self._loop.add_reader(connection, self._hear, visitor)
            if (leaving := self._silent.add(visitor)) is not None:
                self._turn_away(leaving)

    def _make_room(self, cause: OSError) -> None:
        """There are no descriptors left: close silent connections, or accept again a little later."""
        now = self._loop.time()
        if now - self._told_full_at >= FULL_LOG_S:
            self._told_full_at = now
            _log.warning("no connection can be accepted (%s); see ulimit -n", cause.strerror)
        if self._silent:
            for _ in range(min(NUM_FREED, len(self._silent))):
                self._turn_away(self._silent.oldest())
            return
        self._stop_accepting()
        self._retrying = self._loop.call_later(FULL_RETRY_S, self._start_accepting)

    # ------------------------------------------------------------------ visitors

    def _hear(self, visitor: Visitor) -> None:
        """The first bytes have come, or the end."""
        self._silence_ended(visitor)
        if self._explains_tls and answer_plain_http(visitor.connection):
            visitor.connection.close()
            return
        visitor.task = self._loop.create_task(self._let_in(visitor), name=f"visitor at {visitor.address}")
        visitor.task.add_done_callback(lambda _: self._leave(visitor))
        leaving = self._new.add(visitor)
        if leaving is not None:
            self._turn_away(leaving)

    def _silence_ended(self, visitor: Visitor) -> None:
        self._silent.remove(visitor)
        self._loop.remove_reader(visitor.connection)
        if visitor.timer is not None:
            visitor.timer.cancel()

    def _turn_away(self, visitor: Visitor) -> None:
        if visitor.task is not None:
            self._new.remove(visitor)
            visitor.task.cancel()
            return
        self._silence_ended(visitor)
        visitor.connection.close()
        self._count_idle()

    async def _let_in(self, visitor: Visitor) -> None:
        """Until its first request has come, or it is closed."""
        visitor.is_let_in = True
        limit_s = self._handshake_s if self._tls is not None else None
        protocol = self._factory()
        self._by_protocol[protocol] = visitor  # before: a request may come in one packet with the handshake's end
        transport: asyncio.Transport | None = None
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: protocol, visitor.connection, ssl=self._tls, ssl_handshake_timeout=limit_s
            )
            deadline = self._loop.time() + REQUEST_S
            while not visitor.has_asked.is_set() and not transport.is_closing() and self._loop.time() < deadline:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LEFT_S):
                        await visitor.has_asked.wait()
        except (OSError, asyncio.CancelledError) as cause:  # no handshake (ssl's errors are OSErrors), or turned away
            release_frames(cause)
        finally:
            del self._by_protocol[protocol]
            if transport is not None and not visitor.has_asked.is_set():
                transport.abort()

    def _leave(self, visitor: Visitor) -> None:
        """It asks from now on, or is closed."""
        self._new.remove(visitor)
        if not visitor.is_let_in:  # turned away before the task began
            visitor.connection.close()
        if not visitor.has_asked.is_set():
            self._count_idle()

    def _count_idle(self) -> None:
        self._num_idle += 1
        if self._num_idle >= CROWD and self._calming is None and self.sockets:
            self._calming = self._loop.call_later(CALM_S, self._calm)

    def _calm(self) -> None:
        """Give memory back, or look again a little later."""
        self._calming = None
        if len(self._new):
            self._calming = self._loop.call_later(LEFT_S, self._calm)
        else:
            self._num_idle = 0
            threading.Thread(target=_give_back, name="giving memory back", daemon=True).start()


def _give_back() -> None:
    """Takes 15 ms on x86. Of a crowd that misbehaves in many ways some connections lie in reference cycles still."""
    gc.collect()
    give_back_freed()
