"""The HTTP API: routes, keys, and what every answer has in common whichever dialect it speaks.

Answers are streamed as server-sent events where the client asks for that. A stream whose answer waits for boards says
so in comments. A client that leaves cancels its generation. Every error is JSON in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from flowspec_edge.config import Piece
from flowspec_edge.errors import FlowspecError, RequestError, plain_text
from flowspec_edge.web.asked import Asked, AskedText, TextGenerator, joined, side_by_side
from flowspec_edge.web.chat import Chat
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.completions import Completions
from flowspec_edge.web.event_stream import paced, stream
from flowspec_edge.web.fields import read_body
from flowspec_edge.web.guard import KEY_NAME, Guard
from flowspec_edge.web.health import HealthRoutes
from flowspec_edge.web.metrics import Metrics, Status
from flowspec_edge.web.refusals import log_failure, refuse, refuse_as
from flowspec_edge.web.request_log import install_request_log, note_piece
from flowspec_edge.web.turns import Holder, TurnLimits, Turns

MAX_REQUEST_BYTES = 4 * 2**20
"""Enough for a prompt of a million tokens."""
DRAIN_S = 1.0
"""How long texts may go on when the server ends; systemd and users wait for ten times that."""
WARNING = "X-Flowspec-Warning"
"""The header that names what was passed over."""


class Dialect(Protocol):
    async def read(self, body: bytes) -> Asked:
        """What a request with this body asks for. Raises FlowspecError where that cannot be."""


def build_app(
    generator: TextGenerator,
    guard: Guard | None = None,
    limits: TurnLimits | None = None,
    *,
    chat: ChatTemplate | None = None,
    is_strict: bool = False,
    status: Status | None = None,
) -> web.Application:
    """Routes ``POST /v1/completions``, ``GET /v1/models``, ``/health``, ``/ready`` and ``/metrics``, and where there is
    a template for ``chat`` also ``POST /v1/chat/completions``; serve it with ``cancels_on_disconnect``.

    ``guard`` says who is let through; by default every program of this machine. With ``is_strict`` fields that nobody
    knows are refused. ``status`` tells whether texts can be written now. When the application is shut down, texts that
    are still written end with an error that says so.
    """
    guard = guard or Guard()
    turns = Turns(limits or TurnLimits())
    metrics = Metrics(generator.model, turns, status)
    api = _Api(generator, turns, metrics, status)
    app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[_refusing_in_json])
    guard.install(app)
    install_request_log(app)
    HealthRoutes(generator.model, guard, turns, metrics, status).install(app)
    app.router.add_post("/v1/completions", api.answering(Completions(generator, is_strict=is_strict)))
    if chat is not None:
        app.router.add_post("/v1/chat/completions", api.answering(Chat(generator, chat, is_strict=is_strict)))
    app.router.add_get("/v1/models", api.list_models)
    app.router.add_get("/v1/models/{id:.+}", api.show_model)
    app.on_shutdown.append(api.end)
    if chat is not None:
        app.on_cleanup.append(functools.partial(_close, chat))
    return app


async def _close(chat: ChatTemplate, app: web.Application) -> None:
    chat.close()


@web.middleware
async def _refusing_in_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give what aiohttp itself refuses our errors' form."""
    try:
        return await handler(request)
    except web.HTTPException as cause:
        if cause.status < 400:
            raise
        response = refuse_as(cause.status, f"{request.method} {plain_text(request.path)}: {cause.reason.lower()}")
        if "Allow" in cause.headers:
            response.headers["Allow"] = cause.headers["Allow"]
        return response


class _Api:
    def __init__(self, generator: TextGenerator, turns: Turns, metrics: Metrics, status: Status | None) -> None:
        self._generator = generator
        self._turns = turns
        self._metrics = metrics
        self._waits_for = (lambda: "") if status is None else (lambda: status().reason)
        self._started = int(time.time())
        self._tasks: set[asyncio.Task[Any]] = set()  # of requests under way
        self._ending = asyncio.Event()

    async def list_models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._model()]})

    async def show_model(self, request: web.Request) -> web.Response:
        if (asked := request.match_info["id"]) != self._generator.model:
            message = f"model {asked!r:.80} is not served here; this is {self._generator.model}"
            return refuse_as(404, message, "model_not_found")
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._generator.model,
            "object": "model",
            "created": self._started,
            "owned_by": "flowspec-edge",
        }

    def answering(self, dialect: Dialect) -> Handler:
        """What answers requests in that dialect."""

        async def answer(request: web.Request) -> web.StreamResponse:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                return await self._answer(request, dialect)
            except web.HTTPRequestEntityTooLarge:
                return refuse_as(
                    413, f"the request's body exceeds the limit of {MAX_REQUEST_BYTES} bytes; shorten the prompt"
                )
            except FlowspecError as cause:
                log_failure(cause)
                return refuse(cause)
            finally:
                self._tasks.discard(task)

        return answer

    async def end(self, app: web.Application) -> None:
        """Give texts DRAIN_S to end by themselves, then end them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_S)
        self._ending.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_S)

    async def _answer(self, request: web.Request, dialect: Dialect) -> web.StreamResponse:
        holders = _holders(request)
        with contextlib.ExitStack() as places:
            places.enter_context(self._turns.place(*holders))
            asked = await dialect.read(await read_body(request))
            if len(asked.texts) > (most := self._turns.most_texts(*holders)):
                raise RequestError(
                    f"{len(asked.texts)} texts are asked for, and {most} are written for one client "
                    "(--max-per-address, --max-per-key, --max-sessions and --max-queue)"
                )
            if len(asked.texts) > 1:
                places.enter_context(self._turns.place(*holders, num_texts=len(asked.texts) - 1))
            headers = {WARNING: _header(asked.warnings)} if asked.warnings else {}
            async with (
                contextlib.aclosing(side_by_side([self._write(request, text) for text in asked.texts])) as written,
                contextlib.aclosing(paced(written, self._ending)) as pieces,
            ):
                if asked.is_streamed:
                    return await stream(request, pieces, asked, headers, self._waits_for)
                choices: list[list[Piece]] = [[] for _ in asked.texts]
                async for found in pieces:
                    if found is not None:
                        choices[found.choice].append(found.piece)
                return web.json_response(asked.form.whole([joined(choice) for choice in choices]), headers=headers)

    async def _write(self, request: web.Request, text: AskedText) -> AsyncGenerator[Piece, None]:
        record = self._metrics.begin()
        try:
            async with (
                self._turns.turn(),
                contextlib.aclosing(self._generator.generate(text.prompt, text.options)) as pieces,
            ):
                record.begin_turn()
                async for piece in pieces:
                    record.take(piece)
                    note_piece(request, piece)
                    yield piece
        except FlowspecError:
            record.fail()
            raise
        finally:
            record.end()


def _holders(request: web.Request) -> list[Holder]:
    """Whose texts those of a request are."""
    holders = [Holder(request.remote or "")]
    return holders if KEY_NAME not in request else [*holders, Holder(request[KEY_NAME], is_key=True)]


def _header(warnings: Sequence[str]) -> str:
    """As headers have it: names of fields that are not known, and sentences, in ASCII."""
    return "; ".join(warnings).encode("ascii", "backslashreplace").decode()
