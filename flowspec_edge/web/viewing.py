"""``GET /events``: what the ring and its texts are at, for a page that draws it, as one stream of events.

Each event tells all of its kind anew, so that a viewer may miss any: ``service`` every FACTS_S, and ``work`` whenever
it may have changed, at least WORK_S apart. A viewer that reads slowly gets fewer, each of which tells what is then, and
nothing is kept for it. While nobody views, nothing is computed.

Who views sees of every text how it grows, and reads only the words of texts that were asked for under the same label:
a header, by which a page joins its own stream and its own requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

import msgspec
from aiohttp import web

from flowspec_edge.errors import ServerBusyError
from flowspec_edge.origin.view import ServiceView, WorkView
from flowspec_edge.version import __version__
from flowspec_edge.web.event_stream import UNBUFFERED, send_within
from flowspec_edge.web.framing import Json
from flowspec_edge.web.turns import RETRY_S, Turns

PATH = "/events"
LABEL = "X-Flowspec-Label"
WORK_S, IDLE_S, FACTS_S, ADVICE_S = 1 / 15, 0.25, 1.0, 10.0
"""How often a viewer is told what texts are at, while there are some; how often to look for one while there are none;
how often all else is told; and how old advice may be. Between two events a page moves things by itself.
"""
MAX_VIEWERS = 8
"""Each costs the origin a hundredth of a core (x86, docs/page.md)."""
_LABEL_FORM = re.compile(r"[A-Za-z0-9_-]{1,64}")

Advise = Callable[[], Json]
"""Tells what whoever runs the cluster could do: boards that cannot be used, and how another one joins."""


class Watched(Protocol):
    """What is viewed. ``look`` tells what the ring is at, with what ended behind ``since``; None while none is open."""

    def view(self) -> ServiceView: ...

    def look(self, label: str, since: float) -> WorkView | None: ...


class Viewed(NamedTuple):
    service: Watched
    advise: Advise = dict


def label_of(request: web.Request) -> str:
    """Under which label a text was asked for, or a viewer came; empty where that is no label."""
    given = request.headers.get(LABEL, "")
    return given if _LABEL_FORM.fullmatch(given) else ""


class Viewing:
    """Serves the stream to as many viewers as there may be."""

    def __init__(self, viewed: Viewed, turns: Turns) -> None:
        self._service, self._advise = viewed
        self._turns = turns
        self._advice: Json = {}
        self._advised_at = float("-inf")
        self._num_viewers = 0
        self._ending = asyncio.Event()

    def install(self, app: web.Application) -> None:
        app.router.add_get(PATH, self._serve)
        app.on_shutdown.append(self._end)

    async def _end(self, app: web.Application) -> None:
        self._ending.set()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if self._num_viewers >= MAX_VIEWERS:
            text = f"{MAX_VIEWERS} pages view this server, and that is as many as may; close one"
            raise ServerBusyError(text, retry_after_s=RETRY_S)
        self._num_viewers += 1
        try:
            response = web.StreamResponse(headers={**UNBUFFERED, "Content-Type": "text/event-stream"})
            with contextlib.suppress(ConnectionResetError):  # the viewer has left
                await response.prepare(request)
                async for data in self._events(label_of(request)):
                    await send_within(request, response, data)
                await response.write_eof()
            return response
        finally:
            self._num_viewers -= 1

    async def _events(self, label: str) -> AsyncIterator[bytes]:
        """What is to be sent now, each time that the viewer has taken what was sent before."""
        told_at = worked_at = float("-inf")
        is_moving = False
        while not self._ending.is_set():
            if (now := time.monotonic()) - told_at >= FACTS_S:
                told_at = now
                yield _event("service", self._facts(now))
            work = self._service.look(label, worked_at)
            was_moving, is_moving = is_moving, work is not None and bool(work.texts)
            if work is not None and (is_moving or was_moving):
                worked_at = work.now
                yield _event("work", work)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WORK_S if is_moving else IDLE_S):
                    await self._ending.wait()

    def _facts(self, now: float) -> Json:
        if now - self._advised_at >= ADVICE_S:
            self._advised_at, self._advice = now, self._advise()
        turns = self._turns
        texts = {"running": turns.num_writing, "waiting": turns.num_waiting, "most": turns.limits.max_sessions}
        return {
            "at": now,
            "version": __version__,
            "service": self._service.view(),
            "texts": texts,
            "advice": self._advice,
        }


def _event(kind: str, told: Json | WorkView) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(told))
