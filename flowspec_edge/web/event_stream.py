"""An answer as server-sent events: its pieces, signs of life between them, and the error that ends it early."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

from aiohttp import web

from flowspec_edge.config import Piece
from flowspec_edge.errors import FlowspecError, ServerEndingError
from flowspec_edge.web.refusals import error_object, log_failure

SIGN_S = 2.0
"""How long a stream may be silent before it says that the server is there; the client takes five times that for a loss.
"""


async def paced(pieces: AsyncGenerator[Piece, None], ending: asyncio.Event) -> AsyncGenerator[Piece | None, None]:
    """The pieces, and a None whenever none came for SIGN_S.

    Raises:
        ServerEndingError: ``ending`` is set.
    """

    async def take() -> Piece | None:
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
    request: web.Request,
    pieces: AsyncGenerator[Piece | None, None],
    part: Callable[[Piece], dict[str, Any]],
    *,
    is_patient: bool,
) -> web.StreamResponse:
    """Send an answer, of which ``part`` makes events. Errors before its first piece are raised, later ones are sent.

    A client that ``is_patient`` gets signs of life before the first piece as well, and then any error as an event.
    """
    first = await anext(pieces)
    while first is None and not is_patient:
        first = await anext(pieces)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    with contextlib.suppress(ConnectionResetError):  # the client has left
        await response.prepare(request)
        try:
            await _send_piece(response, first, part)
            async for piece in pieces:
                await _send_piece(response, piece, part)
        except FlowspecError as cause:
            log_failure(cause)
            await _send(response, error_object(cause))
        else:
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    return response


async def _send_piece(
    response: web.StreamResponse, piece: Piece | None, part: Callable[[Piece], dict[str, Any]]
) -> None:
    """Notices and signs of life become comments, which clients of server-sent events pass over."""
    if piece is None:
        await response.write(b": the server is there\n\n")
    elif piece.notice is not None:
        await response.write(f": {' '.join(piece.notice.split())}\n\n".encode())
    else:
        await _send(response, part(piece))


async def _send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(data)}\n\n".encode())
