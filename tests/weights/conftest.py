"""Nodes that hand out files over loopback, and a cache to fetch them into."""

import contextlib
import hashlib

import pytest
from aiohttp import web

from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.net.server import serve_app
from flowspec_edge.weights.cache import WeightCache
from flowspec_edge.weights.server import WeightServer


class Peer:
    """Hands out files as a node does. ``middleware`` may make it worse."""

    def __init__(self, name, files):
        self.name, self.files = name, {hashlib.sha256(data).hexdigest(): data for data in files}
        self.server = WeightServer(self.files.get)
        self.asked = []

    async def start(self, middleware=None):
        app = self.server.build_app()

        @web.middleware
        async def record(request, handler):
            self.asked.append((request.path.rpartition("/")[2], request.headers.get("Range")))
            return await handler(request)

        app.middlewares.append(record)
        if middleware is not None:
            app.middlewares.append(middleware)
        self.served = await serve_app(app)
        self.source = Source(self.name, "127.0.0.1", self.served.port)
        return self

    async def close(self):
        await self.served.close()
        self.server.close()


@pytest.fixture
async def peers():
    """Makes peers, and ends them."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(name, files, middleware=None):
            peer = await Peer(name, files).start(middleware)
            stack.push_async_callback(peer.close)
            return peer

        yield start


@pytest.fixture
def cache(tmp_path):
    return WeightCache(tmp_path / "weights")
