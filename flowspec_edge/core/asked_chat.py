"""A message of a dialogue as the client of a server asks for it, and what has come of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowspec_edge.config import Piece
from flowspec_edge.core.answer_parts import TextLogprob, ToolCall, chat_logprobs_in
from flowspec_edge.core.asked_text import error_of

Json = dict[str, Any]


@dataclass(slots=True)
class AskedChat:
    """``options`` are fields of OpenAI's chat completions; those that are None are left to the server."""

    path = "/v1/chat/completions"

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TextLogprob] = field(default_factory=list)
    has_ended: bool = False
    has_begun: bool = False

    def request(self) -> Json:
        """The body of the request."""
        given = {name: value for name, value in self.options.items() if value is not None}
        return {"messages": list(self.messages), **given, "stream": True}

    def take(self, event: Json) -> Piece:
        """Add what an event of the answer brings.

        Raises:
            FlowspecError: it tells of an error; see :func:`error_of`.
        """
        if "error" in event:
            raise error_of(event, 503)
        if not event["choices"]:
            return Piece(text="", token_ids=[])
        (choice,) = event["choices"]
        delta = choice["delta"]
        for call in delta.get("tool_calls") or ():
            self._add_call(call)
        self.logprobs += chat_logprobs_in(choice)
        self.has_begun = True
        self.has_ended = choice["finish_reason"] is not None
        return Piece(
            text=delta.get("content") or "",
            reasoning=delta.get("reasoning_content") or "",
            token_ids=choice.get("token_ids") or [],
            finish_reason=choice["finish_reason"],
            statistics=event.get("flowspec") if self.has_ended else None,
        )

    def _add_call(self, part: Json) -> None:
        """Calls of tools come in parts: the name once, then pieces of the arguments."""
        while len(self.tool_calls) <= part["index"]:
            self.tool_calls.append(ToolCall())
        call, function = self.tool_calls[part["index"]], part.get("function") or {}
        call.id = call.id or part.get("id") or ""
        call.name += function.get("name") or ""
        call.arguments += function.get("arguments") or ""
