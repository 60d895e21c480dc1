"""Data links that come in, and the stages and rings that wait for them: they find each other by name, ``ring/hop``.

Every ring has a new name, so nothing of an earlier ring can ever arrive in a later one. A link may come before whoever
takes it, or after; one that nobody takes is closed after a while, unless somebody has said that it is expected.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from flowspec_edge.errors import LinkLostError, ProtocolError
from flowspec_edge.net.connection import Link

DATA_LINK_S = 120.0
"""How long a data link and whoever takes it wait for each other: the slower of the two may be reading gigabytes."""

MAX_UNCLAIMED = 64
"""Data links that may wait for somebody to take them. A node serves a few rings at a time, with one link each."""


class Arrivals:
    """The incoming data links of one node. Both sides wait ``limit_s`` for each other."""

    def __init__(self, limit_s: float = DATA_LINK_S) -> None:
        self.limit_s = limit_s
        self._expected: set[str] = set()
        self._links: dict[str, asyncio.Future[Link]] = {}

    @contextlib.contextmanager
    def expect(self, name: str) -> Iterator[None]:
        """A data link of that name will be taken, however long that may be from now."""
        self._expected.add(name)
        try:
            yield
        finally:
            self._expected.discard(name)
            self._links.pop(name, None)

    @contextlib.asynccontextmanager
    async def data_link(self, name: str, *, is_limited: bool = True) -> AsyncIterator[Link]:
        """The link of that name, as soon as the peer has opened it; without a limit, however long that takes.

        Raises:
            LinkLostError: it did not come in time.
        """
        arrival = self._arrival(name)
        try:
            async with asyncio.timeout(self.limit_s if is_limited else None):
                link = await asyncio.shield(arrival)
        except TimeoutError:
            raise LinkLostError(
                f"the data link {name} was not opened within {self.limit_s:.0f} s; is the node before stuck?"
            ) from None
        finally:
            self._links.pop(name, None)
        try:
            yield link
        finally:
            await link.close()

    async def serve(self, link: Link) -> None:
        """Hand a link over to whoever waits for it, or will; until the link has ended.

        Raises:
            ProtocolError: there is one of that name already, nobody takes it, or too many wait already.
        """
        name = link.hello.ring
        if name not in self._links and name not in self._expected:
            waiting = sum(arrival.done() for arrival in self._links.values())
            if waiting >= MAX_UNCLAIMED:
                raise ProtocolError(
                    f"peer {link.peer}: {waiting} data links wait here for somebody to take them, the limit "
                    "(MAX_UNCLAIMED)"
                )
        arrival = self._arrival(name)
        if arrival.done():
            raise ProtocolError(f"peer {link.peer}: a second data link {name}")
        arrival.set_result(link)
        closed = asyncio.create_task(link.wait_closed(), name=f"end of {name}")
        try:
            has_ended, _ = await asyncio.wait({closed}, timeout=self.limit_s)
            if self._links.get(name) is arrival and name not in self._expected:
                del self._links[name]
                if has_ended:  # as where a ring is given up while it opens
                    return
                raise ProtocolError(f"peer {link.peer}: nobody here expected the data link {name}")
            await closed
        finally:
            closed.cancel()

    def _arrival(self, name: str) -> asyncio.Future[Link]:
        return self._links.setdefault(name, asyncio.get_running_loop().create_future())
