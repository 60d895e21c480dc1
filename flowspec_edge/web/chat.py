"""OpenAI's chat completions: the next message of a dialogue, written by the model's own template.

Without ``max_tokens`` or ``max_completion_tokens`` a message may fill the model's context, and without ``temperature``
it is drawn at 1, as OpenAI's are. ``top_k``, ``schedule``, and ``chat_template_kwargs``, variables of the template, are
extra fields; ``flowspec`` in the answer has the figures. What stands between ``<think>`` and ``</think>`` comes as
``reasoning_content``.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from flowspec_edge.config import MAX_NEW_TOKENS, MAX_TOP_LOGPROBS, GenerateOptions, Piece, TextPart
from flowspec_edge.errors import FieldError
from flowspec_edge.web.asked import Asked, AskedText, TextGenerator
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.fields import MAX_FIELD_BYTES, UNSUPPORTED, Json, Whole, parse_fields, whole
from flowspec_edge.web.grammar_fields import grammar_of
from flowspec_edge.web.logprobs import chat_logprobs
from flowspec_edge.web.reasoning import BEGIN, END, ReasoningSplit
from flowspec_edge.web.text_fields import (
    TextFields,
    check_model,
    num_choices,
    options_of,
    options_of_choice,
    usage_of,
)

DEFAULT = GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, temperature=1.0)
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""OpenAI's roles, each with that which templates know."""
PLAIN_NOTICE = "the model has no chat template; messages are written as a plain dialogue"
PLAIN_STOP = "\n\nUser:"
"""Where a model that goes on with a plain dialogue begins to write the user's next message."""


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, kw_only=True):
    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatFields(TextFields, kw_only=True):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage]
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tools: msgspec.Raw = msgspec.Raw()
    tool_choice: str | dict[str, msgspec.Raw] | None = None


class Chat:
    """The dialect of ``POST /v1/chat/completions``."""

    def __init__(self, generator: TextGenerator, template: ChatTemplate, *, is_strict: bool) -> None:
        self._generator = generator
        self._template = template
        self._is_strict = is_strict

    async def read(self, body: bytes) -> Asked:
        """What a request asks for. The prompt is written on a thread.

        Raises:
            RequestError: it asks for what is not there, or the template refuses its messages.
            BundleError: the template cannot be read.
        """
        fields, warnings = parse_fields(body, ChatFields, is_strict=self._is_strict)
        asked = await write_chat(self._generator, self._template, fields)
        form = ChatForm(self._generator, asked.texts, fields, self._template, is_reasoning=asked.is_reasoning)
        return Asked(asked.texts, form, bool(fields.stream), warnings=[*warnings, *asked.warnings])


class ChatTexts(NamedTuple):
    """``is_reasoning`` where the prompt ends within reasoning, as templates of some models write it."""

    texts: list[AskedText]
    is_reasoning: bool
    warnings: list[str]


async def write_chat(
    generator: TextGenerator, template: ChatTemplate, fields: ChatFields, default: GenerateOptions = DEFAULT
) -> ChatTexts:
    """The texts that a chat asks for, in whichever dialect it came. The prompt is written on a thread.

    Raises: as :meth:`Chat.read`.
    """
    check_model(fields, generator.model)
    _check_supported(fields)
    num, warnings = num_choices(fields), []
    options = replace(options_of(fields, default), num_logprobs=_num_logprobs(fields))
    if template.is_plain:
        options = replace(options, stop=(*options.stop, PLAIN_STOP))
        warnings = [PLAIN_NOTICE]
    messages = await asyncio.to_thread(_messages, fields.messages)
    prompt = await template.render(messages, variables=fields.chat_template_kwargs)
    is_reasoning = bool(prompt) and prompt[-1].text.rstrip().endswith(BEGIN)
    if is_reasoning and options.grammar is not None:  # which is the answer's, and has no room for thoughts
        prompt, is_reasoning = [*prompt, TextPart(f"\n{END}\n\n")], False
    named, _ = grammar_of(fields)
    texts = [AskedText(prompt, options_of_choice(options, at), named) for at in range(num)]
    return ChatTexts(texts, is_reasoning, warnings)


def _check_supported(fields: ChatFields) -> None:
    if not fields.messages:
        raise FieldError("messages", "is empty; give the dialogue so far")
    if bytes(fields.tools) not in (b"", b"null", b"[]") and fields.tool_choice != "none":
        raise FieldError("tools", "are not supported yet; leave them out, or send tool_choice: none", UNSUPPORTED)
    if fields.tool_choice not in (None, "none", "auto"):
        raise FieldError("tool_choice", "asks for a call of a tool, which is not supported yet", UNSUPPORTED)


def _num_logprobs(fields: ChatFields) -> int | None:
    num = whole("top_logprobs", fields.top_logprobs, 0)
    if num and not fields.logprobs:
        raise FieldError("top_logprobs", f"is {num}, and logprobs is not true")
    if not 0 <= num <= MAX_TOP_LOGPROBS:
        raise FieldError("top_logprobs", f"is {num}; it must lie between 0 and {MAX_TOP_LOGPROBS}")
    return num if fields.logprobs else None


def _messages(messages: Sequence[ChatMessage]) -> list[Json]:
    """As templates know them."""
    return [_message(f"messages[{at}]", message) for at, message in enumerate(messages)]


def _message(name: str, message: ChatMessage) -> Json:
    """A message as templates know it. ``name`` is how the caller names it."""
    if message.role not in ROLES:
        raise FieldError(f"{name}.role", f"is {message.role!r:.80}; it must be one of {', '.join(ROLES)}")
    written: Json = {"role": ROLES[message.role], "content": _content(f"{name}.content", message.content)}
    for key in ("name", "reasoning_content", "tool_call_id"):
        if (value := getattr(message, key)) is not None:
            written[key] = value
    if message.tool_calls:
        written["tool_calls"] = [
            _tool_call(f"{name}.tool_calls[{at}]", call) for at, call in enumerate(message.tool_calls)
        ]
    elif message.content is None:
        raise FieldError(f"{name}.content", "is missing", "missing_required_parameter")
    return written


def _content(name: str, content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for at, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise FieldError(
                f"{name}[{at}].type", f"is {part.type!r:.80}; this model reads parts of type 'text' alone", UNSUPPORTED
            )
    return "\n".join(part.text or "" for part in content)


def _tool_call(name: str, call: ToolCall) -> Json:
    """Templates write arguments as JSON themselves."""
    if len(call.function.arguments) > MAX_FIELD_BYTES:
        raise FieldError(f"{name}.function.arguments", f"has more than {MAX_FIELD_BYTES} characters")
    try:
        arguments = msgspec.json.decode(call.function.arguments, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as cause:
        raise FieldError(f"{name}.function.arguments", "is no JSON object") from cause
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id or "", "type": call.type, "function": function}


class ChatForm:
    """OpenAI's ``chat.completion`` objects of one answer, and the ``chat.completion.chunk`` objects of a stream."""

    def __init__(
        self,
        generator: TextGenerator,
        texts: Sequence[AskedText],
        fields: ChatFields,
        template: ChatTemplate,
        *,
        is_reasoning: bool,
    ) -> None:
        self._seeds = [text.options.seed for text in texts]
        self._includes_usage = fields.includes_usage
        self._template = "plain" if template.is_plain else "the model's"
        self._splits = [ReasoningSplit(has_begun=is_reasoning) for _ in texts]
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
        reasoning, content = self._splits[choice].feed(piece.text, is_last=is_last)
        delta = {"reasoning_content": reasoning} if reasoning else {}
        if content or not (reasoning or is_last):
            delta["content"] = content
        if delta or piece.token_ids:
            events.append(self._event(choice, delta, piece))
        if is_last:
            self._statistics[choice] = piece.statistics or {}
            events.append(self._event(choice, {}, finish_reason=piece.finish_reason))
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
        reasoning, content = self._splits[choice].feed(piece.text, is_last=True)
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        return {
            "index": choice,
            "message": message,
            "token_ids": piece.token_ids,
            "logprobs": chat_logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }

    def _event(
        self, choice: int, delta: Mapping[str, str], piece: Piece | None = None, *, finish_reason: str | None = None
    ) -> Json:
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
