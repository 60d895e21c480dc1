"""Errors in the form of the dialect that a request speaks, whoever refused it: a dialect, a guard or aiohttp itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from aiohttp import web
from aiohttp.typedefs import Handler

from flowspec_edge.errors import FlowspecError, plain_text
from flowspec_edge.web.framing import Json
from flowspec_edge.web.refusals import Refusal, Refused, log_failure, refusal_of

ErrorForm = Callable[[Refusal], Json]

ANTHROPIC_KINDS: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's words for statuses. Others are ``invalid_request_error`` below 500, and ``api_error``."""
ANTHROPIC_PATHS, OLLAMA_PATHS = "/v1/messages", "/api/"


def openai_error(refusal: Refusal) -> Json:
    kind = "requests" if refusal.status == 429 else "invalid_request_error" if refusal.status < 500 else "server_error"
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def anthropic_error(refusal: Refusal) -> Json:
    kind = "invalid_request_error" if refusal.status < 500 else "api_error"
    kind = ANTHROPIC_KINDS.get(refusal.status, kind)
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}


def ollama_error(refusal: Refusal) -> Json:
    return {"error": refusal.message}


def error_form(request: web.Request) -> ErrorForm:
    """The form of the dialect that a request speaks: its path tells, and a header that Anthropic's clients send."""
    if request.path.startswith(ANTHROPIC_PATHS) or "anthropic-version" in request.headers:
        return anthropic_error
    return ollama_error if request.path.startswith(OLLAMA_PATHS) else openai_error


@web.middleware
async def refusing_in_its_dialect(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer whatever ends a request early. It stands before all others, and so hears of them too."""
    try:
        return await handler(request)
    except Refused as cause:
        return _response(request, cause.refusal)
    except web.HTTPRequestEntityTooLarge:
        message = f"the request's body exceeds the limit of {request.client_max_size} bytes; shorten the prompt"
        return _response(request, Refusal(413, message))
    except web.HTTPException as cause:
        if cause.status < 400:
            raise
        message = f"{request.method} {plain_text(request.path)}: {cause.reason.lower()}"
        response = _response(request, Refusal(cause.status, message))
        if "Allow" in cause.headers:
            response.headers["Allow"] = cause.headers["Allow"]
        return response
    except Exception as cause:  # whatever it is, the client gets an answer that it can read
        if not isinstance(cause, FlowspecError) and request.writer.output_size > 0:
            raise  # an answer has begun, and is cut off: clients know that as the loss of a server
        log_failure(cause)
        return _response(request, refusal_of(cause))


def _response(request: web.Request, refusal: Refusal) -> web.Response:
    response = web.json_response(error_form(request)(refusal), status=refusal.status)
    if refusal.retry_after_s is not None:
        response.headers["Retry-After"] = str(math.ceil(refusal.retry_after_s))
    return response
