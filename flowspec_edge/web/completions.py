"""The HTTP interface: OpenAI's completions form, streamed as server-sent events, over whatever generates text.

A stream whose answer waits for boards says so in comments. Beyond OpenAI's fields a request may have ``top_k`` and
``schedule``; an answer has ``token_ids`` beside each text, and the statistics of the generation in ``flowspec``. A
client that leaves cancels its generation.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.errors import FlowspecError, RequestError
from flowspec_edge.net.auth import is_same_key

MAX_REQUEST_BYTES = 4 * 2**20
"""Enough for a prompt of a million tokens."""
BODY_S = 30.0
"""For a body of MAX_REQUEST_BYTES over Wi-Fi of 1 Mbit/s."""
MAX_STOPS = 4
"""OpenAI's limit."""

_log = logging.getLogger(__name__)


class TextGenerator(Protocol):
    """What the interface serves.

    ``generate`` raises RequestError where the request is at fault, and another FlowspecError where the server is.
    """

    @property
    def model(self) -> str: ...

    def generate(self, prompt: str, options: GenerateOptions) -> AsyncGenerator[Piece, None]: ...


def build_app(generator: TextGenerator, api_key: str | None = None) -> web.Application:
    """Routes ``POST /v1/completions``, ``GET /v1/models`` and ``GET /health``; serve it with ``cancels_on_disconnect``.

    With ``api_key`` every request needs ``Authorization: Bearer`` and that key, as OpenAI's clients send it.
    """
    api = _Api(generator)
    app = web.Application(
        client_max_size=MAX_REQUEST_BYTES, middlewares=[] if api_key is None else [_wanting_key(api_key)]
    )
    app.router.add_post("/v1/completions", api.complete)
    app.router.add_get("/v1/models", api.list_models)
    app.router.add_get("/health", api.report_health)
    return app


def _wanting_key(api_key: str) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer" and is_same_key(given.strip(), api_key):
            return await handler(request)
        return _refuse(
            401,
            "the API key is missing or wrong; send `Authorization: Bearer KEY` (flowspec key show --api, where it "
            "serves)",
        )

    return check


class _Api:
    def __init__(self, generator: TextGenerator) -> None:
        self._generator = generator
        self._started = int(time.time())

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
        try:
            prompt, options, is_streamed = self._parse(await _read_json(request))
        except RequestError as cause:
            return _refuse(400, str(cause))
        except RecursionError:
            return _refuse(400, "the request's body is nested too deeply")
        except web.HTTPRequestEntityTooLarge:
            return _refuse(
                413, f"the request's body exceeds the limit of {MAX_REQUEST_BYTES} bytes; shorten the prompt"
            )
        answer = _Answer(self._generator.model)
        try:
            async with contextlib.aclosing(self._generator.generate(prompt, options)) as pieces:
                if is_streamed:
                    return await _stream(request, answer, pieces)
                return web.json_response(answer.whole([piece async for piece in pieces]))
        except RequestError as cause:
            return _refuse(400, str(cause))
        except FlowspecError as cause:
            _log.warning("%s", cause)
            return _refuse(503, str(cause))

    def _parse(self, body: Any) -> tuple[str, GenerateOptions, bool]:
        if not isinstance(body, dict):
            raise RequestError("the request's body is not a JSON object")
        model = body.get("model")
        if model is not None and model != self._generator.model:
            raise RequestError(f"model {model!r:.80} is not served here; this is {self._generator.model}")
        if body.get("n", 1) != 1:
            raise RequestError(f"n is {body['n']!r:.80}; one answer per request is given")
        stop = _field(body, "stop", (str, list), [])
        stops = [stop] if isinstance(stop, str) else stop
        stops = [_field({"stop": text}, "stop", (str,), "") for text in stops[: MAX_STOPS + 1]]
        if len(stops) > MAX_STOPS or not all(stops):
            raise RequestError(f"stop must be a text or a list of at most {MAX_STOPS} texts, none of them empty")
        options = GenerateOptions(
            max_new_tokens=_field(body, "max_tokens", (int,), 128),
            temperature=_field(body, "temperature", (int, float), 0.0),
            top_k=_field(body, "top_k", (int,), 0),
            top_p=_field(body, "top_p", (int, float), 1.0),
            seed=_field(body, "seed", (int,), 0),
            schedule=_field(body, "schedule", (str,), "flowspec"),
            stop=tuple(stops),
        )
        if "prompt" not in body:
            raise RequestError("prompt is missing; give the text to continue")
        return _field(body, "prompt", (str,), ""), options, _field(body, "stream", (bool,), False)


class _Answer:
    """OpenAI's ``text_completion`` objects of one answer."""

    def __init__(self, model: str) -> None:
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
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
        if piece.statistics is not None:
            prompt, completion = piece.statistics["prompt_tokens"], piece.statistics["completion_tokens"]
            part["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
            part["flowspec"] = piece.statistics
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


async def _stream(request: web.Request, answer: _Answer, pieces: AsyncGenerator[Piece, None]) -> web.StreamResponse:
    first = await anext(pieces)  # an error until here becomes an HTTP status, a later one an event
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    with contextlib.suppress(ConnectionResetError):  # the client has left
        await response.prepare(request)
        try:
            await _send_piece(response, answer, first)
            async for piece in pieces:
                await _send_piece(response, answer, piece)
        except FlowspecError as cause:
            _log.warning("%s", cause)
            await _send(response, _error(503, str(cause)))
        else:
            await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
    return response


async def _send_piece(response: web.StreamResponse, answer: _Answer, piece: Piece) -> None:
    """A notice becomes a comment, which clients of server-sent events pass over."""
    if piece.notice is not None:
        await response.write(f": {' '.join(piece.notice.split())}\n\n".encode())
    else:
        await _send(response, answer.part(piece))


async def _send(response: web.StreamResponse, data: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(data)}\n\n".encode())


async def _read_json(request: web.Request) -> Any:
    """The request's body.

    Raises:
        RequestError: it is not JSON, or nested so deeply that it is not read, or did not come in time.
        HTTPRequestEntityTooLarge: it exceeds MAX_REQUEST_BYTES.
    """
    try:
        async with asyncio.timeout(BODY_S):
            return await request.json()
    except TimeoutError:
        raise RequestError(f"the request's body did not come within {BODY_S:.0f} s") from None
    except (ValueError, LookupError, RecursionError) as cause:  # LookupError: a charset that nobody knows
        raise RequestError(f"the request's body is not JSON ({str(cause)[:200]})") from cause


def _field(body: dict[str, Any], name: str, kinds: tuple[type, ...], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise RequestError(
            f"{name} is {value!r:.80}; it must be of type {' or '.join(kind.__name__ for kind in kinds)}"
        )
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise RequestError(f"{name} has half of a surrogate pair (U+D800 to U+DFFF), which is no character")
    return value


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _refuse(status: int, message: str) -> web.Response:
    return web.json_response(_error(status, message), status=status)
