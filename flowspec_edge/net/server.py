"""Serves one aiohttp application on one port, and ends it cleanly."""

from __future__ import annotations

import asyncio
import errno
import ssl
from typing import cast

from aiohttp import web

from flowspec_edge.core.cluster.address import Address
from flowspec_edge.errors import NodeUnavailableError, plain_text, system_words
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.auth import HANDSHAKE_S
from flowspec_edge.net.door import Door

_REMEDIES = {
    errno.EADDRINUSE: "something listens there already, perhaps another node; give another --port, or end that",
    errno.EACCES: "ports below 1024 are for root; give another --port",
}
SHUTDOWN_S = 2.0
"""How long requests in progress may go on after close. The 60 s that aiohttp gives them would delay an exit."""

MAX_FAULT_CHARACTERS = 300
BACKLOG = 1024
"""Connections that may wait to be accepted. The system drops one beyond that, and who comes is a second late: with
aiohttp's 128 members were, where an outsider opened a thousand at once. Linux allows 4096."""


class ServedApp:
    """A listening application. ``port`` is the actual port, also where 0 was asked for."""

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self.host = host
        self.port = port

    async def close(self) -> None:
        """Stop listening, give requests in progress SHUTDOWN_S, then cancel them. May be called twice."""
        await self._runner.cleanup()


class _Protocol(web.RequestHandler):
    """One connection. What is no HTTP is told as JSON, as everything else is, and not logged: it is the client's."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if status >= 500:
            super().handle_error(request, status, exc, message)
            message = "the server failed at this request; its log tells more"
        elif request.writer.output_size > 0:
            raise ConnectionError("an answer has begun")
        fault = plain_text(" ".join((message or "").split())[:MAX_FAULT_CHARACTERS])
        kind = "invalid_request_error" if status < 500 else "server_error"
        error = {"message": f"the request cannot be read: {fault}" if status < 500 else fault, "type": kind}
        response = web.json_response({"error": {**error, "param": None, "code": None}}, status=status)
        response.force_close()
        return response


class _Site(web.BaseSite):
    """A site behind a :class:`Door`."""

    def __init__(self, runner: web.AppRunner, host: str, port: int, tls: ssl.SSLContext | None, door: Door) -> None:
        super().__init__(runner, ssl_context=tls, backlog=BACKLOG)
        self._address = Address(host, port)
        self._door = door

    @property
    def name(self) -> str:
        return f"{'https' if self._ssl_context else 'http'}://{self._address}"

    async def start(self) -> None:
        await super().start()
        assert self._runner.server is not None
        await self._door.listen(self._address.host, self._address.port, self._connect, self._backlog)
        self._server = cast(asyncio.AbstractServer, self._door)  # of which a site uses close and sockets

    def _connect(self) -> _Protocol:
        assert self._runner.server is not None, "started before"
        return _Protocol(self._runner.server, loop=asyncio.get_running_loop(), access_log=None)  # type: ignore[arg-type]  # as a runner gives it


async def serve_app(
    app: web.Application,
    host: str = LOOPBACK,
    port: int = 0,
    *,
    tls: ssl.SSLContext | None = None,
    cancels_on_disconnect: bool = False,
    explains_tls: bool = False,
) -> ServedApp:
    """Listen on ``host:port``. With ``cancels_on_disconnect`` a request's task is cancelled when its client leaves.
    With ``explains_tls`` a client that speaks plain HTTP where TLS is spoken is told so.

    Raises:
        NodeUnavailableError: the address cannot be listened on.
    """
    door = Door(tls, HANDSHAKE_S, explains_tls=explains_tls)
    door.watch(app)
    runner = web.AppRunner(
        app, access_log=None, shutdown_timeout=SHUTDOWN_S, handler_cancellation=cancels_on_disconnect
    )
    await runner.setup()
    try:
        await _Site(runner, host, port, tls, door).start()
    except OSError as cause:
        await runner.cleanup()
        words = system_words(cause)
        raise NodeUnavailableError(
            f"cannot listen on {Address(host, port)}: {words[:1].lower()}{words[1:]}; "
            f"{_REMEDIES.get(cause.errno or 0, 'see that this machine has such an address')}"
        ) from cause
    return ServedApp(runner, host, int(runner.addresses[0][1]))
