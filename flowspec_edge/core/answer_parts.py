"""Parts of an answer beside its text, as programs get them: calls of tools, and log-probabilities of tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Json = dict[str, Any]

_BYTES = "bytes:"


@dataclass(slots=True)
class ToolCall:
    """A call of a tool. ``arguments`` is the JSON object as it was written, of a call that was cut off a part of it."""

    id: str = ""
    name: str = ""
    arguments: str = ""

    def parsed(self) -> dict[str, Any]:
        """The arguments. Raises ValueError where the call was cut off."""
        arguments: dict[str, Any] = json.loads(self.arguments)
        return arguments

    def told(self) -> Json:
        """The call as OpenAI's API has it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class TextLogprob(NamedTuple):
    """A token's bytes, the natural logarithm of its probability, and both of the likeliest ones in its place."""

    text: bytes
    logprob: float
    top: Mapping[bytes, float]


def chat_logprobs_in(choice: Json) -> list[TextLogprob]:
    """Those that an event of a chat tells."""
    told = choice.get("logprobs") or {}
    return [
        TextLogprob(
            bytes(entry["bytes"]),
            entry["logprob"],
            {bytes(likely["bytes"]): likely["logprob"] for likely in entry["top_logprobs"]},
        )
        for entry in told.get("content") or ()
    ]


def completion_logprobs_in(choice: Json) -> list[TextLogprob]:
    """Those that an event of a completion tells, which has bytes that are no text in writing."""
    if (told := choice.get("logprobs")) is None:
        return []
    tops = told["top_logprobs"] or [{} for _ in told["tokens"]]
    return [
        TextLogprob(_bytes_of(name), logprob, {_bytes_of(likely): value for likely, value in top.items()})
        for name, logprob, top in zip(told["tokens"], told["token_logprobs"], tops, strict=True)
    ]


def _bytes_of(name: str) -> bytes:
    if name.startswith(_BYTES) and re.fullmatch(r"(\\x[0-9a-f]{2})+", written := name.removeprefix(_BYTES)):
        return bytes.fromhex(written.replace("\\x", ""))
    return name.encode()
