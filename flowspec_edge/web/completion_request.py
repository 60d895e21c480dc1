"""What a request for a completion may ask: each field is checked as it is read."""

from __future__ import annotations

import asyncio
import json
import secrets
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from flowspec_edge.config import GenerateOptions, Text, TextPart, UnfinishedText
from flowspec_edge.errors import OtherBundleError, RequestError, plain_text

BODY_S = 30.0
"""For a body of MAX_REQUEST_BYTES over Wi-Fi of 1 Mbit/s."""
MAX_FIELD_BYTES = 2**16
"""Of a field that is neither a text nor a text to go on with: far more than four stop strings need."""
MAX_STOPS = 4
"""OpenAI's limit."""
SEED_BITS = 53
"""Of a seed that is drawn: every language's JSON can tell it."""

_LONG_FIELDS = ("flowspec", "prompt")
_FIELDS = (
    *_LONG_FIELDS, "max_tokens", "model", "n", "parse_special", "schedule", "seed", "stop", "stream", "temperature",
    "top_k", "top_p",
)  # fmt: skip
_Fields = msgspec.defstruct("_Fields", [(name, msgspec.Raw, msgspec.Raw()) for name in _FIELDS])
"""The fields of a request that are read, as they were sent. Others are passed over, since to make objects of all that
a body may hold takes half a second, in which nothing else happens."""


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """A text to write. ``is_resumable`` where the client wants to be told what it takes to go on with it elsewhere."""

    prompt: Text | UnfinishedText
    options: GenerateOptions
    is_streamed: bool
    is_resumable: bool


async def read_request(request: web.Request, model: str, bundle: str) -> CompletionRequest:
    """The request's body, for a server of that model, whose bundle has that digest.

    Raises:
        RequestError: it did not come in time, is not JSON, or asks for what is not there.
        OtherBundleError: the text to go on with was begun with another bundle.
        HTTPRequestEntityTooLarge: it exceeds the application's limit.
    """
    body = await _read_json(request)
    if (asked := body.get("model")) is not None and asked != model:
        raise RequestError(f"model {asked!r:.80} is not served here; this is {model}")
    if body.get("n", 1) != 1:
        raise RequestError(f"n is {body['n']!r:.80}; one answer per request is given")
    extension = _field(body, "flowspec", (dict,), {})
    unfinished = _field(extension, "resume", (dict,), None)
    if unfinished is None and "prompt" not in body:
        raise RequestError("prompt is missing; give the text to continue")
    if unfinished is not None and body.get("seed") is None:
        raise RequestError("seed is missing; give the one that the text was begun with")
    return CompletionRequest(
        _text(body) if unfinished is None else _unfinished_text(unfinished, bundle),
        _options(body),
        is_streamed=_field(body, "stream", (bool,), False),
        is_resumable=_field(extension, "resumable", (bool,), False),
    )


def _text(body: dict[str, Any]) -> Text:
    text: str = _field(body, "prompt", (str,), "")
    return text if _field(body, "parse_special", (bool,), True) else [TextPart(text, parses_special=False)]


def _options(body: dict[str, Any]) -> GenerateOptions:
    stop = _field(body, "stop", (str, list), [])
    stops = [stop] if isinstance(stop, str) else stop
    stops = [_field({"stop": text}, "stop", (str,), "") for text in stops[: MAX_STOPS + 1]]
    if len(stops) > MAX_STOPS or not all(stops):
        raise RequestError(f"stop must be a text or a list of at most {MAX_STOPS} texts, none of them empty")
    seed = _field(body, "seed", (int,), None)
    return GenerateOptions(
        max_new_tokens=_field(body, "max_tokens", (int,), 128),
        temperature=_field(body, "temperature", (int, float), 0.0),
        top_k=_field(body, "top_k", (int,), 0),
        top_p=_field(body, "top_p", (int, float), 1.0),
        seed=secrets.randbits(SEED_BITS) if seed is None else seed,
        schedule=_field(body, "schedule", (str,), "flowspec"),
        stop=tuple(stops),
    )


def _unfinished_text(given: dict[str, Any], bundle: str) -> UnfinishedText:
    began = _field(given, "bundle", (str,), "")
    if began != bundle:
        raise OtherBundleError(
            f"the text was begun with bundle {plain_text(began[:12])}, and here is bundle {bundle:.12}, "
            "which would go on otherwise"
        )
    return UnfinishedText(prompt=_token_ids(given, "prompt_token_ids"), tokens=_token_ids(given, "token_ids"))


def _token_ids(given: dict[str, Any], name: str) -> tuple[int, ...]:
    values = _field(given, name, (list,), [])
    if any(type(value) is not int for value in values):
        raise RequestError(f"flowspec.resume.{name} has what is no token id; give whole numbers")
    return tuple(values)


async def _read_json(request: web.Request) -> dict[str, Any]:
    """The fields of the request's body that are known.

    Raises:
        RequestError: it is not a JSON object, or nested so deeply that it is not read, or did not come in time.
        HTTPRequestEntityTooLarge: it exceeds the application's limit.
    """
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.read()
        fields = msgspec.json.decode(body, type=_Fields)
        return {name: _value(name, bytes(sent)) for name in _FIELDS if (sent := getattr(fields, name))}
    except TimeoutError:
        raise RequestError(f"the request's body did not come within {BODY_S:.0f} s") from None
    except msgspec.ValidationError as cause:  # all that is checked here
        raise RequestError("the request's body is not a JSON object") from cause
    except (ValueError, msgspec.DecodeError, RecursionError) as cause:
        raise RequestError(f"the request's body is not JSON ({str(cause)[:200]})") from cause


def _value(name: str, sent: bytes) -> Any:
    if len(sent) > MAX_FIELD_BYTES and name not in _LONG_FIELDS:
        raise RequestError(f"{name} has {len(sent)} bytes; it may have {MAX_FIELD_BYTES}")
    if len(sent) > MAX_FIELD_BYTES and name == "prompt" and not sent.startswith(b'"'):
        raise RequestError(f"{name} has {len(sent)} bytes and is no text; it may have {MAX_FIELD_BYTES} then")
    return json.loads(sent)


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
