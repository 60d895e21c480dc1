"""Anthropic's ``message`` objects of one answer, and the events of a stream."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from flowspec_edge.config import Piece
from flowspec_edge.web.asked import TextGenerator
from flowspec_edge.web.chat import ChatTexts
from flowspec_edge.web.framing import Json
from flowspec_edge.web.message_split import CallPart, arguments_of

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
"""Why a message ended, by OpenAI's words for it."""


class MessageForm:
    """``stops`` are the caller's stop sequences."""

    def __init__(self, generator: TextGenerator, asked: ChatTexts, stops: Sequence[str]) -> None:
        self._seed = asked.texts[0].options.seed
        self._stops = stops
        self._split = asked.split()
        self._block: str | None = None  # which one is written: its type, or a call's id
        self._num_blocks = 0
        self._has_begun = False
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": generator.model,
        }

    def events(self, choice: int, piece: Piece) -> list[Json]:
        events = [] if self._has_begun else [self._begun(piece)]
        self._has_begun = True
        said = self._split.feed(piece.text, is_last=piece.finish_reason is not None)
        for kind, text in (("thinking", said.reasoning), ("text", said.content)):
            if text:
                events += [*self._go_to(kind, _block(kind, "")), self._delta(f"{kind}_delta", kind, text)]
        for call in said.calls:
            if call.is_first:
                events += self._go_to(call.id, _tool_use(call, {}))
            events.append(self._delta("input_json_delta", "partial_json", call.arguments))
        if piece.finish_reason is not None:
            if not self._num_blocks:
                events += self._go_to("text", _block("text", ""))
            events += [*self._go_to(None), self._ended(piece)]
        return events

    def last_events(self) -> list[Json]:
        return [{"type": "message_stop"}]

    def whole(self, choices: Sequence[Piece]) -> Json:
        (piece,) = choices
        said = self._split.feed(piece.text, is_last=True)
        blocks: list[Json] = [_block("thinking", said.reasoning)] if said.reasoning else []
        if said.content or not (said.reasoning or said.calls):
            blocks.append(_block("text", said.content))
        blocks += [_tool_use(call, arguments_of(call)) for call in said.calls]
        return {
            **self._head,
            "content": blocks,
            **self._ending(piece),
            "usage": _usage(piece),
            "flowspec": self._figures(piece),
        }

    def _begun(self, piece: Piece) -> Json:
        """The first event; only the first piece with tokens knows those of the prompt."""
        known = piece.statistics or {"prompt_tokens": len(piece.prompt_token_ids or ()), "completion_tokens": 0}
        usage = {"input_tokens": known["prompt_tokens"], "output_tokens": 0}
        message: Json = {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
        return {"type": "message_start", "message": message}

    def _go_to(self, name: str | None, block: Json | None = None) -> list[Json]:
        """End the block that is written, and begin this one, where it is another one."""
        events: list[Json] = []
        if name == self._block:
            return events
        if self._block == "thinking":
            events.append(self._delta("signature_delta", "signature", ""))
        if self._block is not None:
            events.append({"type": "content_block_stop", "index": self._num_blocks - 1})
        if block is not None:
            self._num_blocks += 1
            events.append({"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block})
            if self._num_blocks == 1:
                events.append({"type": "ping"})
        self._block = name
        return events

    def _delta(self, kind: str, field: str, text: str) -> Json:
        return {
            "type": "content_block_delta",
            "index": self._num_blocks - 1,
            "delta": {"type": kind, field: text},
        }

    def _ended(self, piece: Piece) -> Json:
        return {
            "type": "message_delta",
            "delta": self._ending(piece),
            "usage": _usage(piece),
            "flowspec": self._figures(piece),
        }

    def _ending(self, piece: Piece) -> Json:
        stop = piece.stop if piece.stop in self._stops else None
        reason = REASONS[self._split.finish_reason(piece.finish_reason) or "stop"]
        return {"stop_reason": "stop_sequence" if stop else reason, "stop_sequence": stop}

    def _figures(self, piece: Piece) -> Json:
        return {**(piece.statistics or {}), "seed": self._seed}


def _block(kind: str, text: str) -> Json:
    return {"type": kind, kind: text} | ({"signature": ""} if kind == "thinking" else {})


def _tool_use(call: CallPart, arguments: Json) -> Json:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _usage(piece: Piece) -> Json:
    """In this dialect, tokens that are read from a cache are not among the others."""
    statistics = piece.statistics or {}
    num_cached = statistics.get("cached_tokens", 0)
    return {
        "input_tokens": statistics.get("prompt_tokens", 0) - num_cached,
        "output_tokens": statistics.get("completion_tokens", 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
    }
