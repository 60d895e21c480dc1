"""An answer as server-sent events: its pieces, signs of life between them, and the error that ends it early."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from aiohttp import web

from flowspec_edge.errors import FlowspecError, ServerEndingError
from flowspec_edge.web.asked import AnswerForm, Asked, ChoicePiece
from flowspec_edge.web.refusals import error_object, log_failure

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
    first = await anext(pieces)
    while first is None and not asked.is_patient:
        first = await anext(pieces)
    response = web.StreamResponse(headers={**headers, "Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    with contextlib.suppress(ConnectionResetError):  # the client has left
        await response.prepare(request)
        try:
            await _send_piece(response, first, asked.form)
            async for piece in pieces:
                await _send_piece(response, piece, asked.form)
        except FlowspecError as cause:
            log_failure(cause)
            await _send(response, error_object(cause))
        else:
            for event in asked.form.last_events():
                await _send(response, event)
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    return response


async def _send_piece(response: web.StreamResponse, written: ChoicePiece | None, form: AnswerForm) -> None:
    """Notices and signs of life become comments, which clients of server-sent events pass over."""
    if written is None:
        await response.write(b": the server is there\n\n")
    elif written.piece.notice is not None:
        await response.write(f": {' '.join(written.piece.notice.split())}\n\n".encode())
    else:
        for event in form.events(*written):
            await _send(response, event)


async def _send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(data)}\n\n".encode())
