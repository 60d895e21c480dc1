"""An answer as a stream of events: its pieces, signs of life between them, and the error that ends it early."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping

from aiohttp import web

from flowspec_edge.errors import FlowspecError, ServerEndingError
from flowspec_edge.web.asked import Asked, ChoicePiece
from flowspec_edge.web.refusals import log_failure, refusal_of

SIGN_S = 2.0
"""How long a stream may be silent before it says that the server is there; the client takes five times that for a loss.
"""


async def paced(
    pieces: AsyncGenerator[ChoicePiece, None], ending: asyncio.Event
) -> AsyncGenerator[ChoicePiece | None, None]:
    """The pieces, and a None whenever none came for SIGN_S.

    Raises:
        ServerEndingError: ``ending`` is set.
    """

    async def take() -> ChoicePiece | None:
        return await anext(pieces, None)

    taking, ended = asyncio.create_task(take()), asyncio.create_task(ending.wait())
    try:
        while True:
            await asyncio.wait({taking, ended}, timeout=SIGN_S, return_when=asyncio.FIRST_COMPLETED)
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
    request: web.Request, pieces: AsyncGenerator[ChoicePiece | None, None], asked: Asked, headers: Mapping[str, str]
) -> web.StreamResponse:
    """Send an answer as events. Errors before its first piece are raised, later ones are sent.

    A client that is patient gets signs of life before the first piece as well, and then any error as an event.
    """
    first: ChoicePiece | None = None
    async for first in pieces:
        if first is not None or asked.is_patient:
            break
    framing = asked.framing
    headers = {**headers, "Content-Type": framing.content_type, "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    with contextlib.suppress(ConnectionResetError):  # the client has left
        await response.prepare(request)
        try:
            await _send(response, first, asked)
            async for piece in pieces:
                await _send(response, piece, asked)
        except FlowspecError as cause:
            log_failure(cause)
            await response.write(framing.event(asked.failed(refusal_of(cause))))
        else:
            await response.write(b"".join(map(framing.event, asked.form.last_events())) + framing.end)
        await response.write_eof()
    return response


async def _send(response: web.StreamResponse, written: ChoicePiece | None, asked: Asked) -> None:
    """Notices and signs of life become comments, which clients pass over."""
    if written is None:
        sent = asked.framing.comment("the server is there")
    elif written.piece.notice is not None:
        sent = asked.framing.comment(written.piece.notice)
    else:
        sent = b"".join(map(asked.framing.event, asked.form.events(*written)))
    if sent:
        await response.write(sent)
