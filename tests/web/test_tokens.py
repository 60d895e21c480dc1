"""Tokens as vLLM's paths tell them: what the model reads, and what it writes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.web.served import HELLO, TOKENIZER, Json, serving_dialects

PLAIN = "User: hello\n\nAssistant:"


@contextlib.asynccontextmanager
async def asking(**options: Any) -> AsyncIterator[aiohttp.ClientSession]:
    async with (
        serving_dialects(family=None, **options) as (_, url),
        aiohttp.ClientSession(url) as session,
        asyncio.timeout(10),
    ):
        yield session


async def answer(session: aiohttp.ClientSession, path: str, **body: Any) -> Json:
    async with session.post(path, json=body) as response:
        found: Json = await response.json()
        assert response.status == 200, found
        return found


async def test_a_prompt_and_a_chat_become_the_tokens_that_the_model_reads() -> None:
    async with asking() as session:
        prompt = await answer(session, "/tokenize", model="demo", prompt="def main(argv):")
        chat = await answer(session, "/tokenize", messages=HELLO)
    wanted = TOKENIZER.encode("def main(argv):")
    assert prompt == {"count": len(wanted), "max_model_len": 1024, "tokens": wanted, "token_strs": None}
    assert chat["tokens"] == TOKENIZER.encode(PLAIN)


async def test_tokens_become_their_text() -> None:
    async with asking() as session:
        found = await answer(session, "/detokenize", tokens=TOKENIZER.encode("def größe():\n"))
        assert found == {"prompt": "def größe():\n"}
        long = await answer(session, "/detokenize", tokens=[1234] * 20_000)
    assert len(long["prompt"]) >= 20_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ("/tokenize", {"prompt": "x", "return_token_strs": True}, "return_token_strs"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [10**30]}, "tokens[0]"),
        ("/detokenize", {"tokens": ["1"]}, "tokens[0]"),
    ],
)
async def test_what_is_wrong_is_named(path: str, body: Json, param: str) -> None:
    async with asking() as session, session.post(path, json=body) as response:
        assert response.status == (404 if param == "model" else 400)
        assert (await response.json())["error"]["param"] == param
