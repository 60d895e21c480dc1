"""Nodes that hand out files, and nothing else."""

import hashlib
from collections.abc import Awaitable, Sequence
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.net.server import ServedApp, serve_app
from flowspec_edge.weights.server import WeightServer


class Peer:
    """Hands out files as a node does, as soon as it is started."""

    served: ServedApp
    source: Source

    def __init__(self, name: str, files: Sequence[bytes]) -> None:
        self.name, self.files = name, {hashlib.sha256(data).hexdigest(): data for data in files}
        self.server = WeightServer(self.files.get)
        self.asked: list[tuple[str, str | None]] = []
        """What was asked for: the last part of each path, and the range of bytes."""

    async def start(self, middleware: Middleware | None = None) -> "Peer":
        """``middleware`` may make it worse than a node is."""
        app = self.server.build_app()

        @web.middleware
        async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.asked.append((request.path.rpartition("/")[2], request.headers.get("Range")))
            return await handler(request)

        app.middlewares.append(record)
        if middleware is not None:
            app.middlewares.append(middleware)
        self.served = await serve_app(app)
        self.source = Source(self.name, "127.0.0.1", self.served.port)
        return self

    async def close(self) -> None:
        await self.served.close()
        self.server.close()


class MakePeer(Protocol):
    """The fixture ``peers``."""

    def __call__(self, name: str, files: Sequence[bytes], middleware: Middleware | None = None) -> Awaitable[Peer]: ...
