"""An answer as a stream of events: its pieces, signs of life between them, and the error that ends it early."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from aiohttp import web

from flowspec_edge.errors import FlowspecError, ServerEndingError
from flowspec_edge.web.asked import Asked, ChoicePiece
from flowspec_edge.web.framing import Json
from flowspec_edge.web.refusals import log_failure, refusal_of

HEADERS_S = 0.5
"""How long errors have to become a status of the response. Then its headers leave, and later errors are events."""
SIGN_S = 2.0
"""How long a stream may be silent before it says that the server is there; the client takes five times that for a loss.
"""
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""The last one keeps nginx from holding events back."""
READ_S = 120.0
"""How long a client may take nothing of what is sent to it. Meanwhile it has a turn that others wait for."""


async def paced(
    pieces: AsyncGenerator[ChoicePiece, None], ending: asyncio.Event
) -> AsyncGenerator[ChoicePiece | None, None]:
    """The pieces, and a None whenever none came for SIGN_S; before the first piece also one after HEADERS_S.

    Raises:
        ServerEndingError: ``ending`` is set.
    """

    async def take() -> ChoicePiece | None:
        return await anext(pieces, None)

    silence_s = HEADERS_S
    taking, ended = asyncio.create_task(take()), asyncio.create_task(ending.wait())
    try:
        while True:
            await asyncio.wait({taking, ended}, timeout=silence_s, return_when=asyncio.FIRST_COMPLETED)
            silence_s = SIGN_S
            if taking.done():
                if (piece := taking.result()) is None:
                    return
                yield piece
                taking = asyncio.create_task(take())
            elif ended.done():
                raise ServerEndingError("the server ends; ask again when it is back, or another one")
            else:
                yield None
    finally:
        taking.cancel()
        ended.cancel()
        await asyncio.wait({taking, ended})
        if not taking.cancelled():
            taking.exception()  # nobody is left to hear of it


async def stream(
    request: web.Request,
    pieces: AsyncGenerator[ChoicePiece | None, None],
    asked: Asked,
    headers: Mapping[str, str],
    waits_for: Callable[[], str],
) -> web.StreamResponse:
    """Send an answer as events. Errors within HEADERS_S and before its first piece are raised, later ones are sent.

    ``waits_for`` is what signs of life tell, where it is not empty. A client that reads slowly holds up its own answer
    alone; one that reads nothing for READ_S is disconnected.
    """
    try:
        first = [await anext(pieces)]
    except StopAsyncIteration:  # nothing is asked for
        first = []
    headers = {**headers, **UNBUFFERED, "Content-Type": asked.framing.content_type}
    response = web.StreamResponse(headers=headers)
    with contextlib.suppress(ConnectionResetError):  # the client has left
        await response.prepare(request)
        writer = _EventWriter(request, response, asked, waits_for)
        try:
            for piece in first:
                await writer.send_piece(piece)
            async for piece in pieces:
                await writer.send_piece(piece)
        except FlowspecError as cause:
            log_failure(cause)
            await writer.send([asked.failed(refusal_of(cause))])
        else:
            await writer.send(asked.form.last_events())
            await writer.write(asked.framing.end)
        await response.write_eof()
    return response


class _EventWriter:
    def __init__(
        self, request: web.Request, response: web.StreamResponse, asked: Asked, waits_for: Callable[[], str]
    ) -> None:
        self._request, self._response, self._asked, self._waits_for = request, response, asked, waits_for

    async def send_piece(self, written: ChoicePiece | None) -> None:
        """Notices and signs of life become comments, which clients pass over."""
        if written is None:
            await self.write(self._asked.framing.comment(self._waits_for() or "the server is there"))
        elif written.piece.notice is not None:
            await self.write(self._asked.framing.comment(written.piece.notice))
        else:
            await self.send(self._asked.form.events(*written))

    async def send(self, events: Sequence[Json]) -> None:
        await self.write(b"".join(map(self._asked.framing.event, events)))

    async def write(self, data: bytes) -> None:
        await send_within(self._request, self._response, data)


async def send_within(request: web.Request, response: web.StreamResponse, data: bytes) -> None:
    """Send a part of a response. Raises ConnectionResetError where the client has left, or takes nothing for READ_S and
    is disconnected.
    """
    if not data:
        return
    try:
        async with asyncio.timeout(READ_S):
            await response.write(data)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the client takes nothing") from None
