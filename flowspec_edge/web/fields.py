"""The fields of a request's body: parsed, checked, and named in errors as the caller named them.

null means that a field is absent, and 16.0 is 16. Fields that nobody knows are passed over, and told of. Those that
would change the answer and are not supported are refused, unless they ask for what is done anyway.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from codecs import lookup
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from flowspec_edge.errors import FieldError, RequestError, plain_text
from flowspec_edge.web.unknown_fields import is_empty, unknown_within

_log = logging.getLogger(__name__)

BODY_S = 30.0
"""For a body of MAX_REQUEST_BYTES over Wi-Fi of 1 Mbit/s."""
MAX_FIELD_BYTES = 2**16
"""Of a field that is not ``LONG``: far more than four stop strings need."""
MAX_OTHER_BYTES = 2**18
"""Of all fields together that are not ``LONG``. To make objects of 4 MB of small ones would hold up all other texts."""


class _Long(msgspec.Struct):
    """Fields that may fill the body, which become few objects each."""

    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()
    system: msgspec.Raw = msgspec.Raw()
    instructions: msgspec.Raw = msgspec.Raw()
    tokens: msgspec.Raw = msgspec.Raw()
    flowspec: msgspec.Raw = msgspec.Raw()


LONG = _Long.__struct_fields__
MAX_NAMES = 10
"""How many unknown fields are told of by name."""
MAX_SHOWN = 80
"""Characters of a value that an error shows."""
CHARSETS = frozenset({"utf-8", "ascii", "iso8859-1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"})
"""Of bodies. Others are not JSON's, and some take for ever to decode."""
UNKNOWN, UNSUPPORTED = "unknown_parameter", "unsupported_parameter"

Json = dict[str, Any]
Fields = TypeVar("Fields", bound=msgspec.Struct)
Value = TypeVar("Value")
Whole = int | float
"""A whole number as JSON has it, where 16.0 is 16; :func:`whole` reads it."""

IDLE = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction"),
    }
)
"""Fields of OpenAI's that change nothing about an answer's text."""
IDLE_WITHIN = IDLE | {"refusal", "annotations", "include_obfuscation", "index"}
"""Fields of objects within a request, likewise. An assistant's message comes back with some."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("top_logprobs", "mirostat"), (0,)),
    **dict.fromkeys(("length_penalty", "typical_p"), (1,)),
    **dict.fromkeys(("logprobs", "use_beam_search", "continue_final_message", "echo"), (False,)),
    "web_search_options": ({},),
    **dict.fromkeys(("bad_words", "functions"), ([],)),
    **dict.fromkeys(("suffix", "chat_template", "documents", "prompt_logprobs"), ()),
    **dict.fromkeys(("audio", "reasoning_effort", "verbosity"), ()),
    "flowspec": (),
    "parse_special": (False,),
    "function_call": ("none",),
    "modalities": (["text"],),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
}
"""Fields that would change an answer and that not every dialect has, each with the values that ask for nothing."""


@dataclass(frozen=True, slots=True)
class OwnFields:
    """Of a dialect: fields that change nothing, and those that would, with the values that ask for nothing."""

    idle: frozenset[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


NO_OWN = OwnFields()


async def read_body(request: web.Request) -> bytes:
    """The request's body, in UTF-8.

    Raises:
        RequestError: it did not come in time, or its charset is not known or does not fit.
        HTTPRequestEntityTooLarge: it exceeds the application's limit.
    """
    try:
        async with asyncio.timeout(BODY_S):
            body = await request.read()
    except TimeoutError:
        raise RequestError(f"the request's body did not come within {BODY_S:.0f} s") from None
    try:
        charset = lookup(request.charset or "utf-8").name
        if charset not in CHARSETS:
            raise LookupError(f"charset {charset}")
        return body if charset == "utf-8" else body.decode(charset).encode()
    except (LookupError, ValueError) as cause:
        raise RequestError(f"the request's body is not JSON ({plain_text(str(cause)[:200])}); send UTF-8") from cause


def parse_fields(
    body: bytes, kind: type[Fields], *, is_strict: bool, own: OwnFields = NO_OWN
) -> tuple[Fields, list[str]]:
    """The fields of that kind, and what clients are to be told of the others. ``own`` are a dialect's beside OpenAI's.

    Raises:
        RequestError: the body is no JSON object, or one of its fields is at fault; with ``is_strict`` also where one is
            not known.
    """
    try:
        _check_size(body)
        sent = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        warnings = _check_names(sent, kind, own, is_strict=is_strict)
        return msgspec.json.decode(body, type=kind), warnings
    except msgspec.ValidationError as cause:
        raise _named(str(cause), body) from cause
    except RecursionError:
        raise RequestError("the request's body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as cause:
        raise _unreadable(cause, body) from cause


def parse_field(name: str, value: msgspec.Raw, kind: type[Value]) -> Value:
    """A field that was left as it was sent. Raises FieldError where it is of another type."""
    try:
        return msgspec.json.decode(value, type=kind)
    except msgspec.ValidationError as cause:
        raise _named(str(cause), bytes(value), name) from cause
    except (msgspec.DecodeError, UnicodeDecodeError) as cause:
        raise _unreadable(cause, bytes(value)) from cause


def whole(name: str, value: Whole | None, default: int) -> int:
    """A whole number. Raises FieldError where it is none."""
    if value is None:
        return default
    if value != int(value):
        raise FieldError(name, f"is {value}; it must be a whole number")
    return int(value)


def _check_size(body: bytes) -> None:
    long = msgspec.json.decode(body, type=_Long)
    num_bytes = len(body) - sum(len(memoryview(value)) for value in msgspec.structs.astuple(long))
    if num_bytes > MAX_OTHER_BYTES:
        raise RequestError(
            f"the request has {num_bytes} bytes beside the fields {', '.join(LONG)}; at most {MAX_OTHER_BYTES} are read"
        )


def _check_names(
    sent: Mapping[str, msgspec.Raw], kind: type[msgspec.Struct], own: OwnFields, *, is_strict: bool
) -> list[str]:
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    neutral = {**NEUTRAL, **own.neutral}
    for name, value in sent.items():
        if name in known:
            if name not in LONG and len(memoryview(value)) > MAX_FIELD_BYTES:
                raise FieldError(name, f"has {len(memoryview(value))} bytes; it may have {MAX_FIELD_BYTES}")
        elif name in neutral and not asks_for_nothing(value, neutral[name]):
            raise unsupported(name, bytes(value))
    passed_over = {*known, *neutral, *IDLE, *own.idle}
    unknown = [name for name, value in sent.items() if name not in passed_over and not is_empty(value)]
    unknown += unknown_within(sent, kind, IDLE_WITHIN | own.idle)
    listed = [plain_text(name[:MAX_SHOWN]) for name in unknown[:MAX_NAMES]]
    if unknown and is_strict:
        raise FieldError(listed[0], "is a field that is not known here; leave it out", UNKNOWN)
    if not unknown:
        return []
    warning = f"fields that are not known were passed over: {', '.join(listed)}"
    _log.info("%s", warning)
    return [warning]


def unsupported(name: str, value: bytes) -> FieldError:
    """The refusal of a field with this JSON, which asks for what is not done."""
    return FieldError(
        name, f"is {shown(value)}, which is not supported here and would change the answer; leave it out", UNSUPPORTED
    )


def asks_for_nothing(value: msgspec.Raw, neutral: tuple[Any, ...]) -> bool:
    """Whether a field has one of the values that change no answer, or none."""
    if len(memoryview(value)) > MAX_SHOWN:
        return False
    given = msgspec.json.decode(value)
    # True is no 1, but 1.0 is
    return given is None or any(given == one and isinstance(given, bool) is isinstance(one, bool) for one in neutral)


def _named(fault: str, body: bytes, within: str = "") -> RequestError:
    """What msgspec found in the body, or in the field ``within`` it, in the caller's words.

    It says "Expected `int | null`, got `str` - at `$.max_tokens`" of what is at fault.
    """
    rule = r"(?:Expected `(?P<wanted>.*?)`, got .*?|(?P<other>.*?))(?: - at (?:`key` in )?`\$\.?(?P<path>.*)`)?"
    found = re.fullmatch(rule, fault)
    assert found is not None, "every text is matched"
    wanted, place = found["wanted"], found["path"] or ""
    path = f"{within}{place}" if place.startswith("[") else ".".join(filter(None, (within, place)))
    missing = re.search(r"missing required field `(\w+)`", fault)
    if missing:
        return FieldError(f"{path}.{missing[1]}" if path else missing[1], "is missing", "missing_required_parameter")
    if not path or path == "[...]":
        return RequestError("the request's body is not a JSON object")
    rule = found["other"] if wanted is None else f"must be of type {wanted.removesuffix(' | null')}"
    if len(body) > MAX_FIELD_BYTES:  # to look for the value would take longer than to parse it
        return FieldError(path, rule)
    return FieldError(path, f"is {shown(_value_at(place, body))}; it {rule}")


def _unreadable(cause: Exception, body: bytes) -> RequestError:
    why = f"not JSON ({plain_text(str(cause)[:200])})"
    if re.search(rb"\\u[dD][89a-fA-F]", body):
        why += ", or has half of a surrogate pair (U+D800 to U+DFFF), which is no character"
    return RequestError(f"the request's body is {why}")


def _value_at(path: str, body: bytes) -> bytes:
    """The JSON of the value that stands there."""
    for name, number in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path.replace("[", ".[")):
        if number:
            body = msgspec.json.decode(body, type=list[msgspec.Raw])[int(number)]
        else:
            body = msgspec.json.decode(body, type=dict[str, msgspec.Raw])[name]
    return bytes(body)


def shown(value: bytes) -> str:
    """The beginning of a JSON value, as an error may show it."""
    if len(value) <= 16 * MAX_SHOWN:
        try:
            return f"{json.loads(value)!r:.{MAX_SHOWN}}"
        except ValueError:  # a number of thousands of digits
            pass
    return plain_text(value[:MAX_SHOWN].decode(errors="replace"))
