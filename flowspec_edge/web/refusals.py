"""What a request is refused with: status, message and words for programs, which each dialect tells in its own form."""

from __future__ import annotations

import logging
from typing import NamedTuple, NoReturn

from flowspec_edge.errors import (
    FieldError,
    FlowspecError,
    OtherBundleError,
    RequestError,
    ServerBusyError,
    ServerEndingError,
)

_log = logging.getLogger(__name__)

NO_MODEL = "model_not_found"


class Refusal(NamedTuple):
    """``code`` is a word for programs, ``param`` the field at fault; ``retry_after_s`` is when to ask again."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None


class Refused(Exception):
    """A request ends here. Whoever gives it an answer catches this."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def refuse_as(status: int, message: str, code: str | None = None) -> NoReturn:
    """End a request with this status, for what never was an error of ours."""
    raise Refused(Refusal(status, message, code))


def log_failure(error: Exception) -> None:
    """Log an error that whoever runs the server can mend, or a bug. With others clients could fill the log."""
    if not isinstance(error, FlowspecError):
        _log.error("a request failed", exc_info=error)
    elif not isinstance(error, RequestError | ServerBusyError | ServerEndingError):
        _log.warning("%s", error)


def refusal_of(error: Exception) -> Refusal:
    """400 and above where the request is at fault, 500 and above where the server is. A bug's text stays in the log."""
    message = str(error)
    match error:
        case FieldError(name=param, code=code):
            return Refusal(404 if code == NO_MODEL else 400, message, code, param)
        case OtherBundleError():
            return Refusal(409, message, "other_bundle")
        case RequestError():
            return Refusal(400, message)
        case ServerBusyError(retry_after_s=retry_after_s, is_crowded_by_one=True):
            return Refusal(429, message, "rate_limit_exceeded", retry_after_s=retry_after_s)
        case ServerBusyError(retry_after_s=retry_after_s):
            return Refusal(429, message, "server_busy", retry_after_s=retry_after_s)
        case ServerEndingError():
            return Refusal(503, message, "server_ending")
        case FlowspecError():
            return Refusal(503, message)
        case _:
            return Refusal(500, "the server failed at this request; its log tells more", "internal_error")
