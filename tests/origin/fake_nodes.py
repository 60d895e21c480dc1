"""Nodes without sockets or layers, as an origin finds them: each answers on its control link as a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.arrivals import Arrivals
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.resources import NodeSettings
from tests.fake_links import FakeLink, fake_pair

GIB = 2**30

Answer = Callable[["FakeNode", wire.Message], Awaitable[list[wire.Message]]]


class FakeNode:
    """Notes what it is asked, and answers each message with those that ``answer`` gives."""

    def __init__(self, network: FakeNetwork, name: str, number: int, bundles: list[str], can_fetch: bool) -> None:
        self.network, self.name = network, name
        self.announcement = Announcement(
            node=name, host=f"192.0.2.{10 + number}", port=7361, cluster="test", version="0.1.0", fingerprint=""
        )
        self.welcome = wire.Welcome(name, "0.1.0", GIB, bundles, can_fetch)
        self.asked: list[wire.Message] = []
        self.controls: list[FakeLink] = []
        self.data: list[FakeLink] = []
        self.answer: Answer = open_stage
        self.is_gone = False

    async def serve(self, link: FakeLink) -> None:
        (self.controls if link.purpose == wire.CONTROL else self.data).append(link)
        async for message in link:
            self.asked.append(message)
            for answer in await self.answer(self, message):
                link.send(answer)

    @property
    def request(self) -> wire.OpenStage:
        (found,) = (message for message in self.asked if isinstance(message, wire.OpenStage))
        return found


async def open_stage(node: FakeNode, message: wire.Message) -> list[wire.Message]:
    """Opens what it is asked for; the last stage connects back to the origin."""
    match message:
        case wire.OpenStage():
            if message.next_node == node.network.settings.name:
                node.network.connect_back(f"{message.ring}/{message.hop + 1}")
            return [wire.StageOpened(message.ring, 1000 + message.hop, 20, message.hop)]
    return []


class FakeNetwork:
    """The nodes there are, and the origin's own: it stands in for a Node, and for ``open_link``."""

    def __init__(self, bundle: Bundle, *names: str) -> None:
        self.bundle = bundle
        self.settings = NodeSettings(name="origin", cluster="test", bundles=(bundle,), num_threads=2)
        self.port, self.arrivals, self.board = 7000, Arrivals(), Board()
        self.nodes = {name: FakeNode(self, name, number, [bundle.digest], False) for number, name in enumerate(names)}
        self.returned: FakeLink | None = None
        self.near: list[FakeLink] = []  # the origin's ends, as they were opened
        self.hellos: list[tuple[str, wire.Hello]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def energy(self) -> wire.EnergyTaken | None:
        return None

    @property
    def found(self) -> list[Announcement]:
        return [node.announcement for node in self.nodes.values()]

    async def open_link(
        self, host: str, port: int, hello: wire.Hello, *, node: str = "", **options: Any
    ) -> tuple[Link, wire.Welcome]:
        self.hellos.append((node, hello))
        reached = self.nodes[node]
        assert (host, port) == (reached.announcement.host, reached.announcement.port)
        if reached.is_gone:
            raise NodeUnavailableError(f"peer {node} cannot be reached")
        near, far = fake_pair("origin", node, hello.purpose, hello.ring)
        self._spawn(reached.serve(far))
        self.near.append(near)
        return near, reached.welcome

    def connect_back(self, name: str) -> None:
        self.returned, far = fake_pair("last", "origin", wire.DATA, name)
        self._spawn(self.arrivals.serve(far))

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Afterwards all links are closed, by whoever had to."""
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
