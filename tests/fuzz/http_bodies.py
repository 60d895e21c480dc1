"""Broken bodies of HTTP requests, for the API as it is and for one that listens."""

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from aiohttp import web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.streams import StreamReader
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions, Piece, Prompt, TextPart, UnfinishedText
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import is_plain
from flowspec_edge.web.app import MAX_REQUEST_BYTES, build_app
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.error_forms import refusing_in_its_dialect
from flowspec_edge.web.model_card import ModelCard
from tests.fuzz.inputs import NASTY_NUMBERS, changed, changed_value, nested
from tests.narrowing import present

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "array"}}}
DRAWING: dict[str, Any] = {
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"5": 1.5, "50256": -100},
    "stop": ["x", "y"],
    "stop_token_ids": [3, 4],
    "ignore_eos": False,
    "min_tokens": 2,
}
BODY: dict[str, Any] = {
    **DRAWING,
    "model": "demo",
    "prompt": "def main(",
    "max_tokens": 5,
    "parse_special": True,
    "seed": 7,
    "logprobs": 2,
    "best_of": 1,
    "schedule": "flowspec",
    "stream": False,
    "n": 1,
    "flowspec": {"resumable": True, "resume": {"bundle": "b1", "prompt_token_ids": [1, 2], "token_ids": [3]}},
}
CHAT = {
    **DRAWING,
    **{name: BODY[name] for name in ("model", "max_tokens", "seed", "stream")},
    "min_tokens": 0,
    "logprobs": True,
    "top_logprobs": 2,
    "messages": [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "<s>"}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": '{"a": [1]}'}}]},
        {"role": "tool", "content": "y", "tool_call_id": "c"},
    ],
    "n": 2,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "stream_options": {"include_usage": True},
    "chat_template_kwargs": {"a": {"b": [1]}},
}
CALL = {"name": "f", "arguments": {"a": [1]}}
MESSAGES = {
    "model": "demo",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "x"}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "<s>"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "x"},
                {"type": "tool_use", "id": "c", "name": "f", "input": {}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": "y"}]},
    ],
    "tools": [{"name": "f", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "stop_sequences": ["x"],
    "temperature": 0.5,
    "top_k": 3,
    "thinking": {"type": "adaptive"},
    "stream": False,
}
RESPONSES = {
    "model": "demo",
    "instructions": "x",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "<s>"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"a": [1]}'},
        {"type": "function_call_output", "call_id": "c", "output": "y"},
    ],
    "max_output_tokens": 5,
    "text": {"format": {"type": "text"}},
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
    "tool_choice": {"type": "function", "name": "f"},
    "metadata": {"a": "b"},
    "stream": False,
}
OPTIONS = {
    "num_predict": 5,
    "temperature": 0.5,
    "top_k": 3,
    "seed": 7,
    "stop": ["x"],
    "num_ctx": 99,
    "repeat_penalty": 1,
}
OLLAMA_CHAT = {
    "model": "demo:latest",
    "messages": [
        {"role": "user", "content": "<s>"},
        {"role": "assistant", "content": "", "thinking": "x", "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "y", "tool_name": "f"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}],
    "options": OPTIONS,
    "format": "",
    "think": True,
    "keep_alive": "5m",
    "stream": False,
}
OLLAMA_GENERATE = {"model": "demo", "prompt": "<s>", "system": "x", "raw": False, "options": OPTIONS, "stream": False}
BODIES = {
    "/v1/completions": BODY,
    "/v1/chat/completions": CHAT,
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": {name: MESSAGES[name] for name in ("model", "system", "messages")},
    "/v1/responses": RESPONSES,
    "/api/chat": OLLAMA_CHAT,
    "/api/generate": OLLAMA_GENERATE,
    "/api/show": {"model": "demo", "verbose": True},
    "/tokenize": {"prompt": "x", "add_special_tokens": True, "chat_template_kwargs": {"a": 1}},
    "/detokenize": {"model": "demo", "tokens": [1, 2]},
}
CONTENT_TYPES = ("application/json", "application/json; charset=nonsense", "text/plain; charset=utf-7")


REQUESTS_PER_MOCK = 200
"""Mocks of a connection take a millisecond to make, and remember all that is said to them."""


class Echo:
    """Answers with what was asked, in the place of a ring."""

    model, bundle = "demo", "b1"

    async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        if isinstance(prompt, UnfinishedText):
            prompt = "x" * len(prompt.tokens)
        parts = [prompt] if isinstance(prompt, str) else prompt
        text = "".join(part.text if isinstance(part, TextPart) else str(part) for part in parts)
        text.encode()
        for stop in options.stop:
            stop.encode()
        yield Piece(text=text[:10], token_ids=[1])
        statistics = {"prompt_tokens": 1, "completion_tokens": 1}
        yield Piece(text="", token_ids=[], finish_reason="stop", statistics=statistics)


def body(rng: random.Random, like: dict[str, Any]) -> bytes:
    """A broken body in the place of that one."""
    match rng.randrange(6):
        case 0:
            return changed(rng, json.dumps(like).encode())
        case 1:
            return nested(rng, rng.choice((b"[", b'{"model":', b'{"stop":[', b'{"messages":[')), b"]")
        case 2:
            half = json.dumps({**like, rng.choice(list(like)): "\ud800"})
            return half.encode()
        case 3:
            return json.dumps({**like, rng.choice(list(like)): rng.choice(NASTY_NUMBERS)}).encode()
        case _:
            return json.dumps(changed_value(rng, like, has_bytes=False)).encode(errors="surrogatepass")


class Api:
    """The API without a socket: one request after another, on a loop of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        tokenizer = Tokenizer(DEMO_BUNDLE / "tokenizer.json")

        async def coder() -> Tokenizer:
            return tokenizer

        card = replace(ModelCard.of_bundle(Bundle.load(DEMO_BUNDLE)), name=Echo.model)
        app = build_app(Echo(), chat=ChatTemplate(None, {}, {"<s>": 1}), card=card, coder=coder)
        self._handlers = {
            route.resource.canonical: route.handler
            for route in app.router.routes()
            if route.resource and route.method == "POST"
        }
        self._protocol = BaseProtocol(self._loop)
        self._num_asked = 0

    def status(self, path: str, data: bytes, content_type: str) -> tuple[int, str]:
        """How a request to that path with this body is answered, and with which text."""
        return self._loop.run_until_complete(self._ask(path, data, content_type))

    async def _ask(self, path: str, data: bytes, content_type: str) -> tuple[int, str]:
        payload = StreamReader(self._protocol, 2**20, loop=self._loop)
        payload.feed_data(data)
        payload.feed_eof()
        if self._num_asked % REQUESTS_PER_MOCK == 0:
            self._like = make_mocked_request("POST", "/v1/completions")
        self._num_asked += 1
        like = self._like
        headers = CIMultiDictProxy(CIMultiDict({"Content-Type": content_type}))
        request = web.Request(
            like._message._replace(headers=headers, path=path, url=URL(path)),
            payload,
            present(like._protocol),
            present(like._payload_writer),
            present(asyncio.current_task()),
            self._loop,
            client_max_size=MAX_REQUEST_BYTES,
        )
        answer = await refusing_in_its_dialect(request, self._handlers[path])
        assert isinstance(answer, web.StreamResponse)
        return answer.status, getattr(answer, "text", None) or ""


@functools.cache
def the_api() -> Api:
    return Api()


def try_body(rng: random.Random) -> str:
    """A request with a broken body is answered, and what is wrong is shown."""
    path, like = rng.choice(list(BODIES.items()))
    status, text = the_api().status(path, body(rng, like), rng.choice(CONTENT_TYPES))
    if status == 200:
        return "accepted"
    assert status in (400, 404, 409, 413), f"{path}: status {status}"
    error = json.loads(text)["error"]
    assert is_plain(error["message"] if isinstance(error, dict) else error), f"a terminal would obey {text!r}"
    return "refused"
