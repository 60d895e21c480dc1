"""The fields that say what a text may be: OpenAI's ``response_format``, and vLLM's names for the same and for more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from flowspec_edge.config import Grammar
from flowspec_edge.errors import FieldError
from flowspec_edge.web.drawing_fields import Drawing
from flowspec_edge.web.fields import UNSUPPORTED
from flowspec_edge.web.json_schema import with_known_formats

ANY_OBJECT = '{"type": "object"}'
MAX_CHOICES = 4096
Schema = dict[str, Any] | str
"""A JSON schema; vLLM's clients send it as a text that is JSON, too."""
EXCLUSIVE = "only one of the fields that say what the text may be can be given"


class NamedSchema(msgspec.Struct, kw_only=True):
    """``name``, ``description`` and ``strict`` change nothing: a schema is always followed to the letter."""

    schema: Schema | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    type: str
    json_schema: NamedSchema | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """As vLLM has it. One of these is given."""

    json: Schema | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


class GrammarFields(Drawing, kw_only=True):
    """How a text is drawn, and what it may be: at most one of these fields says something."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


def grammar_of(fields: GrammarFields) -> tuple[str, Grammar | None]:
    """What a text may be, and the name of the field that says so; "grammar" where none does.

    Raises:
        FieldError: more than one says something, or what one says is none of its kind.
    """
    found = [
        *_of_format(fields.response_format),
        *_of_outputs(fields.structured_outputs),
        *_named("guided_json", "json", _schema_of(fields.guided_json)),
        *_named("guided_regex", "regex", fields.guided_regex),
        *_named("guided_choice", "choice", fields.guided_choice),
        *_named("guided_grammar", "lark", fields.guided_grammar),
    ]
    if len(found) > 1:
        raise FieldError(found[1][0], f"is given beside {found[0][0]}; {EXCLUSIVE}")
    return found[0] if found else ("grammar", None)


def _of_format(given: ResponseFormat | None) -> list[tuple[str, Grammar]]:
    match given:
        case None | ResponseFormat(type="text"):
            return []
        case ResponseFormat(type="json_object"):
            return _named("response_format", "json", ANY_OBJECT)
        case ResponseFormat(type="json_schema"):
            text = None if given.json_schema is None else _schema_of(given.json_schema.schema)
            if text is None:
                raise FieldError("response_format.json_schema.schema", "is missing", "missing_required_parameter")
            return _named("response_format", "json", text)
    kinds = "text, json_object, json_schema"
    raise FieldError("response_format.type", f"is {given.type!r:.80}; it must be one of {kinds}", UNSUPPORTED)


def _of_outputs(given: StructuredOutputs | None) -> list[tuple[str, Grammar]]:
    if given is None:
        return []
    name = "structured_outputs"
    found = [
        *_named(f"{name}.json", "json", _schema_of(given.json)),
        *_named(f"{name}.json_object", "json", ANY_OBJECT if given.json_object else None),
        *_named(f"{name}.regex", "regex", given.regex),
        *_named(f"{name}.choice", "choice", given.choice),
        *_named(f"{name}.grammar", "lark", given.grammar),
    ]
    if not found:
        raise FieldError(name, "has none of json, json_object, regex, choice and grammar", UNSUPPORTED)
    return found


def _named(name: str, kind: str, given: str | Sequence[str] | None) -> list[tuple[str, Grammar]]:
    if given is None:
        return []
    if isinstance(given, str):
        return [(name, Grammar(kind, given))]
    if not 1 <= len(given) <= MAX_CHOICES or len({*given}) < len(given):
        raise FieldError(name, f"has {len(given)} texts; it must have 1 to {MAX_CHOICES}, each of them once")
    return [(name, Grammar(kind, json.dumps(given)))]


def _schema_of(given: Schema | None) -> str | None:
    """A schema as text. One that is none is left for a ring to find so."""
    if given is None:
        return None
    try:
        schema = given if isinstance(given, dict) else msgspec.json.decode(given, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        return str(given)
    return msgspec.json.encode(with_known_formats(schema)).decode()
