"""OpenAI's chat completions: the next message of a dialogue.

What stands between ``<think>`` and ``</think>`` comes as ``reasoning_content``, and calls of tools as ``tool_calls``.
``flowspec`` in the answer has the figures.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from flowspec_edge.config import Piece
from flowspec_edge.web.asked import Asked, TextGenerator
from flowspec_edge.web.chat import ChatFields, ChatTexts, write_chat
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.fields import parse_fields
from flowspec_edge.web.framing import Json
from flowspec_edge.web.logprobs import chat_logprobs
from flowspec_edge.web.message_split import CallPart
from flowspec_edge.web.text_fields import usage_of


class Chat:
    """The dialect of ``POST /v1/chat/completions``."""

    def __init__(self, generator: TextGenerator, template: ChatTemplate, *, is_strict: bool) -> None:
        self._generator = generator
        self._template = template
        self._is_strict = is_strict

    async def read(self, body: bytes) -> Asked:
        """What a request asks for. Raises as :func:`flowspec_edge.web.chat.write_chat` does."""
        fields, warnings = parse_fields(body, ChatFields, is_strict=self._is_strict)
        asked = await write_chat(self._generator, self._template, fields)
        form = ChatForm(self._generator, asked, fields, self._template)
        return Asked(asked.texts, form, bool(fields.stream), warnings=[*warnings, *asked.warnings])


class ChatForm:
    """``template`` is the one that the messages were written by."""

    def __init__(
        self,
        generator: TextGenerator,
        asked: ChatTexts,
        fields: ChatFields,
        template: ChatTemplate,
    ) -> None:
        texts = asked.texts
        self._seeds = [text.options.seed for text in texts]
        self._includes_usage = fields.includes_usage
        self._template = "plain" if template.is_plain else "the model's"
        self._splits = [asked.split() for _ in texts]
        self._has_begun = [False] * len(texts)
        self._statistics: list[Json] = [{}] * len(texts)
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": generator.model,
            "system_fingerprint": f"fp_{generator.bundle[:12]}",
        }

    def events(self, choice: int, piece: Piece) -> list[Json]:
        events = []
        if not self._has_begun[choice]:
            self._has_begun[choice] = True
            events.append(self._event(choice, {"role": "assistant", "content": ""}))
        is_last = piece.finish_reason is not None
        said = self._splits[choice].feed(piece.text, is_last=is_last)
        delta: Json = {"reasoning_content": said.reasoning} if said.reasoning else {}
        if said.content or not (said.reasoning or said.calls or is_last):
            delta["content"] = said.content
        if said.calls:
            delta["tool_calls"] = [_call_delta(part) for part in said.calls]
        if delta or piece.token_ids:
            events.append(self._event(choice, delta, piece))
        if is_last:
            self._statistics[choice] = piece.statistics or {}
            reason = self._splits[choice].finish_reason(piece.finish_reason)
            events.append(self._event(choice, {}, finish_reason=reason))
            events[-1]["flowspec"] = self._figures(choice)
        return events

    def last_events(self) -> list[Json]:
        if not self._includes_usage:
            return []
        usage = usage_of(self._statistics, len(self._statistics))
        return [{**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}]

    def whole(self, choices: Sequence[Piece]) -> Json:
        self._statistics = [piece.statistics or {} for piece in choices]
        figures = [self._figures(choice) for choice in range(len(choices))]
        return {
            **self._head,
            "choices": [self._choice(choice, piece) for choice, piece in enumerate(choices)],
            "usage": usage_of(self._statistics, len(choices)),
            "flowspec": figures[0] if len(figures) == 1 else {"choices": figures},
        }

    def _choice(self, choice: int, piece: Piece) -> Json:
        said = self._splits[choice].feed(piece.text, is_last=True)
        content = None if said.calls and not said.content else said.content
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_call(part) for part in said.calls]
        return {
            "index": choice,
            "message": message,
            "token_ids": piece.token_ids,
            "logprobs": chat_logprobs(piece.logprobs),
            "finish_reason": self._splits[choice].finish_reason(piece.finish_reason),
        }

    def _event(self, choice: int, delta: Json, piece: Piece | None = None, *, finish_reason: str | None = None) -> Json:
        event = {
            **self._head,
            "object": "chat.completion.chunk",
            "choices": [
                {
                    "index": choice,
                    "delta": delta,
                    "token_ids": [] if piece is None else piece.token_ids,
                    "logprobs": None if piece is None else chat_logprobs(piece.logprobs),
                    "finish_reason": finish_reason,
                }
            ],
        }
        return event | {"usage": None} if self._includes_usage else event

    def _figures(self, choice: int) -> Json:
        return {**self._statistics[choice], "seed": self._seeds[choice], "chat_template": self._template}


def _call(part: CallPart) -> Json:
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


def _call_delta(part: CallPart) -> Json:
    """A part of a call. Clients add up the arguments, and take the rest from the first part."""
    if part.is_first:
        return {"index": part.number, **_call(part)}
    return {"index": part.number, "function": {"arguments": part.arguments}}
