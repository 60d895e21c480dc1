"""Chats, in whichever dialect they come: the next message of a dialogue, written by the model's own template.

Without ``max_tokens`` or ``max_completion_tokens`` a message may fill the model's context, and without ``temperature``
it is drawn at 1, as OpenAI's are. ``top_k``, ``schedule``, and ``chat_template_kwargs``, variables of the template, are
extra fields.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from flowspec_edge.config import MAX_NEW_TOKENS, MAX_TOP_LOGPROBS, GenerateOptions, TextPart
from flowspec_edge.errors import FieldError
from flowspec_edge.web.asked import AskedText, TextGenerator
from flowspec_edge.web.call_form import CallForm
from flowspec_edge.web.call_grammar import CallableTool, special_tokens_of, write_call_grammar
from flowspec_edge.web.call_ids import with_ids
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.fields import MAX_FIELD_BYTES, UNSUPPORTED, Json, Whole, whole
from flowspec_edge.web.grammar_fields import grammar_of
from flowspec_edge.web.message_split import MessageSplit
from flowspec_edge.web.plain_calls import as_plain_messages
from flowspec_edge.web.reasoning import BEGIN, END
from flowspec_edge.web.text_fields import TextFields, check_model, num_choices, options_of, options_of_choice
from flowspec_edge.web.tool_fields import OfferedTools, Tool, ToolChoice, offered_tools

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
    tools: list[Tool] | None = None
    tool_choice: str | ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class ChatTexts(NamedTuple):
    """``is_reasoning`` where the prompt ends within reasoning, as templates of some models write it. ``calls`` is how
    calls of tools are written, where there may be some. A message ``is_either`` calls or what it is asked to be, where
    it is asked to be anything.
    """

    texts: list[AskedText]
    is_reasoning: bool = False
    warnings: Sequence[str] = ()
    calls: CallForm | None = None
    is_either: bool = False

    def split(self) -> MessageSplit:
        """For one of the texts."""
        return MessageSplit(has_begun=self.is_reasoning, calls=self.calls, is_either=self.is_either)


async def write_chat(
    generator: TextGenerator, template: ChatTemplate, fields: ChatFields, default: GenerateOptions = DEFAULT
) -> ChatTexts:
    """The texts that a chat asks for, in whichever dialect it came. The prompt is written on a thread.

    Raises:
        RequestError: it asks for what is not there, or the template refuses its messages.
        BundleError: the template cannot be read.
    """
    check_model(fields, generator.model)
    if not fields.messages:
        raise FieldError("messages", "is empty; give the dialogue so far")
    num, warnings = num_choices(fields), []
    named, grammar = grammar_of(fields)
    offered = offered_tools(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    options = replace(options_of(fields, default), num_logprobs=_num_logprobs(fields))
    if template.is_plain:
        options = replace(options, stop=(*options.stop, PLAIN_STOP))
        warnings = [PLAIN_NOTICE]
    prompt = await _write_prompt(template, fields, [] if offered is None else offered.told)
    is_reasoning = bool(prompt) and prompt[-1].text.rstrip().endswith(BEGIN)
    if is_reasoning and (offered.is_forced if offered is not None else grammar is not None):
        prompt, is_reasoning = [*prompt, TextPart(f"\n{END}\n\n")], False  # what is asked for has no room for thoughts
    calls, lines, is_either = None, list[str](), False
    if offered is not None:
        if offered.is_forced:
            options = replace(options, grammar=None)  # there is no content
        calls, is_either = await template.call_form(), options.grammar is not None
        lines = [*(f"tools[{at}].function.parameters" for at in offered.callable), *([named] if is_either else [])]
        try:
            options = _with_calls(options, calls, offered, template.special, is_reasoning=is_reasoning)
        except FieldError as cause:
            raise cause.named(named if cause.name == "grammar" else cause.name) from None
        named = "tools"
    texts = [AskedText(prompt, options_of_choice(options, at), named, lines) for at in range(num)]
    return ChatTexts(texts, is_reasoning, warnings, calls, is_either)


async def _write_prompt(template: ChatTemplate, fields: ChatFields, tools: list[Json]) -> list[TextPart]:
    messages = await asyncio.to_thread(_messages, fields.messages)
    has_calls = tools or any(message.tool_calls or message.role == "tool" for message in fields.messages)
    if has_calls:
        form = await template.call_form()
        messages = with_ids(messages, form)
        if form.is_plain:
            has_system = await template.has_system()
            messages, tools = await asyncio.to_thread(as_plain_messages, messages, tools, has_system=has_system), []
    return await template.render(messages, tools=tools or None, variables=fields.chat_template_kwargs)


def _with_calls(
    options: GenerateOptions, form: CallForm, offered: OfferedTools, special: Mapping[str, int], *, is_reasoning: bool
) -> GenerateOptions:
    """The options of a text that may call tools, or else be what the options' grammar says.

    Raises:
        FieldError: schemas are too large together, or the grammar cannot be told from calls.
    """
    grammar = write_call_grammar(
        form,
        [CallableTool(offered.name(place), offered.schema(place)) for place in offered.callable],
        special,
        is_forced=offered.is_forced,
        is_parallel=offered.is_parallel,
        is_reasoning=is_reasoning,
        content=options.grammar,
    )
    try:
        return replace(options, grammar=grammar, shown_token_ids=special_tokens_of(form, special))
    except FieldError as cause:
        raise cause.named("tools" if cause.name == "grammar" else cause.name) from None


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
