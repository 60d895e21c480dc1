"""A pair of links without sockets: what one end sends arrives at the other at once, as the same object."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from flowspec_edge.core import wire
from flowspec_edge.errors import FlowspecError, LinkLostError
from flowspec_edge.net.connection import Link
from flowspec_edge.net.sent_packets import Packets

LIMIT_S = 5.0
"""A bound on waiting for a message; nothing takes this long unless the test fails."""


class FakeLink(Link):
    """One end. ``peer`` is who sits at the other one."""

    def __init__(self, peer: str, purpose: str = wire.CONTROL, hello: wire.Hello | None = None) -> None:
        self.peer, self.purpose = peer, purpose
        self.local_host, self.peer_host = "192.0.2.1", "192.0.2.2"
        self._hello = hello
        self._other: FakeLink | None = None
        self._came: deque[wire.Message] = deque()
        self._changed = asyncio.Event()
        self._closed = asyncio.Event()
        self._end = None
        self._is_clean = False
        self.packets = Packets(0, 0)  # what is told of them next
        self.num_probes = self.num_vouched = 0
        self.is_silent = False  # whether its peer answers no questions
        self.closed_by: FlowspecError | None = None  # what the other end gave as its reason

    def send(self, message: wire.Message) -> None:
        if self._end is not None:
            raise self._end
        if self._other is not None and self._other._end is None:
            self._other._came.append(message)
            self._other._changed.set()

    async def receive(self) -> wire.Message:
        async with asyncio.timeout(LIMIT_S):
            while not self._came:
                if self._end is not None:
                    raise self._end
                self._changed.clear()
                await self._changed.wait()
        return self._came.popleft()

    async def deliver(
        self, take: Callable[[wire.Message], None], tell_room: Callable[[bool], None] = lambda has_room: None
    ) -> None:
        self.tell_room = tell_room
        while True:
            take(await self.receive())

    def received(self) -> list[wire.Message]:
        """All that has come and was not taken yet."""
        taken = list(self._came)
        self._came.clear()
        return taken

    def probe(self) -> None:
        self.num_probes += 1

    def vouch(self) -> None:
        self.num_vouched += 1

    def take_packets(self) -> Packets:
        taken, self.packets = self.packets, Packets(0, 0)
        return taken

    async def answers(self, within_s: float) -> bool:
        if self.is_silent:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._closed.wait()
        return self._end is None and not self.is_silent

    async def close(self, error: FlowspecError | None = None) -> None:
        self._end_with(error or LinkLostError(f"peer {self.peer}: the link was closed here"), is_clean=error is None)
        if self._other is not None:
            self._other.closed_by = self._other.closed_by or error
            self._other._end_with(LinkLostError(f"peer {self._other.peer} closed the link"), is_clean=error is None)

    def cut(self) -> None:
        """Both ends lose it."""
        for end in (self, self._other):
            if end is not None:
                end._end_with(LinkLostError(f"peer {end.peer}: the {end.purpose} link was lost"), is_clean=False)

    def abort(self) -> None:
        self._end_with(LinkLostError(f"peer {self.peer}: the link was given up here"), is_clean=False)

    async def wait_closed(self) -> None:
        await self._closed.wait()

    def _end_with(self, end: FlowspecError, *, is_clean: bool) -> None:
        if self._end is None:
            if isinstance(end, LinkLostError) and self.purpose == wire.DATA:
                end.neighbour = self.peer
            self._end, self._is_clean = end, is_clean
        self._changed.set()
        self._closed.set()


def fake_pair(near: str, far: str, purpose: str = wire.CONTROL, ring: str = "ring-1") -> tuple[FakeLink, FakeLink]:
    """The ends at ``near``, which has connected, and at ``far``; a data link's ``ring`` names ring and hop."""
    hello = wire.Hello(near, "0.1.0", wire.PROTOCOL_VERSION, purpose, ring)
    ends = FakeLink(far, purpose, hello), FakeLink(near, purpose, hello)
    ends[0]._other, ends[1]._other = ends[1], ends[0]
    return ends


async def settle() -> None:
    """Let every task go on until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)
