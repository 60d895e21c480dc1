"""Log-probabilities as OpenAI's own client reads them, and texts that are chosen by them."""

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from flowspec_edge.client import Client
from flowspec_edge.config import GenerateOptions, Logprob, Logprobs, Piece, Prompt, TokenLogprobs
from flowspec_edge.net.server import serve_app
from flowspec_edge.web.app import build_app
from flowspec_edge.web.chat_template import ChatTemplate

openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")

TEXTS = {1: b"a", 2: "☃".encode()[:2], 3: "☃".encode()[2:], 4: b"<|end|>"}
SCRIPT = [("a", 1, 0, -0.1), ("", 2, 1, -0.2), ("☃", 3, 1, -0.3), ("", 4, 2, float("-inf"))]
"""Pieces: text, token, characters before it, log-probability."""


class Writer:
    """Writes the script; with each seed its tokens are less likely by one."""

    model, bundle = "demo", "d1" * 32

    def __init__(self) -> None:
        self.asked: list[GenerateOptions] = []

    async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        self.asked.append(options)
        for text, token, offset, logprob in SCRIPT:
            likeliest = (Logprob(1, -0.1), Logprob(2, -0.2))[: options.num_logprobs]
            drawn = TokenLogprobs(Logprob(token, logprob - options.seed), likeliest)
            told = Logprobs(tokens=(drawn,), offsets=[offset], texts=TEXTS)
            yield Piece(text=text, token_ids=[token], logprobs=None if options.num_logprobs is None else told)
        statistics = {"prompt_tokens": 3, "completion_tokens": 4}
        yield Piece(text="", token_ids=[], finish_reason="stop", statistics=statistics)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[tuple[Writer, Any]]:
    writer = Writer()
    served = await serve_app(build_app(writer, chat=ChatTemplate(None, {}, {})), cancels_on_disconnect=True)
    url = f"http://127.0.0.1:{served.port}/v1"
    try:
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0, timeout=10) as client:
            yield writer, client
    finally:
        await served.close()


async def test_those_that_our_own_client_is_told() -> None:
    async with serving() as (_, client), Client(str(client.base_url).removesuffix("/v1/")) as own:
        texts = [
            await own.complete("x", num_logprobs=2, seed=0),
            await own.reply("x", logprobs=True, top_logprobs=2, seed=0),
        ]
    for text in texts:
        assert [(one.text, one.logprob) for one in text.logprobs] == [
            (TEXTS[at], max(p, -9999)) for _, at, _, p in SCRIPT
        ]
        assert text.logprobs[0].top == {TEXTS[1]: -0.1, TEXTS[2]: -0.2}


CHAT = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "seed": 0}


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_those_of_a_chat(is_streamed: bool) -> None:
    async with serving() as (_, client):
        asked = {**CHAT, "logprobs": True, "top_logprobs": 2}
        answer = await client.chat.completions.create(**asked, stream=is_streamed)
        if is_streamed:
            choices = [chunk.choices[0] async for chunk in answer]
            told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        else:
            told = answer.choices[0].logprobs.content
    assert [(one.token, one.logprob) for one in told] == [
        ("a", -0.1),
        (r"\xe2\x98", -0.2),
        (r"\x83", -0.3),
        ("<|end|>", -9999.0),
    ]
    assert b"".join(bytes(one.bytes) for one in told[:3]).decode() == "a☃"
    assert [[(likely.token, likely.logprob) for likely in one.top_logprobs] for one in told] == [
        [("a", -0.1), (r"\xe2\x98", -0.2)]
    ] * 4


async def test_a_chat_that_asks_for_none_gets_none() -> None:
    async with serving() as (writer, client):
        answer = await client.chat.completions.create(**CHAT, logprobs=False, top_logprobs=0)
        assert answer.choices[0].logprobs is None
        answer = await client.chat.completions.create(**CHAT, logprobs=True)
        assert answer.choices[0].logprobs.content[0].top_logprobs == []
    assert [options.num_logprobs for options in writer.asked] == [None, 0]


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_those_of_a_completion(is_streamed: bool) -> None:
    async with serving() as (_, client):
        answer = await client.completions.create(model="demo", prompt="x", seed=0, logprobs=1, stream=is_streamed)
        parts = [chunk.choices[0].logprobs async for chunk in answer] if is_streamed else [answer.choices[0].logprobs]
    told = {
        name: [value for part in parts if part is not None for value in getattr(part, name)]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
    }
    names = ["a", r"bytes:\xe2\x98", r"bytes:\x83", "<|end|>"]
    assert told == {
        "tokens": names,
        "token_logprobs": [-0.1, -0.2, -0.3, -9999.0],
        "text_offset": [0, 1, 1, 2],
        "top_logprobs": [
            {"a": -0.1},
            *({"a": -0.1, name: logprob} for name, logprob in zip(names[1:], (-0.2, -0.3, -9999.0), strict=True)),
        ],
    }, "the token that was drawn is told as well"


async def test_the_likeliest_of_several_texts_are_given() -> None:
    async with serving() as (writer, client):
        answer = await client.completions.create(model="demo", prompt=["x", "y"], seed=2**64 - 2, n=2, best_of=4)
        told = await client.completions.create(model="demo", prompt="x", seed=1, best_of=2, logprobs=0)
    assert [options.seed for options in writer.asked[:4]] == [2**64 - 2, 2**64 - 1, 0, 1]
    assert [figures["seed"] for figures in answer.flowspec["choices"]] == [0, 1] * 2, "larger seeds are less likely"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in answer.choices)
    assert answer.usage.completion_tokens == 8 * 4 and answer.usage.prompt_tokens == 6
    assert told.choices[0].logprobs.token_logprobs[0] == -1.1
