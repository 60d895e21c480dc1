"""JSON schemas as they are followed: what only remarks on a value is left out."""

from __future__ import annotations

from typing import Any

import msgspec

FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Those that are followed. Any other one is a remark, as JSON Schema has it: clients write "lower" or "url"."""
_VALUES = frozenset(("const", "enum", "default", "examples"))
"""Keys of a schema that have values, not schemas."""


def with_known_formats(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a schema without formats that are remarks."""
    copied: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(schema))
    left: list[Any] = [copied]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            if isinstance(form := part.get("format"), str) and form not in FORMATS:
                del part["format"]
            left += [value for key, value in part.items() if key not in _VALUES]
    return copied
