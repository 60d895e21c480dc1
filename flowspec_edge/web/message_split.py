"""Splits what a model writes into its reasoning, what it says, and the calls of tools that it makes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flowspec_edge.web.call_form import ID_LENGTH, PYTHON_TAG, CallForm
from flowspec_edge.web.reasoning import ReasoningSplit

_ID = re.compile(rf',\s*"id"\s*:\s*"[a-zA-Z0-9]{{{ID_LENGTH}}}"')


class CallPart(NamedTuple):
    """A part of the call with this number: its first part has ``id`` and ``name``, and each one a part of the
    arguments' JSON. With the last one the call ``is_whole``.
    """

    number: int
    id: str
    name: str
    arguments: str
    is_whole: bool

    @property
    def is_first(self) -> bool:
        return bool(self.name)

    def joined(self, further: CallPart) -> CallPart:
        """This part and the next one of the same call."""
        return self._replace(arguments=self.arguments + further.arguments, is_whole=further.is_whole)


class Said(NamedTuple):
    """What has become certain. It has one part of each call at most."""

    reasoning: str
    content: str
    calls: tuple[CallPart, ...] = ()


class MessageSplit:
    """Takes a message as it is written.

    Args:
        has_begun: the prompt has ``<think>`` at its end, as templates of some models write it.
        calls: how calls are written, where there may be some.
        is_either: what is said is calls alone, or has none.
    """

    def __init__(self, *, has_begun: bool = False, calls: CallForm | None = None, is_either: bool = False) -> None:
        self._reasoning = ReasoningSplit(has_begun=has_begun)
        self._calls = None if calls is None else CallSplit(calls, is_either=is_either)

    def feed(self, text: str, *, is_last: bool = False) -> Said:
        """What has become certain with this text."""
        reasoning, content = self._reasoning.feed(text, is_last=is_last)
        if self._calls is None:
            return Said(reasoning, content)
        return Said(reasoning, *self._calls.feed(content, is_last=is_last))

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the message ended, in OpenAI's words, of a text that ended for that ``reason``."""
        has_called = self._calls is not None and self._calls.has_called
        return "tool_calls" if reason == "stop" and has_called else reason


@dataclass(slots=True)
class _Call:
    number: int
    id: str
    name: str
    is_told: bool = False
    end: _ObjectEnd = field(default_factory=lambda: _ObjectEnd())


class CallSplit:
    """Finds calls in a text that follows the grammar of calls: from where one begins, all is as their form has it.

    A call that is cut off in its arguments is told up to there, and never as a whole one.

    Where it ``is_either``, or calls have no mark, they begin with the text. Otherwise they begin with their mark.
    """

    def __init__(self, form: CallForm, *, is_either: bool = False) -> None:
        self._form = form
        self._mark = "" if is_either else form.mark
        self._held = ""
        self._state = "before"
        self._num_calls = 0
        self._call: _Call | None = None

    @property
    def has_called(self) -> bool:
        """Whether there were calls, and all of them are whole."""
        return self._state == "behind"

    def feed(self, text: str, *, is_last: bool = False) -> tuple[str, tuple[CallPart, ...]]:
        """What is said before the calls, and what has come of them. Space between the two is left out."""
        self._held += text
        content = self._say(is_last=is_last) if self._state in ("before", "saying") else ""
        parts: list[CallPart] = []
        while part := self._next_part():
            parts.append(part)
        return content, tuple(parts)

    def _say(self, *, is_last: bool) -> str:
        """What is no call."""
        mark, begun = self._mark, self._held.lstrip()
        if mark:
            content, found, rest = self._held.partition(mark)
            if found:
                return self._begin(content, found + rest)
            certain = len(self._held) if is_last else _certain(self._held, mark)
            content, self._held = self._held[:certain], self._held[certain:]
            return content
        if not self._form.mark:
            begun = begun.removeprefix(PYTHON_TAG).lstrip()
        if self._state == "before" and begun.startswith(self._form.begin):
            return self._begin("", begun)
        may_begin = any(start.startswith(begun) for start in (self._form.begin, PYTHON_TAG))
        if self._state == "before" and may_begin and not is_last:
            return ""
        self._state = "saying"
        content, self._held = self._held, ""
        return content

    def _begin(self, content: str, rest: str) -> str:
        self._state, self._held = "begin", rest
        return content.rstrip()

    def _next_part(self) -> CallPart | None:
        """The next part of a call; None where nothing more is certain."""
        if self._state == "begin":
            self._go_behind(self._form.begin)
        elif self._state == "behind" and self._form.between is not None:
            id = _ID.match(self._held)
            self._held = self._held[0 if id is None else id.end() :]
            self._go_behind(self._form.between)
        if self._state == "name":
            name, found, rest = self._held.partition(self._form.middle)
            if found:
                self._call = _Call(self._num_calls, self._form.new_id(), name)
                self._state, self._held, self._num_calls = "arguments", rest, self._num_calls + 1
        return self._arguments() if self._state == "arguments" else None

    def _go_behind(self, text: str) -> None:
        """A name comes where that text has come whole."""
        if self._held.startswith(text):
            self._state, self._held = "name", self._held.removeprefix(text)

    def _arguments(self) -> CallPart | None:
        call = self._call
        assert call is not None, "a call has begun"
        num = call.end.find(self._held)
        arguments, self._held = self._held[:num], self._held[num:]
        if call.end.is_found:
            self._state = "behind"
        elif not arguments and call.is_told:
            return None
        id, name = ("", "") if call.is_told else (call.id, call.name)
        call.is_told = True
        return CallPart(call.number, id, name, arguments, call.end.is_found)


class _ObjectEnd:
    """Looks for the end of a JSON object in a text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_text = self._is_escaped = self.is_found = False

    def find(self, text: str) -> int:
        """How many characters of the text are the object's."""
        for num, letter in enumerate(text, 1):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_text:
                self._is_escaped, self._is_in_text = letter == "\\", letter != '"'
            elif letter == '"':
                self._is_in_text = True
            else:
                self._depth += (letter in "{[") - (letter in "}]")
                if self._depth == 0:
                    self.is_found = True
                    return num
        return len(text)


def arguments_of(part: CallPart) -> dict[str, Any]:
    """The arguments of a call whose whole JSON is in one part; empty where it was cut off."""
    arguments: dict[str, Any] = json.loads(part.arguments) if part.is_whole else {}
    return arguments


def _certain(text: str, mark: str) -> int:
    """How many characters cannot be a part of the mark, or space before it."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return len(text[:-length].rstrip())
    return len(text.rstrip())
