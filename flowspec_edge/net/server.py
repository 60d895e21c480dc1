"""One aiohttp application on one port, started and ended cleanly."""

from __future__ import annotations

from aiohttp import web

from flowspec_edge.errors import NodeUnavailableError

LOOPBACK = "127.0.0.1"
SHUTDOWN_S = 2.0
"""How long requests in progress may go on after close; aiohttp's own 60 s would hold up an exit."""


class ServedApp:
    """A listening application. ``port`` is the actual one where 0 was asked for."""

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self._runner = runner
        self.host = host
        self.port = port

    async def close(self) -> None:
        """Stop listening, give requests in progress SHUTDOWN_S, then cancel them. May be called twice."""
        await self._runner.cleanup()


async def serve_app(
    app: web.Application, host: str = LOOPBACK, port: int = 0, *, cancels_on_disconnect: bool = False
) -> ServedApp:
    """Listen on ``host:port``. With ``cancels_on_disconnect`` a request's task is cancelled when its client leaves.

    Raises:
        NodeUnavailableError: the address cannot be listened on.
    """
    runner = web.AppRunner(
        app, access_log=None, shutdown_timeout=SHUTDOWN_S, handler_cancellation=cancels_on_disconnect
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as cause:
        await runner.cleanup()
        raise NodeUnavailableError(
            f"cannot listen on {host}:{port} ({cause.strerror or cause}); is another node running? try another port"
        ) from cause
    return ServedApp(runner, host, int(runner.addresses[0][1]))
