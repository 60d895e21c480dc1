"""How the events of a stream are told apart on their way to a client."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Framing:
    """``comment`` makes what clients pass over, and ``end`` follows the last event of a stream that was not cut off."""

    content_type: str
    event: Callable[[Json], bytes]
    comment: Callable[[str], bytes]
    end: bytes = b""


def _data_event(event: Json) -> bytes:
    return f"data: {json.dumps(event)}\n\n".encode()


def _named_event(event: Json) -> bytes:
    return f"event: {event['type']}\n".encode() + _data_event(event)


def _comment(text: str) -> bytes:
    return f": {' '.join(text.split())}\n\n".encode()


def _line(event: Json) -> bytes:
    return f"{json.dumps(event)}\n".encode()


DATA_EVENTS = Framing("text/event-stream", _data_event, _comment, b"data: [DONE]\n\n")
"""Server-sent events as OpenAI's completions are sent."""
NAMED_EVENTS = Framing("text/event-stream", _named_event, _comment)
"""Server-sent events that are called as their ``type`` is."""
LINES = Framing("application/x-ndjson", _line, lambda text: b"")
"""JSON objects, one a line. There are no comments: a dialect may make objects that say nothing."""
