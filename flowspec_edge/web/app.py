"""The HTTP API: routes, keys, and what every answer has in common whichever dialect it speaks.

Answers are streamed as server-sent events where the client asks for that. A stream whose answer waits for boards says
so in comments. A client that leaves cancels its generation. Every error is JSON, in the form of the dialect that the
request speaks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler

from flowspec_edge.config import Piece
from flowspec_edge.errors import FieldError, FlowspecError, RequestError
from flowspec_edge.web import openapi
from flowspec_edge.web.asked import Asked, AskedText, TextGenerator, joined, side_by_side
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.completions import Completions
from flowspec_edge.web.error_forms import refusing_in_its_dialect
from flowspec_edge.web.event_stream import paced, stream
from flowspec_edge.web.fields import read_body
from flowspec_edge.web.guard import KEY_NAME, Guard
from flowspec_edge.web.health import HealthRoutes
from flowspec_edge.web.messages import Messages
from flowspec_edge.web.metrics import Metrics, Status
from flowspec_edge.web.model_card import ModelCard
from flowspec_edge.web.ollama import OllamaChat, OllamaGenerate
from flowspec_edge.web.ollama_models import OllamaModels
from flowspec_edge.web.openai_chat import Chat
from flowspec_edge.web.refusals import NO_MODEL, refuse_as
from flowspec_edge.web.request_log import install_request_log, note_piece
from flowspec_edge.web.responses import Responses
from flowspec_edge.web.start_page import add_start
from flowspec_edge.web.tokens import TokenCoder, Tokens
from flowspec_edge.web.turns import Holder, TurnLimits, Turns
from flowspec_edge.web.viewing import Viewed, Viewing, label_of

MAX_REQUEST_BYTES = 4 * 2**20
"""Enough for a prompt of a million tokens."""
DRAIN_S = 1.0
"""How long texts may go on when the server ends; systemd and users wait for ten times that."""
WARNING = "X-Flowspec-Warning"
"""The header that names what was passed over."""


class Dialect(Protocol):
    async def read(self, body: bytes) -> Asked:
        """What a request with this body asks for. Raises FlowspecError where that cannot be."""


CHATS: Mapping[str, Callable[..., Dialect]] = {
    "/v1/chat/completions": Chat,
    "/v1/responses": Responses,
    "/v1/messages": Messages,
    "/api/chat": OllamaChat,
    "/api/generate": OllamaGenerate,
}
"""The dialects of chats, by their paths."""


def build_app(
    generator: TextGenerator,
    guard: Guard | None = None,
    limits: TurnLimits | None = None,
    *,
    chat: ChatTemplate | None = None,
    card: ModelCard | None = None,
    coder: Callable[[], Awaitable[TokenCoder]] | None = None,
    is_strict: bool = False,
    status: Status | None = None,
    viewed: Viewed | None = None,
) -> web.Application:
    """Routes ``POST /v1/completions``, ``GET /v1/models``, ``/health``, ``/ready`` and ``/metrics``; serve it with
    ``cancels_on_disconnect``.

    Where there is a template for ``chat`` chats are answered as well, in every dialect; with a ``card`` also what
    Ollama's clients ask about the model, and with the ``coder``, its tokenizer, what its tokens are.
    ``guard`` says who is let through; by default every program of this machine. With ``is_strict`` fields that nobody
    knows are refused. ``status`` tells whether texts can be written now. A page at ``GET /`` shows what is ``viewed``.
    When the application is shut down, texts that are still written end with an error that says so.
    """
    guard, turns = guard or Guard(), Turns(limits or TurnLimits())
    metrics = Metrics(generator.model, turns, status)
    app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[refusing_in_its_dialect])
    guard.install(app)
    install_request_log(app)
    HealthRoutes(generator.model, guard, turns, metrics, status).install(app)
    api = _Api(generator, turns, metrics, status)
    api.add_to(app.router, chat, is_strict=is_strict)
    if chat is not None and card is not None and coder is not None:
        Tokens(generator, chat, coder, card.geometry, is_strict=is_strict).add_to(app.router)
    if card is not None:
        OllamaModels(card, is_strict=is_strict).add_to(app.router)
    if viewed is not None:
        Viewing(viewed, turns).install(app)
    add_start(app.router, has_page=viewed is not None)
    openapi.add_to(app.router, needs_key=guard.keys is not None)
    app.on_shutdown.append(api.end)
    if chat is not None:
        app.on_cleanup.append(functools.partial(_close, chat))
    return app


async def _close(chat: ChatTemplate, app: web.Application) -> None:
    chat.close()


class _Api:
    def __init__(self, generator: TextGenerator, turns: Turns, metrics: Metrics, status: Status | None) -> None:
        self._generator = generator
        self._turns = turns
        self._metrics = metrics
        self._waits_for = (lambda: "") if status is None else (lambda: status().reason)
        self._started = int(time.time())
        self._tasks: set[asyncio.Task[Any]] = set()  # of requests under way
        self._ending = asyncio.Event()

    def add_to(self, router: web.UrlDispatcher, chat: ChatTemplate | None, *, is_strict: bool) -> None:
        """Route completions and models, and where there is a template the dialects of chats."""
        router.add_post("/v1/completions", self.answering(Completions(self._generator, is_strict=is_strict)))
        if chat is not None:
            for path, dialect in CHATS.items():
                router.add_post(path, self.answering(dialect(self._generator, chat, is_strict=is_strict)))
        router.add_get("/v1/models", self.list_models)
        router.add_get("/v1/models/{id:.+}", self.show_model)

    async def list_models(self, request: web.Request) -> web.Response:
        """In OpenAI's form and Anthropic's at once: neither's clients mind the other's fields."""
        model = self._model()
        return web.json_response(
            {"object": "list", "data": [model], "has_more": False, "first_id": model["id"], "last_id": model["id"]}
        )

    async def show_model(self, request: web.Request) -> web.Response:
        if (asked := request.match_info["id"]) != self._generator.model:
            message = f"model {asked!r:.80} is not served here; this is {self._generator.model}"
            refuse_as(404, message, NO_MODEL)
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._generator.model,
            "object": "model",
            "created": self._started,
            "owned_by": "flowspec-edge",
            "type": "model",
            "display_name": self._generator.model,
            "created_at": datetime.fromtimestamp(self._started, UTC).isoformat(),
        }

    def answering(self, dialect: Dialect) -> Handler:
        """What answers requests in that dialect."""

        async def answer(request: web.Request) -> web.StreamResponse:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                return await self._answer(request, dialect)
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
        options = replace(text.options, label=label_of(request), owner=request.get(KEY_NAME, ""))
        try:
            async with (
                self._turns.turn(),
                contextlib.aclosing(self._generator.generate(text.prompt, options)) as pieces,
            ):
                record.begin_turn()
                async for piece in pieces:
                    record.take(piece)
                    note_piece(request, piece)
                    yield piece
        except FlowspecError as cause:
            record.fail()
            if isinstance(cause, FieldError) and cause.name == "grammar":
                raise text.in_callers_words(cause) from cause
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
