"""What a message may be that is no call, where a request says so beside tools: lines for the grammar of its calls.

A message is a call or such a content, and whoever reads it has its text alone. So no content may begin as a call does.
An expression and a choice are kept from that by the grammar. JSON is where it begins otherwise by itself: behind the
first brace, where calls are JSON too. Of a grammar of the caller's own nothing is known.
"""

from __future__ import annotations

import json
import re
from typing import Any

from flowspec_edge.config import Grammar
from flowspec_edge.errors import FieldError
from flowspec_edge.web.call_form import PYTHON_TAG, CallForm
from flowspec_edge.web.fields import UNSUPPORTED
from flowspec_edge.web.reasoning import BEGIN

ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as Python writes it, and as templates do."""
_MAY_BEGIN_JSON = re.compile(r'[{"]|\[\s*[]\[{"\d-]')
_PLAIN_OBJECT = frozenset(
    ("type", "properties", "required", "additionalProperties", "title", "description", "$schema", "$defs")
)
"""Keys of a schema of which it is known that its objects begin with their first property, if that is required."""


def json_rule(name: str, schema: dict[str, Any]) -> str:
    """The line of a rule that is what a JSON schema asks for."""
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': ONE_LINE})}"


def content_rules(form: CallForm, content: Grammar) -> list[str]:
    """Lines that define ``content``. What a request can get wrong is in the first one.

    Raises:
        FieldError: it is no schema, or it cannot be told from calls of this form.
    """
    match content.kind:
        case "json":
            schema = _schema_of(content.text)
            if not _is_told_apart(form, schema):
                fault = f"is given beside tools, and calls of this model, {form}, cannot be told from what it allows; "
                remedy = "have its first property required and called otherwise, or leave one of both out"
                raise FieldError("grammar", fault + remedy, UNSUPPORTED)
            return [json_rule("content", schema)]
        case "regex":
            return [f"CONTENT: /(?:{_in_slashes(content.text)})/ & ~({_begun_otherwise(form)})", "content: CONTENT"]
        case "choice":
            texts = " | ".join(map(json.dumps, json.loads(content.text)))
            return [f"CONTENT: ({texts}) & ~({_begun_otherwise(form)})", "content: CONTENT"]
    fault = "is given beside tools, and calls cannot be told from what a grammar of one's own allows; "
    raise FieldError(
        "grammar", fault + "ask for JSON, an expression or a choice, or leave one of both out", UNSUPPORTED
    )


def _schema_of(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise FieldError("grammar", f"cannot be followed: {cause}", "invalid_grammar") from cause
    if not isinstance(schema, dict):
        raise FieldError("grammar", "cannot be followed: it must be an object", "invalid_grammar")
    return schema


def _is_told_apart(form: CallForm, schema: dict[str, Any]) -> bool:
    """Whether no JSON of that schema begins as a call does."""
    if not _MAY_BEGIN_JSON.match(form.begin):
        return True
    beginning = _beginning(schema)
    return not (form.begin.startswith(beginning) or beginning.startswith(form.begin))


def _beginning(schema: dict[str, Any]) -> str:
    """How all JSON of that schema begins, as far as the schema's own keys tell."""
    if schema.get("type") == "array":
        return "["
    if schema.get("type") != "object":
        return ""
    properties, required = schema.get("properties"), schema.get("required")
    if not (schema.keys() <= _PLAIN_OBJECT and isinstance(properties, dict) and isinstance(required, list)):
        return "{"
    first = next(iter(properties), None)
    return f"{{{json.dumps(first, ensure_ascii=False)}: " if first in required else "{"


def _in_slashes(regex: str) -> str:
    """An expression as it stands between slashes."""
    written = {"/": r"\/", "\n": r"\n"}
    return re.sub(r"\\?.", lambda found: written.get(found[0][-1], found[0]), regex, flags=re.DOTALL)


def _begun_otherwise(form: CallForm) -> str:
    """Any text that is read as a call or as reasoning, by its beginning."""
    tag = "" if form.mark else rf"({json.dumps(PYTHON_TAG)} /\s*/)? "
    return rf"/\s*/ ({tag}{json.dumps(form.begin)} | {json.dumps(BEGIN)}) ANY"
