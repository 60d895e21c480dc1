"""What code leaves in memory that Python frees only when it looks for reference cycles, which may be in hours."""

import asyncio
import contextlib
import gc
from asyncio.sslproto import SSLProtocol
from collections import Counter
from collections.abc import Iterator

import aiohttp
from aiohttp import web

from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.net.connection import Link
from flowspec_edge.node.stage_host import StageHost
from flowspec_edge.origin.answer import Answer
from flowspec_edge.origin.engine import OriginEngine
from flowspec_edge.origin.ring import Ring

FREED_S = 10.0
"""How long the other end of a connection may take to see its end."""
OF_CONNECTIONS = {Link, SSLProtocol, aiohttp.ClientSession, aiohttp.ClientWebSocketResponse, web.WebSocketResponse}
OF_RINGS = {Ring, Origin, OriginEngine, Answer, StageHost, Stage}


def _living() -> Counter[str]:
    """How many there are of each kind of object that a closed connection or a lost ring could leave."""
    return Counter(kind.__name__ for kind in map(type, gc.get_objects()) if kind in OF_CONNECTIONS | OF_RINGS)


class LeftBehind:
    """Counts what has come since it was made."""

    def __init__(self) -> None:
        self._before = _living()

    def count(self) -> Counter[str]:
        return _living() - self._before

    async def until_nothing(self) -> None:
        """Wait until it is nothing; raises AssertionError where something stays."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FREED_S):
                while self.count():
                    await asyncio.sleep(0.02)
        left = self.count()
        assert not left, f"{dict(left)} stay"


@contextlib.contextmanager
def uncollected() -> Iterator[LeftBehind]:
    """Python looks for no reference cycles in the ``with`` block, and only at objects that are made there."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield LeftBehind()
    finally:
        gc.enable()
        gc.unfreeze()
