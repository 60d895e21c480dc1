"""Ollama's own client chats, generates, and asks what is there."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from flowspec_edge.config import MAX_NEW_TOKENS, Piece, TextPart
from flowspec_edge.errors import StageFailedError
from flowspec_edge.web.app import WARNING
from tests.web.served import CARD, HELLO, REASONED, Json, prompt_of, serving_dialects
from tests.web.test_completions import PIECES, STATISTICS, ScriptedGenerator

ollama = pytest.importorskip("ollama", reason="Ollama's client: pip install '.[dev]'")

TIMES = {**STATISTICS, "first_token_s": 0.25, "decode_s": 1.5}
TIMED = [*PIECES[:2], Piece(text="", token_ids=[], finish_reason="length", statistics=TIMES)]


@contextlib.asynccontextmanager
async def serving(*args: Any, **options: Any) -> AsyncIterator[tuple[ScriptedGenerator, Any]]:
    """The scripted generator, and Ollama's client of it."""
    async with serving_dialects(*args, **options) as (generator, url), asyncio.timeout(10):
        yield generator, ollama.AsyncClient(host=url)


@contextlib.asynccontextmanager
async def asking(*args: Any, **options: Any) -> AsyncIterator[tuple[ScriptedGenerator, aiohttp.ClientSession]]:
    async with (
        serving_dialects(*args, **options) as (generator, url),
        aiohttp.ClientSession(url) as session,
        asyncio.timeout(10),
    ):
        yield generator, session


async def test_a_whole_chat() -> None:
    options = {"num_predict": 16, "temperature": 0.5, "top_k": 3, "top_p": 0.7, "seed": 4, "stop": ["q"], "num_ctx": 99}
    async with serving(TIMED) as (generator, client):
        answer = await client.chat(model="demo:latest", messages=HELLO, options=options, keep_alive=-1, think=False)
    assert (answer.model, answer.message.role, answer.message.content) == ("demo:latest", "assistant", "ab\n")
    assert (answer.done, answer.done_reason) == (True, "length")
    assert (answer.prompt_eval_count, answer.eval_count) == (3, 2)
    assert (answer.total_duration, answer.load_duration) == (1_750_000_000, 0)
    assert (answer.prompt_eval_duration, answer.eval_duration) == (250_000_000, 1_500_000_000)
    ((_, asked),) = generator.asked
    assert (asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p) == (16, 0.5, 3, 0.7)
    assert (asked.seed, asked.stop) == (4, ("q",))
    assert prompt_of(generator).endswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


async def test_penalties_are_those_of_the_core() -> None:
    options = {"repeat_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "min_p": 0.1}
    async with serving() as (generator, client):
        await client.chat(model="demo", messages=HELLO, options=options)
    ((_, asked),) = generator.asked
    assert (asked.repetition_penalty, asked.presence_penalty, asked.frequency_penalty) == (1.1, 0.2, 0.3)
    assert asked.min_p == 0.1


@pytest.mark.parametrize("options", [None, {"num_predict": -1}, {"num_predict": -2}])
async def test_what_is_done_where_nothing_is_said(options: Json | None) -> None:
    async with serving() as (generator, client):
        await client.chat(model="demo", messages=HELLO, options=options)
    ((_, asked),) = generator.asked
    assert (asked.max_new_tokens, asked.temperature, asked.top_k, asked.top_p) == (MAX_NEW_TOKENS, 0.8, 40, 0.9)


async def test_a_stream_of_lines() -> None:
    async with serving(TIMED) as (_, client):
        parts = [part async for part in await client.chat(model="demo", messages=HELLO, stream=True)]
    assert [(part.message.content, part.done) for part in parts] == [("a", False), ("b\n", False), ("", True)]
    assert (parts[-1].done_reason, parts[-1].eval_count) == ("length", 2)


async def test_answers_are_streamed_unless_that_is_not_wanted() -> None:
    async with asking() as (_, session):
        async with session.post("/api/chat", json={"messages": HELLO}) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson"
            assert len((await response.text()).splitlines()) == 3
        async with session.post("/api/chat", json={"messages": HELLO, "stream": False}) as response:
            assert response.headers["Content-Type"].startswith("application/json")


async def test_thinking_comes_apart_streamed_and_whole() -> None:
    async with serving(REASONED) as (_, client):
        whole = await client.chat(model="demo", messages=HELLO, think=True)
        parts = [part async for part in await client.generate(model="demo", prompt="x", stream=True)]
    assert (whole.message.thinking, whole.message.content) == ("hm", "Yes.")
    assert "".join(part.thinking or "" for part in parts) == "hm"
    assert "".join(part.response for part in parts) == "Yes."


async def test_messages_of_every_kind_reach_the_template() -> None:
    call = {"function": {"name": "weather", "arguments": {"town": "Köln"}}}
    messages: list[Json] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sun?"},
        {"role": "assistant", "content": "", "thinking": "A tool.", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": "sunny"},
    ]
    async with serving() as (generator, client):
        await client.chat(model="demo", messages=messages)
    assert prompt_of(generator) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nA tool.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


async def test_a_prompt_is_written_as_a_chat_or_left_as_it_is() -> None:
    async with serving(TIMED) as (generator, client):
        answer = await client.generate(model="demo", system="Be brief.", prompt="<|im_end|>")
        await client.generate(model="demo", prompt="<|im_end|>", raw=True)
    assert (answer.response, answer.done_reason, answer.eval_count) == ("ab\n", "length", 2)
    assert prompt_of(generator) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    (chat, _), (raw, _) = generator.asked
    assert isinstance(chat, list) and TextPart("<|im_end|>") not in chat
    assert raw == "<|im_end|>", "a raw prompt has its special tokens itself"


async def test_a_model_is_always_loaded() -> None:
    async with serving() as (generator, client):
        for answer in (await client.chat(model="demo"), await client.generate(model="demo", prompt="", keep_alive=0)):
            assert (answer.done, answer.done_reason) == (True, "load")
        parts = [part async for part in await client.chat(model="demo", stream=True)]
        assert [(part.message.content, part.done_reason) for part in parts] == [("", "load")]
        with pytest.raises(ollama.ResponseError, match="not served here"):
            await client.generate(model="llama3")
    assert not generator.asked


BAD: list[tuple[Json, str]] = [
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role is 'king'"),
    ({"messages": [{"role": "user", "content": "x", "images": ["AA=="]}]}, "messages[0].images"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"options": {"num_predict": 0}}, "options.num_predict is 0"),
    ({"options": {"temperature": -1}}, "options.temperature is -1"),
    ({"options": {"temperature": "hot"}}, "options.temperature is 'hot'"),
    ({"options": {"repeat_penalty": -1}}, "options.repeat_penalty is -1"),
    ({"options": {"repeat_penalty": 1, "repeat_last_n": 64}}, "options.repeat_last_n is 64"),
    ({"options": {"mirostat": 1}}, "options.mirostat is 1"),
    ({"format": "xml"}, "format is 'xml'"),
    ({"think": "high"}, "think is 'high'"),
    ({"logprobs": True}, "logprobs is"),
    ({"temperature": 0.5}, "temperature is 0.5"),
    ({"n": 2}, "n is 2"),
]


@pytest.mark.parametrize(("given", "text"), BAD, ids=[f"{text} {given}" for given, text in BAD])
async def test_what_cannot_be_done_is_refused_in_ollamas_words(given: Json, text: str) -> None:
    async with asking() as (generator, session):
        async with session.post("/api/chat", json={"messages": HELLO} | given) as response:
            assert response.status == 400
            error = await response.json()
    assert list(error) == ["error"] and error["error"].startswith(text)
    assert not generator.asked


@pytest.mark.parametrize(
    "given",
    [
        {"raw": True, "system": "x"},
        {"raw": True, "format": "json"},
        {"template": "x"},
        {"suffix": "x"},
        {"context": [1]},
    ],
)
async def test_what_generate_cannot_do(given: Json) -> None:
    async with serving() as (_, client):
        with pytest.raises(ollama.ResponseError) as error:
            await client.generate(model="demo", prompt="x", **given)
    assert error.value.status_code == 400 and error.value.error.startswith([*given][-1])


@pytest.mark.parametrize(("form", "schema"), [("json", {"type": "object"}), ({"type": "null"}, {"type": "null"})])
async def test_a_format_is_the_texts_grammar(form: Json | str, schema: Json) -> None:
    async with asking() as (generator, session):
        async with session.post("/api/chat", json={"messages": HELLO, "format": form}) as response:
            assert response.status == 200
        async with session.post("/api/generate", json={"prompt": "x", "format": form}) as response:
            assert response.status == 200
    for _, options in generator.asked:
        assert options.grammar is not None and options.grammar.kind == "json"
        assert json.loads(options.grammar.text) == schema


async def test_what_changes_nothing_is_taken_and_what_is_not_known_told() -> None:
    async with asking() as (_, session):
        body = {
            "messages": HELLO,
            "keep_alive": "5m",
            "options": {"num_ctx": 8192, "repeat_penalty": 1.0, "mirostat": 0},
        }
        async with session.post("/api/chat", json=body | {"format": "", "tools": None, "template": ""}) as response:
            assert response.status == 200 and WARNING not in response.headers
        async with session.post("/api/chat", json={"messages": HELLO, "options": {"colour": 1}}) as response:
            assert response.headers[WARNING].endswith(": options.colour")
    async with asking(is_strict=True) as (_, session):
        async with session.post("/api/chat", json={"messages": HELLO, "options": {"colour": 1}}) as response:
            assert response.status == 400


async def test_what_is_lost_amid_a_stream_is_told() -> None:
    async with serving([PIECES[0], StageFailedError("node pi-hall was lost")]) as (_, client):
        with pytest.raises(ollama.ResponseError, match="pi-hall was lost"):
            async for _ in await client.chat(model="demo", messages=HELLO, stream=True):
                pass


async def test_leaving_a_stream_ends_its_text() -> None:
    async with serving([PIECES[0], None]) as (generator, client):
        stream = await client.chat(model="demo", messages=HELLO, stream=True)
        await anext(stream)
        await stream.aclose()
        await generator.is_closed.wait()


async def test_what_is_there_and_what_it_is() -> None:
    async with serving() as (_, client):
        (listed,), (loaded,) = (await client.list()).models, (await client.ps()).models
        shown = await client.show("demo")
        assert shown == await client.show("demo:latest")
        with pytest.raises(ollama.ResponseError) as missing:
            await client.show("llama3")
    assert missing.value.status_code == 404
    assert listed.model == loaded.model == "demo:latest"
    assert (listed.size, listed.digest, listed.details.quantization_level) == (CARD.num_bytes, CARD.digest, "int8")
    assert (listed.details.parameter_size, loaded.context_length) == ("6.4M", 1024)
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo[f"{CARD.architecture}.context_length"] == 1024


async def test_there_is_an_ollama() -> None:
    async with asking(api_key="secret") as (_, session):
        async with session.get("/api/tags") as response:
            assert response.status == 401 and list(await response.json()) == ["error"]
        session.headers["Authorization"] = "Bearer secret"
        async with session.get("/") as response:
            assert await response.text() == "Ollama is running"
        async with session.head("/") as response:
            assert response.status == 200
        async with session.get("/api/version") as response:
            assert (await response.json())["version"].count(".") == 2
        async with session.post("/api/pull", json={"model": "llama3"}) as response:
            assert response.status == 404 and list(await response.json()) == ["error"]
        async with session.get("/api/chat") as response:
            assert response.status == 405 and response.headers["Allow"] == "POST"
