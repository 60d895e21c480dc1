"""OpenAI's Responses: the next message of a dialogue, as a list of output items.

Nothing is kept: each request brings the whole dialogue, and what would refer to an earlier answer is refused by name.
What a model writes between ``<think>`` and ``</think>`` is an item of its own. ``flowspec`` in the answer has the
figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from flowspec_edge.errors import FieldError
from flowspec_edge.web.asked import Asked, TextGenerator
from flowspec_edge.web.chat import ChatMessage, FunctionCall, ToolCall, write_chat
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.drawing_fields import Drawing
from flowspec_edge.web.fields import UNSUPPORTED, Whole, parse_fields
from flowspec_edge.web.framing import NAMED_EVENTS, Json
from flowspec_edge.web.response_form import ResponseForm
from flowspec_edge.web.translation import chat_fields, in_words_of, own_fields, renamed

OWN = own_fields(
    idle=frozenset({"prompt_cache_options", "background_options", "status", "phase", "encrypted_content"}),
    neutral={
        **dict.fromkeys(("previous_response_id", "conversation", "prompt", "moderation", "access_programs"), ()),
        **dict.fromkeys(("max_tool_calls", "image"), ()),
        **dict.fromkeys(("background", "store"), (False,)),
        **dict.fromkeys(("include", "context_management"), ([],)),
        "reasoning": ({},),
        "truncation": ("disabled",),
    },
)
"""Fields of responses that other dialects of OpenAI's lack, and which are not done. Nothing is kept (``store``)."""
CALLED = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "verbosity": "text.verbosity",
    ".function.": ".",
    ".allowed_tools.": ".",
}
"""How this dialect calls what the core calls otherwise."""
ROLES = ("user", "assistant", "system", "developer")
TEXTS = {"input_text", "output_text", "reasoning_text", "summary_text", "text"}
"""Types of content that has a text."""


class Part(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None


class Item(msgspec.Struct, kw_only=True):
    """An item of the input; its ``type`` says which of the other fields it has."""

    type: str = "message"
    id: str | None = None
    role: str | None = None
    content: str | list[Part] | None = None
    summary: list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """A tool as this dialect has it: what chats keep in an object of its own stands in the tool itself."""

    type: str = "function"
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionName(msgspec.Struct, kw_only=True):
    type: str = "function"
    name: str | None = None


class FunctionChoice(msgspec.Struct, kw_only=True):
    """The tool that is to be called, or those that may be: ``mode`` says whether one has to."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[FunctionName] | None = None


class TextSettings(msgspec.Struct, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class StreamSettings(msgspec.Struct, kw_only=True):
    include_obfuscation: bool | None = None


class ResponseFields(Drawing, kw_only=True):
    """The body of ``POST /v1/responses``."""

    input: str | list[Item]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Whole | None = None
    metadata: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: StreamSettings | None = None
    text: TextSettings | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: str | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None


class Responses:
    """The dialect of ``POST /v1/responses``."""

    def __init__(self, generator: TextGenerator, template: ChatTemplate, *, is_strict: bool) -> None:
        self._generator = generator
        self._template = template
        self._is_strict = is_strict

    async def read(self, body: bytes) -> Asked:
        """What a request asks for. Raises as :meth:`flowspec_edge.web.chat.Chat.read` does."""
        fields, warnings = parse_fields(body, ResponseFields, is_strict=self._is_strict, own=OWN)
        names = ("model", *Drawing.__struct_fields__)
        given = {name: getattr(fields, name) for name in names}
        given["max_tokens"] = fields.max_output_tokens
        given |= _chat_tools(fields)
        if fields.text is not None:
            given |= {"response_format": _chat_format(fields.text.format), "verbosity": fields.text.verbosity}
        messages = await asyncio.to_thread(_chat_messages, fields)
        with in_words_of(CALLED):
            chat = chat_fields(given, messages, CALLED)
            asked = await write_chat(self._generator, self._template, chat)
        asked = asked._replace(texts=renamed(asked.texts, CALLED))
        about = {
            "instructions": fields.instructions,
            "max_output_tokens": fields.max_output_tokens,
            "metadata": fields.metadata or {},
            "parallel_tool_calls": fields.parallel_tool_calls is not False,
            "text": {"format": (fields.text and fields.text.format) or {"type": "text"}},
            "tool_choice": msgspec.to_builtins(fields.tool_choice or "auto"),
            "tools": msgspec.to_builtins(fields.tools or []),
        }
        form = ResponseForm(self._generator, asked, about)
        return Asked(
            asked.texts,
            form,
            bool(fields.stream),
            warnings=[*warnings, *asked.warnings],
            framing=NAMED_EVENTS,
            failed=form.failed,
        )


def _chat_tools(fields: ResponseFields) -> Json:
    """The fields of tools as chats have them."""
    return {
        "tools": None if fields.tools is None else [_in_chats(tool) for tool in fields.tools],
        "tool_choice": _chat_choice(choice) if isinstance(choice := fields.tool_choice, FunctionChoice) else choice,
        "parallel_tool_calls": fields.parallel_tool_calls,
    }


def _chat_choice(choice: FunctionChoice) -> Json:
    if choice.type != "allowed_tools":
        return _in_chats(FunctionName(type=choice.type, name=choice.name))
    return {"type": choice.type, choice.type: {"mode": choice.mode, "tools": [*map(_in_chats, choice.tools or ())]}}


def _in_chats(given: FunctionTool | FunctionName) -> Json:
    if given.type != "function":
        return {"type": given.type}
    function = {name: value for name, value in msgspec.structs.asdict(given).items() if name != "type"}
    return {"type": "function", "function": function}


def _chat_format(given: Mapping[str, Any] | None) -> Json | None:
    """A format as chats have it: there a schema stands in an object of its own."""
    if given is None or given.get("type") != "json_schema":
        return None if given is None else dict(given)
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


def _chat_messages(fields: ResponseFields) -> list[ChatMessage]:
    messages = [] if fields.instructions is None else [ChatMessage(role="system", content=fields.instructions)]
    if isinstance(fields.input, str):
        return [*messages, ChatMessage(role="user", content=fields.input)]
    thought: str | None = None  # of the message or the call that follows
    for at, item in enumerate(fields.input):
        if item.type == "reasoning":
            thought = _text(f"input[{at}]", item.content or item.summary or [])
            continue
        messages.append(_message(f"input[{at}]", item, thought))
        thought = None
    return messages


def _message(name: str, item: Item, thought: str | None) -> ChatMessage:
    match item:
        case Item(type="message", role=str(role), content=str() | list() as content):
            if role not in ROLES:
                raise FieldError(f"{name}.role", f"is {role!r:.80}; it must be one of {', '.join(ROLES)}")
            text = _text(f"{name}.content", content)
            return ChatMessage(role=role, content=text, reasoning_content=thought)
        case Item(type="message"):
            missing = "role" if item.role is None else "content"
            raise FieldError(f"{name}.{missing}", "is missing", "missing_required_parameter")
        case Item(type="function_call", call_id=str(called), name=str(tool)):
            call = ToolCall(id=called, function=FunctionCall(name=tool, arguments=item.arguments or "{}"))
            return ChatMessage(role="assistant", tool_calls=[call], reasoning_content=thought)
        case Item(type="function_call_output", call_id=str(called), output=str() | list() as output):
            return ChatMessage(role="tool", tool_call_id=called, content=_text(f"{name}.output", output))
        case _:
            raise FieldError(
                f"{name}.type",
                f"is {item.type!r:.80}; it may be message, reasoning, function_call or function_call_output, and there "
                "is nothing kept here that an item could refer to",
                UNSUPPORTED,
            )


def _text(name: str, content: str | Sequence[Part]) -> str:
    if isinstance(content, str):
        return content
    for at, part in enumerate(content):
        if part.type not in TEXTS or part.text is None:
            raise FieldError(f"{name}[{at}].type", f"is {part.type!r:.80}; this model reads text alone", UNSUPPORTED)
    return "\n".join(part.text or "" for part in content)
