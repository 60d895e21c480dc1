"""Each request has a name: in a header of its response, in the one line that the log has of it, and in its span where
OpenTelemetry is installed.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from flowspec_edge.config import Piece
from flowspec_edge.web.guard import KEY_NAME

REQUEST_ID = "X-Request-Id"
LOOKS = frozenset({"/health", "/ready", "/metrics"})
"""What is asked every few seconds, and not logged."""
_GIVEN_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_NOTES = web.RequestKey("notes", dict[str, Any])
_log = logging.getLogger(__name__)
"""At level INFO, as JSON. ``flowspec serve --log-requests`` shows it."""


def install_request_log(app: web.Application) -> None:
    """Have every request of the application named, logged and traced. It comes before all other middlewares."""
    app.middlewares.insert(0, _named)
    app.on_response_prepare.append(_tell_name)


def note_piece(request: web.Request, piece: Piece) -> None:
    """A piece of an answer to this request has been written; its figures go into the log."""
    if (found := piece.statistics) is None or _NOTES not in request:
        return
    notes = request[_NOTES]
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "trips"):
        notes[name] = notes.get(name, 0) + found.get(name, 0)
    for name in ("first_token_s", "tokens_per_s", "acceptance_length"):
        if name in found:
            notes[name] = found[name]
    notes["finish_reason"] = piece.finish_reason


@web.middleware
async def _named(request: web.Request, handler: Handler) -> web.StreamResponse:
    given = request.headers.get(REQUEST_ID, "")
    notes: dict[str, Any] = {"id": given if _GIVEN_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"}
    request[_NOTES] = notes
    began, status = time.monotonic(), 499  # as proxies write where the client has left
    with _span(request) as attributes:
        try:
            response = await handler(request)
            status = response.status
            return response
        except Exception:
            status = 500
            raise
        finally:
            line = {
                **notes,
                "method": request.method,
                "path": request.path,
                "status": status,
                "duration_s": round(time.monotonic() - began, 4),
                "address": request.remote,
                "api_key": request.get(KEY_NAME),
            }
            attributes.update(line)
            if request.path not in LOOKS and _log.isEnabledFor(logging.INFO):
                _log.info("%s", json.dumps({name: value for name, value in line.items() if value is not None}))


async def _tell_name(request: web.Request, response: web.StreamResponse) -> None:
    if _NOTES in request:
        response.headers[REQUEST_ID] = request[_NOTES]["id"]


@contextmanager
def _span(request: web.Request) -> Iterator[dict[str, Any]]:
    """A span of OpenTelemetry's around the request, with what is put into the dictionary, by its conventions for HTTP
    servers and generative AI. Without the library nothing happens.
    """
    attributes: dict[str, Any] = {}
    try:
        from opentelemetry import propagate, trace
    except ImportError:
        yield attributes
        return
    with trace.get_tracer("flowspec_edge").start_as_current_span(
        f"{request.method} {request.path}",
        context=propagate.extract(request.headers),
        kind=trace.SpanKind.SERVER,
        record_exception=False,
    ) as span:
        try:
            yield attributes
        finally:
            named = {_ATTRIBUTES[name]: value for name, value in attributes.items() if name in _ATTRIBUTES}
            span.set_attributes({name: value for name, value in named.items() if value is not None})


_ATTRIBUTES = {
    "id": "http.request.header.x-request-id",
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "address": "client.address",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "first_token_s": "gen_ai.server.time_to_first_token",
    "trips": "flowspec.trips",
    "acceptance_length": "flowspec.acceptance_length",
}
