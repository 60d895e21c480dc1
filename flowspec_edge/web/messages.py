"""Anthropic's Messages: the next message of a dialogue, as a list of blocks.

``max_tokens`` may be left out; a message may then fill the model's context. What a model writes between ``<think>`` and
``</think>`` is a block of its own. ``flowspec`` in the answer, and in the last ``message_delta``, has the figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from flowspec_edge.errors import FieldError
from flowspec_edge.web.asked import Asked, AskedText, TextGenerator
from flowspec_edge.web.chat import ChatMessage, ChatTexts, FunctionCall, ToolCall, write_chat
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.drawing_fields import Drawing
from flowspec_edge.web.error_forms import anthropic_error
from flowspec_edge.web.fields import UNSUPPORTED, Whole, parse_fields
from flowspec_edge.web.framing import NAMED_EVENTS, Json
from flowspec_edge.web.message_form import MessageForm
from flowspec_edge.web.translation import chat_fields, in_words_of, own_fields, renamed

OWN = own_fields(
    idle=frozenset({"cache_control", "inference_geo", "speed", "signature", "is_error", "citations"}),
    neutral={
        "output_config": ({},),
        **dict.fromkeys(("output_format", "container", "context_management"), ()),
        "mcp_servers": ([],),
    },
)
"""Anthropic's fields that are not OpenAI's, and which the core does not do."""
CALLED = {"stop": "stop_sequences", ".function.parameters": ".input_schema", ".function.": "."}
"""How Anthropic calls what the core calls otherwise."""
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""What the model is to do about tools, as chats have it."""
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


class ToolParam(msgspec.Struct, kw_only=True):
    """A tool that the client runs; those that Anthropic runs have other types."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoiceParam(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesFields(Drawing, kw_only=True):
    """The body of ``POST /v1/messages``, and of ``POST /v1/messages/count_tokens``."""

    messages: list[MessageParam]
    model: str | None = None
    system: str | list[InnerBlock] | None = None
    thinking: Thinking | None = None
    max_tokens: Whole | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    tools: list[ToolParam] | None = None
    tool_choice: ToolChoiceParam | None = None


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
        given |= _chat_tools(fields)
        messages = await asyncio.to_thread(_chat_messages, fields)
        with in_words_of(CALLED):
            chat = chat_fields(given, messages, CALLED)
            asked = await write_chat(self._generator, self._template, chat)
        return asked._replace(texts=renamed(asked.texts, CALLED))


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


def _chat_tools(fields: MessagesFields) -> Json:
    """The fields of tools as chats have them."""
    given: Json = {"tools": None if fields.tools is None else [_chat_tool(tool) for tool in fields.tools]}
    match fields.tool_choice:
        case None:
            return given
        case ToolChoiceParam(type="tool", name=str(name)):
            given["tool_choice"] = {"type": "function", "function": {"name": name}}
        case ToolChoiceParam(type="tool"):
            raise FieldError("tool_choice.name", "is missing", "missing_required_parameter")
        case choice:
            if choice.type not in CHOICES:
                raise FieldError("tool_choice.type", f"is {choice.type!r:.80}; it must be tool or {', '.join(CHOICES)}")
            given["tool_choice"] = CHOICES[choice.type]
    given["parallel_tool_calls"] = not fields.tool_choice.disable_parallel_tool_use
    return given


def _chat_tool(tool: ToolParam) -> Json:
    if tool.type not in (None, "custom"):
        return {"type": tool.type}
    given = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": given}


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
