"""Anthropic's Messages: the next message of a dialogue, as a list of blocks.

``max_tokens`` may be left out; a message may then fill the model's context. What a model writes between ``<think>`` and
``</think>`` is a block of its own. ``flowspec`` in the answer, and in the last ``message_delta``, has the figures.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from flowspec_edge.config import Piece
from flowspec_edge.errors import FieldError
from flowspec_edge.web.asked import Asked, AskedText, TextGenerator
from flowspec_edge.web.chat import ChatMessage, ChatTexts, FunctionCall, ToolCall, write_chat
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.error_forms import anthropic_error
from flowspec_edge.web.fields import UNSUPPORTED, Whole, parse_fields
from flowspec_edge.web.framing import NAMED_EVENTS, Json
from flowspec_edge.web.reasoning import ReasoningSplit
from flowspec_edge.web.translation import Drawing, chat_fields, in_words_of, own_fields

OWN = own_fields(
    idle=frozenset({"cache_control", "inference_geo", "speed", "signature", "is_error", "citations"}),
    neutral={
        "tools": ([],),
        "tool_choice": ({"type": "none"}, {"type": "auto"}),
        "output_config": ({},),
        **dict.fromkeys(("output_format", "container", "context_management"), ()),
        "mcp_servers": ([],),
    },
)
"""Anthropic's fields that are not OpenAI's, and which the core does not do."""
CALLED = {"stop": "stop_sequences"}
"""How Anthropic calls what the core calls otherwise."""
READ = "this model reads blocks of type 'text', and of tools called before"


class Block(msgspec.Struct, kw_only=True):
    """A block of a message; its ``type`` says which of the other fields it has."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[InnerBlock] | None = None


class InnerBlock(msgspec.Struct, kw_only=True):
    """A block within a tool's result."""

    type: str
    text: str | None = None


class MessageParam(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[Block]


class Thinking(msgspec.Struct, kw_only=True):
    type: str
    budget_tokens: Whole | None = None


class MessagesFields(Drawing, kw_only=True):
    """The body of ``POST /v1/messages``, and of ``POST /v1/messages/count_tokens``."""

    messages: list[MessageParam]
    model: str | None = None
    system: str | list[InnerBlock] | None = None
    thinking: Thinking | None = None
    max_tokens: Whole | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None


class Messages:
    """The dialect of ``POST /v1/messages``."""

    def __init__(self, generator: TextGenerator, template: ChatTemplate, *, is_strict: bool) -> None:
        self._generator = generator
        self._template = template
        self._is_strict = is_strict

    async def read(self, body: bytes) -> Asked:
        """What a request asks for. Raises as :meth:`flowspec_edge.web.chat.Chat.read` does."""
        fields, warnings = parse_fields(body, MessagesFields, is_strict=self._is_strict, own=OWN)
        asked = await self._write(fields)
        form = MessageForm(self._generator, asked, fields.stop_sequences or [])
        warnings += asked.warnings
        return Asked(
            asked.texts, form, bool(fields.stream), warnings=warnings, framing=NAMED_EVENTS, failed=anthropic_error
        )

    async def read_to_count(self, body: bytes) -> AskedText:
        """The text whose prompt is to be counted. Raises as :meth:`read` does."""
        fields, _ = parse_fields(body, MessagesFields, is_strict=self._is_strict, own=OWN)
        return (await self._write(fields)).texts[0]

    async def _write(self, fields: MessagesFields) -> ChatTexts:
        names = ("model", "max_tokens", *Drawing.__struct_fields__)
        given = {name: getattr(fields, name) for name in names} | {"stop": fields.stop_sequences}
        given["chat_template_kwargs"] = _variables(fields.thinking)
        messages = await asyncio.to_thread(_chat_messages, fields)
        with in_words_of(CALLED):
            chat = chat_fields(given, messages, CALLED)
            return await write_chat(self._generator, self._template, chat)


def _variables(thinking: Thinking | None) -> Json | None:
    """Variables of a template that has the model think or not."""
    if thinking is None:
        return None
    if thinking.type not in ("disabled", "adaptive"):
        raise FieldError(
            "thinking.type",
            f"is {thinking.type!r:.80}; it may be 'disabled' or 'adaptive', without a budget",
            UNSUPPORTED,
        )
    return {"enable_thinking": thinking.type == "adaptive"}


def _chat_messages(fields: MessagesFields) -> list[ChatMessage]:
    messages = [part for at, message in enumerate(fields.messages) for part in _parts(f"messages[{at}]", message)]
    if fields.system is None:
        return messages
    return [ChatMessage(role="system", content=_text("system", fields.system)), *messages]


def _parts(name: str, message: MessageParam) -> list[ChatMessage]:
    """A message as the core has it: results of tools are messages of their own, before what else is said."""
    if message.role not in ("user", "assistant"):
        raise FieldError(f"{name}.role", f"is {message.role!r:.80}; it must be user or assistant")
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    results, texts, thoughts, calls = [], [], [], []
    for at, block in enumerate(message.content):
        match block:
            case Block(type="text", text=str(text)):
                texts.append(text)
            case Block(type="thinking", thinking=str(thought)) if message.role == "assistant":
                thoughts.append(thought)
            case Block(type="tool_use", id=str(called), name=str(tool)) if message.role == "assistant":
                arguments = msgspec.json.encode(block.input or {}).decode()
                calls.append(ToolCall(id=called, function=FunctionCall(name=tool, arguments=arguments)))
            case Block(type="tool_result", tool_use_id=str(called)) if message.role == "user":
                content = _text(f"{name}.content[{at}].content", block.content or "")
                results.append(ChatMessage(role="tool", tool_call_id=called, content=content))
            case _:
                raise FieldError(f"{name}.content[{at}].type", f"is {block.type!r:.80}; {READ}", UNSUPPORTED)
    if texts or calls or not results:
        results.append(
            ChatMessage(
                role=message.role,
                content="\n".join(texts),
                reasoning_content="\n".join(thoughts) if thoughts else None,
                tool_calls=calls or None,
            )
        )
    return results


def _text(name: str, content: str | Sequence[InnerBlock]) -> str:
    if isinstance(content, str):
        return content
    for at, block in enumerate(content):
        if block.type != "text" or block.text is None:
            raise FieldError(f"{name}[{at}].type", f"is {block.type!r:.80}; {READ}", UNSUPPORTED)
    return "\n".join(block.text or "" for block in content)


class MessageForm:
    """Anthropic's ``message`` objects of one answer, and the events of a stream."""

    def __init__(self, generator: TextGenerator, asked: ChatTexts, stops: Sequence[str]) -> None:
        self._seed = asked.texts[0].options.seed
        self._stops = stops
        self._split = ReasoningSplit(has_begun=asked.is_reasoning)
        self._block: str | None = None  # the type of the block that is written
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
        reasoning, content = self._split.feed(piece.text, is_last=piece.finish_reason is not None)
        for kind, text in (("thinking", reasoning), ("text", content)):
            if text:
                events += [*self._go_to(kind), self._delta(f"{kind}_delta", kind, text)]
        if piece.finish_reason is not None:
            events += [*([] if self._num_blocks else self._go_to("text")), *self._go_to(None), self._ended(piece)]
        return events

    def last_events(self) -> list[Json]:
        return [{"type": "message_stop"}]

    def whole(self, choices: Sequence[Piece]) -> Json:
        (piece,) = choices
        reasoning, content = self._split.feed(piece.text, is_last=True)
        blocks: list[Json] = [_block("thinking", reasoning)] if reasoning else []
        if content or not reasoning:
            blocks.append(_block("text", content))
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

    def _go_to(self, kind: str | None) -> list[Json]:
        """End the block that is written, and begin one of that kind, where it is another one."""
        events: list[Json] = []
        if kind == self._block:
            return events
        if self._block == "thinking":
            events.append(self._delta("signature_delta", "signature", ""))
        if self._block is not None:
            events.append({"type": "content_block_stop", "index": self._num_blocks - 1})
        if kind is not None:
            self._num_blocks += 1
            block = _block(kind, "")
            events.append({"type": "content_block_start", "index": self._num_blocks - 1, "content_block": block})
            if self._num_blocks == 1:
                events.append({"type": "ping"})
        self._block = kind
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
        reason = "stop_sequence" if stop else "max_tokens" if piece.finish_reason == "length" else "end_turn"
        return {"stop_reason": reason, "stop_sequence": stop}

    def _figures(self, piece: Piece) -> Json:
        return {**(piece.statistics or {}), "seed": self._seed}


def _block(kind: str, text: str) -> Json:
    return {"type": kind, kind: text} | ({"signature": ""} if kind == "thinking" else {})


def _usage(piece: Piece) -> Json:
    statistics = piece.statistics or {}
    return {
        "input_tokens": statistics.get("prompt_tokens", 0),
        "output_tokens": statistics.get("completion_tokens", 0),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
