"""Generations for the HTTP API: one ring, opened at the first request, and opened anew when something in it was lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node import Bundle, Node
from flowspec_edge.planning import PlanWishes
from flowspec_edge.ring import OnFetch, Ring, open_ring

Search = Callable[[], Awaitable[Sequence[Announcement]]]


class GenerationService:
    """Answers prompts of several users over one ring, which they share."""

    def __init__(
        self, node: Node, bundle: Bundle, search: Search, on_fetch: OnFetch, wishes: PlanWishes | None
    ) -> None:
        self._node = node
        self._bundle = bundle
        self._search = search
        self._on_fetch = on_fetch
        self._wishes = wishes
        self._ring: Ring | None = None
        self._opening = asyncio.Lock()
        self._closing = contextlib.AsyncExitStack()

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        node: Node,
        bundle: Bundle,
        search: Search,
        on_fetch: OnFetch = lambda plan, num_bytes, total_bytes: None,
        wishes: PlanWishes | None = None,
    ) -> AsyncIterator[GenerationService]:
        """``search`` finds the nodes to serve with, each time a ring is opened; the others are those of ``open_ring``."""
        service = cls(node, bundle, search, on_fetch, wishes)
        try:
            yield service
        finally:
            await service._closing.aclose()

    @property
    def model(self) -> str:
        return self._bundle.manifest.name

    async def generate(self, prompt: str, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer; see :meth:`Ring.generate`, and :func:`open_ring` for what may go wrong before."""
        ring = await self._open()
        async with contextlib.aclosing(ring.generate(prompt, options)) as answer:
            async for piece in answer:
                yield piece

    async def _open(self) -> Ring:
        async with self._opening:
            if self._ring is None or not self._ring.is_open:
                self._ring = None
                await self._closing.aclose()
                found = await self._search()
                opening = open_ring(self._node, self._bundle, found, on_fetch=self._on_fetch, wishes=self._wishes)
                self._ring = await self._closing.enter_async_context(opening)
            return self._ring
