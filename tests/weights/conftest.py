"""Nodes that hand out files over loopback, and a cache to fetch them into."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from aiohttp.typedefs import Middleware

from flowspec_edge.weights.cache import WeightCache
from tests.weights.peers import MakePeer, Peer


@pytest.fixture
async def peers() -> AsyncIterator[MakePeer]:
    """Makes peers, and ends them."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(name: str, files: Sequence[bytes], middleware: Middleware | None = None) -> Peer:
            peer = await Peer(name, files).start(middleware)
            stack.push_async_callback(peer.close)
            return peer

        yield start


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "weights")
