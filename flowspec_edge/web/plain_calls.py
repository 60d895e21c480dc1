"""Tools and their calls as plain messages, for models whose template tells nothing of tools."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from flowspec_edge.web.call_form import PLAIN_CALLS

Json = dict[str, Any]

_INTRODUCTION = """\
You can call functions. These are there, each with the JSON schema of its parameters:
"""
_INSTRUCTION = """
To call one, write its name and its arguments as JSON in this form, and nothing behind it:
<tool_call>
{"name": "the function's name", "arguments": {"a parameter": "its value"}}
</tool_call>
What it gave comes back between <tool_response> and </tool_response>."""


def as_plain_messages(messages: Sequence[Json], tools: Sequence[Json], *, has_system: bool) -> list[Json]:
    """Messages without roles and fields of tools. The tools are told in the system's message, or in the first one of
    the user where the template ``has_system`` not.

    Calls are written as the assistant's text, and results as the user's. Messages that stand side by side become one.
    """
    plain = [_plain(message) for message in messages]
    if tools:
        told = "\n".join([_INTRODUCTION, *(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)])
        first = {"role": "system" if has_system else "user", "content": told + "\n" + _INSTRUCTION}
        plain.insert(has_system and plain[0]["role"] == "system", first)
    return _joined(plain)


def _plain(message: Json) -> Json:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls") or ()
    written = [_written(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    kept = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, [message["content"], *written]))}


def _written(name: str, arguments: Json) -> str:
    form = PLAIN_CALLS
    return f"{form.begin}{name}{form.middle}{json.dumps(arguments, ensure_ascii=False)}{form.end}"


def _joined(messages: Iterable[Json]) -> list[Json]:
    """With one message of those of one role that stand side by side: many templates want roles to alternate."""
    joined: list[Json] = []
    for message in messages:
        if joined and joined[-1]["role"] == message["role"]:
            joined[-1] = {**joined[-1], **message, "content": f"{joined[-1]['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined
