"""Ollama's chat and generate: the next message of a dialogue, and the answer to a single prompt.

As with Ollama answers are streamed unless ``stream`` is false, drawn at temperature 0.8 from the 40 likeliest tokens
and from 0.9 of the probability, and may fill the context. ``flowspec`` in the last object has the figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from flowspec_edge.config import MAX_NEW_TOKENS, GenerateOptions
from flowspec_edge.errors import FieldError
from flowspec_edge.web.asked import Asked, AskedText, TextGenerator
from flowspec_edge.web.chat import ChatFields, ChatMessage, ChatTexts, FunctionCall, ToolCall, write_chat
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.error_forms import ollama_error
from flowspec_edge.web.fields import UNSUPPORTED, Whole, parse_fields
from flowspec_edge.web.framing import LINES, Json
from flowspec_edge.web.ollama_form import OllamaForm, chat_part, generate_part
from flowspec_edge.web.text_fields import check_model, options_of
from flowspec_edge.web.tool_fields import Tool
from flowspec_edge.web.translation import chat_fields, in_words_of, own_fields, renamed

DEFAULT = GenerateOptions(max_new_tokens=MAX_NEW_TOKENS, temperature=0.8, top_k=40, top_p=0.9)
LATEST = ":latest"
"""The tag of a model whose name has none."""
OWN = own_fields(
    idle=frozenset({"keep_alive", "truncate", "shift", "debug_render_only"})
    | {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram", "f16_kv"}
    | {"use_mmap", "use_mlock", "vocab_only", "logits_all", "embedding_only", "mirostat_eta", "mirostat_tau"}
    | {"type", "id"},
    neutral={
        **dict.fromkeys(("template", "suffix"), ("",)),
        **dict.fromkeys(("images", "context"), ([],)),
        **dict.fromkeys(("width", "height", "steps"), ()),
    },
)
"""Ollama's own fields: those that change no text here, and those that would."""
IN_OPTIONS = {
    "num_predict": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "typical_p": "typical_p",
    "mirostat": "mirostat",
}
"""How the core calls what Ollama has in ``options``."""
CALLED = {core: f"options.{name}" for name, core in IN_OPTIONS.items()} | {"response_format": "format"}
ROLES = ("system", "user", "assistant", "tool")
NO_LIMIT = {-1, -2}
"""Values of ``num_predict``: no end, and as far as the context goes, which is the end in either case."""
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class Options(msgspec.Struct, kw_only=True):
    num_predict: Whole | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: Whole | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    typical_p: float | None = None
    mirostat: Whole | None = None
    repeat_last_n: Whole | None = None


class CalledFunction(msgspec.Struct, kw_only=True):
    name: str
    arguments: dict[str, Any] = {}


class Call(msgspec.Struct, kw_only=True):
    function: CalledFunction
    id: str | None = None


class OllamaMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None


class OllamaFields(msgspec.Struct, kw_only=True):
    """What both requests have."""

    model: str | None = None
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    stream: bool | None = None


class OllamaChatFields(OllamaFields, kw_only=True):
    """The body of ``POST /api/chat``."""

    messages: list[OllamaMessage] | None = None
    tools: list[Tool] | None = None


class OllamaGenerateFields(OllamaFields, kw_only=True):
    """The body of ``POST /api/generate``."""

    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class OllamaChat:
    """The dialect of ``POST /api/chat``."""

    def __init__(self, generator: TextGenerator, template: ChatTemplate, *, is_strict: bool) -> None:
        self._generator = generator
        self._template = template
        self._is_strict = is_strict

    async def read(self, body: bytes) -> Asked:
        """What a request asks for. Raises as :meth:`flowspec_edge.web.chat.Chat.read` does."""
        fields, warnings = parse_fields(body, OllamaChatFields, is_strict=self._is_strict, own=OWN)
        messages = await asyncio.to_thread(_chat_messages, fields)
        with in_words_of(CALLED):
            chat = _core_fields(fields, messages)
            chat.tools = fields.tools
            if messages:
                asked = await write_chat(self._generator, self._template, chat, DEFAULT)
            else:
                asked = _nothing(chat, self._generator)
        return _asked(asked, OllamaForm(self._generator, fields.model, asked, chat_part), fields, warnings)


class OllamaGenerate:
    """The dialect of ``POST /api/generate``."""

    def __init__(self, generator: TextGenerator, template: ChatTemplate, *, is_strict: bool) -> None:
        self._generator = generator
        self._template = template
        self._is_strict = is_strict

    async def read(self, body: bytes) -> Asked:
        """What a request asks for. Raises as :meth:`flowspec_edge.web.chat.Chat.read` does."""
        fields, warnings = parse_fields(body, OllamaGenerateFields, is_strict=self._is_strict, own=OWN)
        prompt = fields.prompt or ""
        messages = [ChatMessage(role="system", content=fields.system)] if fields.system else []
        with in_words_of(CALLED):
            chat = _core_fields(fields, [*messages, ChatMessage(role="user", content=prompt)])
            if not prompt:
                asked = _nothing(chat, self._generator)
            elif fields.raw:
                asked = self._raw(prompt, fields, chat)
            else:
                asked = await write_chat(self._generator, self._template, chat, DEFAULT)
        return _asked(asked, OllamaForm(self._generator, fields.model, asked, generate_part), fields, warnings)

    def _raw(self, prompt: str, fields: OllamaGenerateFields, chat: ChatFields) -> ChatTexts:
        """The prompt as it is, which has its special tokens itself."""
        for name in ("system", "think", "format"):
            if getattr(fields, name):
                raise FieldError(name, "is set for a raw prompt, which is gone on with as it is", UNSUPPORTED)
        check_model(chat, self._generator.model)
        return ChatTexts([AskedText(prompt, options_of(chat, DEFAULT))])


def _nothing(chat: ChatFields, generator: TextGenerator) -> ChatTexts:
    """What clients ask for to have a model loaded: an answer of no text. It is always loaded."""
    check_model(chat, generator.model)
    return ChatTexts([])


def _core_fields(fields: OllamaFields, messages: list[ChatMessage]) -> ChatFields:
    options = fields.options or Options()
    given = {core: getattr(options, name) for name, core in IN_OPTIONS.items()}
    if given["max_tokens"] in NO_LIMIT:
        given["max_tokens"] = None
    if options.repeat_last_n not in (None, -1) and any(given[name] is not None for name in PENALTIES):
        raise FieldError(
            "options.repeat_last_n", f"is {options.repeat_last_n}; penalties are of the whole text (-1)", UNSUPPORTED
        )
    given["model"] = None if fields.model is None else fields.model.removesuffix(LATEST)
    given["response_format"] = _response_format(fields.format)
    if fields.think is not None:
        if isinstance(fields.think, str):
            raise FieldError("think", f"is {fields.think!r:.80}; it may be true or false", UNSUPPORTED)
        given["chat_template_kwargs"] = {"enable_thinking": fields.think}
    return chat_fields(given, messages, CALLED)


def _response_format(given: str | Mapping[str, Any] | None) -> Json | None:
    """A format as the core has it."""
    match given:
        case None | "":
            return None
        case "json":
            return {"type": "json_object"}
        case str():
            raise FieldError("format", f"is {given!r:.80}; it may be 'json' or a schema")
        case schema:
            return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _chat_messages(fields: OllamaChatFields) -> list[ChatMessage]:
    return [_message(f"messages[{at}]", message) for at, message in enumerate(fields.messages or ())]


def _message(name: str, message: OllamaMessage) -> ChatMessage:
    if message.role not in ROLES:
        raise FieldError(f"{name}.role", f"is {message.role!r:.80}; it must be one of {', '.join(ROLES)}")
    if message.images:
        raise FieldError(f"{name}.images", "are given, and this model reads text alone", UNSUPPORTED)
    calls = [
        ToolCall(
            id=call.id,
            function=FunctionCall(
                name=call.function.name, arguments=msgspec.json.encode(call.function.arguments).decode()
            ),
        )
        for call in message.tool_calls or ()
    ]
    return ChatMessage(
        role=message.role,
        content=message.content or "",
        reasoning_content=message.thinking,
        tool_calls=calls or None,
        tool_call_id=message.tool_call_id,
        name=message.tool_name,
    )


def _asked(asked: ChatTexts, form: OllamaForm, fields: OllamaFields, warnings: Sequence[str]) -> Asked:
    return Asked(
        renamed(asked.texts, CALLED),
        form,
        fields.stream is not False,
        warnings=[*warnings, *asked.warnings],
        framing=replace(LINES, comment=lambda text: LINES.event(form.sign_of_life(text))),
        failed=ollama_error,
    )
