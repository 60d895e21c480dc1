"""Counts and tells tokens: ``/tokenize`` and ``/detokenize`` as vLLM has them, and Anthropic's ``count_tokens``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, cast

import msgspec
from aiohttp import web

from flowspec_edge.config import Text
from flowspec_edge.errors import FieldError
from flowspec_edge.manifest import Geometry
from flowspec_edge.web.asked import TextGenerator
from flowspec_edge.web.chat import ChatFields, ChatMessage, write_chat
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.fields import OwnFields, parse_fields, read_body
from flowspec_edge.web.messages import Messages
from flowspec_edge.web.text_fields import check_model
from flowspec_edge.web.tool_fields import Tool

OWN = OwnFields(neutral={"return_token_strs": (False,), "mm_processor_kwargs": ()})


class TokenCoder(Protocol):
    def encode(self, text: Text, *, is_framed: bool = True) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class TokenizeFields(msgspec.Struct, kw_only=True):
    """The body of ``POST /tokenize``: a prompt, or messages."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    model: str | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeFields(msgspec.Struct, kw_only=True):
    """The body of ``POST /detokenize``."""

    tokens: list[int]
    model: str | None = None


class Tokens:
    """``coder`` gives the model's tokenizer, whenever it is asked."""

    def __init__(
        self,
        generator: TextGenerator,
        template: ChatTemplate,
        coder: Callable[[], Awaitable[TokenCoder]],
        geometry: Geometry,
        *,
        is_strict: bool,
    ) -> None:
        self._generator = generator
        self._template = template
        self._messages = Messages(generator, template, is_strict=is_strict)
        self._coder = coder
        self._geometry = geometry
        self._is_strict = is_strict

    def add_to(self, router: web.UrlDispatcher) -> None:
        router.add_post("/tokenize", self.tokenize)
        router.add_post("/detokenize", self.detokenize)
        router.add_post("/v1/messages/count_tokens", self.count)

    async def tokenize(self, request: web.Request) -> web.Response:
        fields, _ = parse_fields(await read_body(request), TokenizeFields, is_strict=self._is_strict, own=OWN)
        if (fields.prompt is None) == (fields.messages is None):
            raise FieldError("prompt", "and messages: give one of them", "missing_required_parameter")
        chat = ChatFields(
            messages=fields.messages or [],
            model=fields.model,
            chat_template_kwargs=fields.chat_template_kwargs,
            tools=fields.tools,
        )
        check_model(chat, self._generator.model)
        text: Text | None = fields.prompt
        if text is None:
            text = await self._prompt_of(chat)
        tokens = await self._encode(text, is_framed=fields.add_special_tokens is not False)
        return web.json_response(
            {"count": len(tokens), "max_model_len": self._geometry.max_context, "tokens": tokens, "token_strs": None}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        fields, _ = parse_fields(await read_body(request), DetokenizeFields, is_strict=self._is_strict, own=OWN)
        check_model(ChatFields(messages=[], model=fields.model), self._generator.model)
        num_tokens = self._geometry.vocab_size
        for at, token in enumerate(fields.tokens):
            if not 0 <= token < num_tokens:
                raise FieldError(f"tokens[{at}]", f"is {token:.0f}; it must lie between 0 and {num_tokens - 1}")
        coder = await self._coder()
        return web.json_response({"prompt": await asyncio.to_thread(coder.decode, fields.tokens)})

    async def count(self, request: web.Request) -> web.Response:
        """Anthropic's path: how many tokens a message's dialogue has."""
        asked = await self._messages.read_to_count(await read_body(request))
        return web.json_response({"input_tokens": len(await self._encode(cast("Text", asked.prompt)))})

    async def _prompt_of(self, chat: ChatFields) -> Text:
        asked = await write_chat(self._generator, self._template, chat)
        return cast("Text", asked.texts[0].prompt)

    async def _encode(self, text: Text, *, is_framed: bool = True) -> list[int]:
        coder = await self._coder()
        return await asyncio.to_thread(coder.encode, text, is_framed=is_framed)
