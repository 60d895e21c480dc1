"""Errors in OpenAI's form, and the HTTP status of each."""

from __future__ import annotations

import logging
import math
from typing import Any

from aiohttp import web

from flowspec_edge.errors import (
    FieldError,
    FlowspecError,
    OtherBundleError,
    RequestError,
    ServerBusyError,
    ServerEndingError,
)

_log = logging.getLogger(__name__)


def status_of(error: FlowspecError) -> int:
    """400 and above where the request is at fault, 500 and above where the server is."""
    match error:
        case OtherBundleError():
            return 409
        case RequestError():
            return 400
        case ServerBusyError(is_crowded_by_one=True):
            return 429
        case _:
            return 503


def log_failure(error: FlowspecError) -> None:
    """Log an error that whoever runs the server can mend. With others clients could fill the log."""
    if not isinstance(error, RequestError | ServerBusyError | ServerEndingError):
        _log.warning("%s", error)


def refuse(error: FlowspecError) -> web.Response:
    """The response to a request that ends in this error."""
    headers = {}
    if isinstance(error, ServerBusyError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return web.json_response(error_object(error), status=status_of(error), headers=headers)


def refuse_as(status: int, message: str, code: str | None = None) -> web.Response:
    """A response of this status, for what never was an error of ours."""
    return web.json_response(_object(status, message, code), status=status)


def error_object(error: FlowspecError) -> dict[str, Any]:
    """The error as the body of a response, or as an event of a stream that has begun."""
    param: str | None = None
    code: str | None = None
    match error:
        case FieldError():
            param, code = error.name, error.code
        case OtherBundleError():
            code = "other_bundle"
        case ServerBusyError(is_crowded_by_one=is_crowded_by_one):
            code = "rate_limit_exceeded" if is_crowded_by_one else "server_busy"
        case ServerEndingError():
            code = "server_ending"
    return _object(status_of(error), str(error), code, param)


def _object(status: int, message: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    kind = "requests" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
