"""The HTTP interface: OpenAI's completions form, streamed as server-sent events, over whatever generates text.

A stream whose answer waits for boards says so in comments. Beyond OpenAI's fields a request may have ``top_k`` and
``schedule``, and ``parse_special``: where that is false, special tokens in the prompt are plain text. An answer has
``token_ids`` beside each text, and the statistics of the generation in ``flowspec``. A client that leaves cancels its
generation.

A text can go on at another server of the same bundle. A request with ``"flowspec": {"resumable": true}`` gets, in its
first event, ``"flowspec": {"bundle": ..., "prompt_token_ids": [...], "seed": ...}``. One that has ``bundle``,
``prompt_token_ids`` and the ``token_ids`` that have come in ``"flowspec": {"resume": {...}}``, and otherwise the first
request's options with that ``seed``, is answered with the rest; its ``prompt`` is not read. The statistics tell the
``resumed_tokens``.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from flowspec_edge.config import GenerateOptions, Piece, Text, UnfinishedText
from flowspec_edge.errors import FlowspecError
from flowspec_edge.net.auth import is_same_key
from flowspec_edge.web.completion_request import CompletionRequest, read_request
from flowspec_edge.web.event_stream import paced, stream
from flowspec_edge.web.refusals import log_failure, refuse, refuse_as
from flowspec_edge.web.turns import TurnLimits, Turns

MAX_REQUEST_BYTES = 4 * 2**20
"""Enough for a prompt of a million tokens."""
DRAIN_S = 1.0
"""How long texts may go on when the server ends; systemd and users wait for ten times that."""


class TextGenerator(Protocol):
    """What the interface serves.

    ``generate`` raises RequestError where the request is at fault, and another FlowspecError where the server is.
    """

    @property
    def model(self) -> str: ...

    @property
    def bundle(self) -> str: ...

    def generate(self, prompt: Text | UnfinishedText, options: GenerateOptions) -> AsyncGenerator[Piece, None]: ...


def build_app(
    generator: TextGenerator, api_key: str | None = None, limits: TurnLimits | None = None
) -> web.Application:
    """Routes ``POST /v1/completions``, ``GET /v1/models`` and ``GET /health``; serve it with ``cancels_on_disconnect``.

    With ``api_key`` every request needs ``Authorization: Bearer`` and that key, as OpenAI's clients send it. When the
    application is shut down, texts that are still written end with an error that says so.
    """
    api = _Api(generator, limits or TurnLimits())
    app = web.Application(
        client_max_size=MAX_REQUEST_BYTES, middlewares=[] if api_key is None else [_wanting_key(api_key)]
    )
    app.router.add_post("/v1/completions", api.complete)
    app.router.add_get("/v1/models", api.list_models)
    app.router.add_get("/health", api.report_health)
    app.on_shutdown.append(api.end)
    return app


def _wanting_key(api_key: str) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_same_key(given.strip(), api_key):
            return await handler(request)
        return refuse_as(
            401,
            "the API key is missing or wrong; send `Authorization: Bearer KEY` (flowspec key show --api, where it "
            "serves)",
        )

    return check


class _Api:
    def __init__(self, generator: TextGenerator, limits: TurnLimits) -> None:
        self._generator = generator
        self._turns = Turns(limits)
        self._started = int(time.time())
        self._tasks: set[asyncio.Task[Any]] = set()  # of requests under way
        self._ending = asyncio.Event()

    async def list_models(self, request: web.Request) -> web.Response:
        model = {
            "id": self._generator.model,
            "object": "model",
            "created": self._started,
            "owned_by": "flowspec-edge",
        }
        return web.json_response({"object": "list", "data": [model]})

    async def report_health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with self._turns.place(request.remote or ""):
                return await self._answer(
                    request, await read_request(request, self._generator.model, self._generator.bundle)
                )
        except web.HTTPRequestEntityTooLarge:
            return refuse_as(
                413, f"the request's body exceeds the limit of {MAX_REQUEST_BYTES} bytes; shorten the prompt"
            )
        except RecursionError:
            return refuse_as(400, "the request's body is nested too deeply")
        except FlowspecError as cause:
            log_failure(cause)
            return refuse(cause)
        finally:
            self._tasks.discard(task)

    async def end(self, app: web.Application) -> None:
        """Give texts DRAIN_S to end by themselves, then end them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_S)
        self._ending.set()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_S)

    async def _answer(self, request: web.Request, wanted: CompletionRequest) -> web.StreamResponse:
        answer = _Answer(self._generator, wanted)
        async with (
            contextlib.aclosing(self._generate(wanted)) as generated,
            contextlib.aclosing(paced(generated, self._ending)) as pieces,
        ):
            if wanted.is_streamed:
                return await stream(request, pieces, answer.part, is_patient=wanted.is_resumable)
            return web.json_response(answer.whole([piece async for piece in pieces if piece is not None]))

    async def _generate(self, wanted: CompletionRequest) -> AsyncGenerator[Piece, None]:
        async with (
            self._turns.turn(),
            contextlib.aclosing(self._generator.generate(wanted.prompt, wanted.options)) as pieces,
        ):
            async for piece in pieces:
                yield piece


class _Answer:
    """OpenAI's ``text_completion`` objects of one answer."""

    def __init__(self, generator: TextGenerator, wanted: CompletionRequest) -> None:
        self._bundle = generator.bundle
        self._about: dict[str, Any] = {"seed": wanted.options.seed}
        if isinstance(wanted.prompt, UnfinishedText):
            self._about["resumed_tokens"] = len(wanted.prompt.tokens)
        self._is_resumable = wanted.is_resumable
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generator.model,
        }

    def part(self, piece: Piece) -> dict[str, Any]:
        choice = {
            "index": 0,
            "text": piece.text,
            "token_ids": piece.token_ids,
            "logprobs": None,
            "finish_reason": piece.finish_reason,
        }
        part = {**self._head, "choices": [choice]}
        if self._is_resumable and piece.prompt_token_ids is not None:
            part["flowspec"] = {
                "bundle": self._bundle,
                "prompt_token_ids": piece.prompt_token_ids,
                **self._about,
            }
        if piece.statistics is not None:
            prompt, completion = piece.statistics["prompt_tokens"], piece.statistics["completion_tokens"]
            part["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
            part["flowspec"] = {**piece.statistics, **self._about}
        return part

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        last = pieces[-1]
        return self.part(
            Piece(
                text="".join(piece.text for piece in pieces),
                token_ids=[token for piece in pieces for token in piece.token_ids],
                finish_reason=last.finish_reason,
                statistics=last.statistics,
            )
        )
