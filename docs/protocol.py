"""Writes what docs/protocol.md has from the code: tables of messages, fields and limits, and the test vectors.

::

    python -m docs.protocol --write    # that page, and docs/protocol-vectors.json
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any, get_args

from msgspec import NODEFAULT, Meta, Struct
from msgspec.structs import FieldInfo, fields

from docs.house import ROOT
from docs.protocol_vectors import Json, vectors
from flowspec_edge.core import codec, limits, rows, wire
from flowspec_edge.net import close_codes, connection, frames, outbox

PAGE = ROOT / "docs" / "protocol.md"
VECTORS = ROOT / "docs" / "protocol-vectors.json"
KINDS: tuple[type[Struct], ...] = get_args(codec.Header)
PARTS: tuple[type[Struct], ...] = (rows.SessionSpec, rows.Passage)
"""What fields consist of that have fields of their own."""
LIMITS: tuple[tuple[ModuleType, tuple[str, ...]], ...] = (
    (codec, ("MAX_HEADER_BYTES", "MAX_TAIL_BYTES")),
    (outbox, ("FRAGMENT_BYTES",)),
    (frames, ("MAX_FRAME_BYTES",)),
    (wire, ("MAX_TEXT", "MAX_PROBE_BYTES", "MAX_BUNDLES", "MAX_CORES", "MAX_SOURCES", "ROW_BYTES")),
    (limits, ("MAX_CHUNK_ROWS", "CREDITS_PER_HOP", "MAX_SESSIONS", "MAX_KEPT_SESSIONS", "RECENT_ROWS")),
    (limits, ("MAX_PASSAGES", "MAX_COUNT")),
    (connection, ("UNTAKEN_MS", "IDLE_S")),
)
WIDTH = 64
"""Hex digits in a line."""


def page_of(text: str, found: Json) -> str:
    """The text of the page with its parts of today."""
    parts = {
        "version": f"This is version **{wire.PROTOCOL_VERSION}**.",
        "messages": "\n".join(map(_shown_kind, KINDS)),
        "parts": "\n".join(map(_shown_kind, PARTS)),
        "limits": "\n".join(_limit_table()),
        "close codes": "\n".join(f"* {code.value}: `{code.name}`" for code in close_codes.CloseCode),
        "message vectors": "\n\n".join(map(_shown_message, found["messages"])),
        "frame vectors": "\n".join(_frame_table(found["frames"])),
        "key vector": _shown_key(found["key"]),
        "record vector": _shown_record(found["record"]),
    }
    for name, part in parts.items():
        head, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, below = rest.partition("<!-- end -->")
        assert mark and end, f"{PAGE} has no place for {name}"
        text = f"{head}{mark}{part}\n{end}{below}"
    return text


# ---------------------------------------------------------------------------- from the code


def _shown_kind(kind: type[Struct]) -> str:
    """An item of a list: what a message is for, and its fields in their order."""
    shown = "; ".join(f"`{name}`: {what}" for name, what in fields_of_kind(kind))
    text = f"* **{tag_of(kind)}**: {_sentences(inspect.getdoc(kind) or '')} Fields: {shown or 'none'}."
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def tag_of(kind: type[Struct]) -> str:
    """What a message of this kind begins with; the name of what is no message."""
    return str(kind.__struct_config__.tag or kind.__name__)


def fields_of_kind(kind: type[Struct]) -> Iterator[tuple[str, str]]:
    """Each field, and what it may have; what stands for it where it is left out."""
    names, types = vars(inspect.getmodule(kind)), inspect.get_annotations(kind)
    for field in fields(kind):
        text = re.sub(r"Annotated\[(.*), (Meta\(.*\))\]", partial(_bounded, names), types[field.name])
        text = re.sub(r"(?:list|tuple)\[(\w+)(?:, \.\.\.)?\]", r"list of \1", text).replace(" | None", ", or null")
        yield field.name, text if field.required else f"{text} ({json.dumps(_default(field))})"


def _default(field: FieldInfo) -> object:
    return field.default if field.default_factory is NODEFAULT else field.default_factory()


def _bounded(names: dict[str, Any], found: re.Match[str]) -> str:
    """A type with what its ``Meta`` says: of values, or of lengths."""
    meta: Meta = eval(found[2], names)
    low = meta.min_length if meta.ge is None else meta.ge
    high = meta.max_length if meta.le is None else meta.le
    bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high:g}"
    return f"{found[1]}, {bounds}"


def _sentences(docstring: str) -> str:
    """A docstring in one line."""
    return " ".join(docstring.replace("``", "`").replace("|", "\\|").split())


def _limit_table() -> Iterator[str]:
    yield "| limit | value | why |\n|---|---|---|"
    for module, names in LIMITS:
        reasons = _reasons(module)
        for name in names:
            yield f"| `{name}` | {getattr(module, name)} | {_sentences(reasons[name])} |"


def _reasons(module: ModuleType) -> dict[str, str]:
    """What stands below each constant of a module."""
    body = ast.parse(inspect.getsource(module)).body
    reasons = {}
    for statement, below in itertools.pairwise(body):
        match statement, below:
            case ast.Assign(targets=[ast.Name(name)]), ast.Expr(ast.Constant(str(reason))):
                reasons[name] = reason
    return reasons


# ------------------------------------------------------------------------- from the vectors


def _shown_message(vector: Json) -> str:
    lines = [f"{vector['kind']}: {vector['note']}"]
    said = json.dumps(vector["fields"])
    lines += textwrap.wrap(said, 100, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    lines += _hex("header", vector["header"])
    if vector["tail"] is not None:
        lines += _hex("tail  ", vector["tail"])
    return "\n".join(["```", *lines, "```"])


def _hex(name: str, digits: str) -> list[str]:
    lines = textwrap.wrap(digits, WIDTH)
    return [f"  {name if place == 0 else ' ' * len(name)}  {line}" for place, line in enumerate(lines)]


def _frame_table(found: Sequence[Json]) -> Iterator[str]:
    yield "| frame | opcode | bytes |\n|---|---|---|"
    for vector in found:
        yield f"| {vector['note']} | {vector['opcode']} | `{vector['frame']}` |"


def _shown_key(vector: Json) -> str:
    lines = [f"{name:12} {vector[name]}" for name in ("secret", "text", "fingerprint")]
    lines += ["certificate", *vector["certificate"].splitlines(), "sha256 of its DER", vector["certificate_sha256"]]
    return "\n".join(["```", *lines, "```"])


def _shown_record(vector: Json) -> str:
    lines = [f"name    {vector['name']}", f"says    {json.dumps(vector['properties'])}"]
    lines += [line.removeprefix("  ") for line in _hex("TXT   ", vector["txt"])]
    return "\n".join(["```", *lines, "```"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write page and vectors, or say whether they are those of the code."""
    parser = argparse.ArgumentParser(prog="python -m docs.protocol", description="The page of the protocol.")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} and {VECTORS.name}")
    options = parser.parse_args(arguments)
    found = vectors()
    page, data = page_of(PAGE.read_text(encoding="utf-8"), found), json.dumps(found, indent=1) + "\n"
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
        VECTORS.write_text(data, encoding="utf-8")
        return
    is_true = PAGE.read_text(encoding="utf-8") == page and VECTORS.read_text(encoding="utf-8") == data
    print("page and vectors are those of the code" if is_true else "they are not those of the code; give --write")


if __name__ == "__main__":
    main()
