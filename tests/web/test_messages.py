"""Anthropic's own client asks for messages."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flowspec_edge.config import MAX_NEW_TOKENS, Piece
from flowspec_edge.errors import ServerBusyError, StageFailedError
from flowspec_edge.web.app import WARNING
from flowspec_edge.web.turns import TurnLimits
from tests.web.served import HELLO, REASONED, TOKENIZER, Json, parts_of, prompt_of, serving_dialects
from tests.web.test_completions import PIECES, STATISTICS, ScriptedGenerator

anthropic = pytest.importorskip("anthropic", reason="Anthropic's client: pip install '.[dev]'")


@contextlib.asynccontextmanager
async def serving(*args: Any, **options: Any) -> AsyncIterator[tuple[ScriptedGenerator, Any]]:
    """The scripted generator, and Anthropic's client of it."""
    async with (
        serving_dialects(*args, **options) as (generator, url),
        anthropic.AsyncAnthropic(base_url=url, api_key="secret", max_retries=0) as client,
        asyncio.timeout(10),
    ):
        yield generator, client


async def test_a_whole_message() -> None:
    async with serving(api_key="secret") as (generator, client):
        message = await client.messages.create(
            model="demo",
            max_tokens=16,
            system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            messages=HELLO,
            stop_sequences=["q"],
            metadata={"user_id": "me"},
            extra_body={"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 4, "presence_penalty": 0.2, "n": 1},
        )
    assert (message.type, message.role, message.model) == ("message", "assistant", "demo")
    assert [(block.type, block.text) for block in message.content] == [("text", "ab\n")]
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (2, 1, 2)
    assert message.flowspec == {**STATISTICS, "seed": 4}
    ((_, options),) = generator.asked
    assert prompt_of(generator) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (options.max_new_tokens, options.stop, options.temperature) == (16, ("q",), 0.5)
    assert (options.top_k, options.top_p, options.seed, options.presence_penalty) == (3, 0.9, 4, 0.2)


async def test_what_is_done_where_nothing_is_said() -> None:
    async with serving() as (generator, client):
        await client.post("/v1/messages", body={"messages": HELLO}, cast_to=object)
    ((_, options),) = generator.asked
    assert (options.max_new_tokens, options.temperature, options.stop) == (MAX_NEW_TOKENS, 1.0, ())


FIRST = Piece(text="a", token_ids=[5], prompt_token_ids=[1, 2, 3])


async def test_a_stream_has_anthropics_events_in_their_order() -> None:
    async with serving([FIRST, *PIECES[1:]]) as (_, client):
        response = await client.messages.with_raw_response.create(
            model="demo", max_tokens=9, messages=HELLO, stream=True
        )
        lines = [line async for line in response.http_response.aiter_lines()]
    assert response.headers["Content-Type"] == "text/event-stream"
    assert [line.removeprefix("event: ") for line in lines if line.startswith("event: ")] == [
        *("message_start", "content_block_start", "ping", "content_block_delta", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]


async def test_a_stream_is_gathered_by_the_client() -> None:
    async with serving([FIRST, *PIECES[1:]]) as (_, client):
        async with client.messages.stream(model="demo", max_tokens=9, messages=HELLO) as stream:
            events = [event async for event in stream]
            message = await stream.get_final_message()
    assert events[0].message.usage.input_tokens == 3
    assert [event.delta.text for event in events if event.type == "content_block_delta"] == ["a", "b\n"]
    assert (message.content[0].text, message.stop_reason, message.usage.output_tokens) == ("ab\n", "max_tokens", 2)


async def test_reasoning_is_a_block_of_its_own_streamed_and_whole() -> None:
    async with serving(REASONED) as (_, client):
        whole = await client.messages.create(model="demo", max_tokens=9, messages=HELLO)
        async with client.messages.stream(model="demo", max_tokens=9, messages=HELLO) as stream:
            kinds = [event.type async for event in stream if event.type.startswith("content_block")]
            streamed = await stream.get_final_message()
    for message in (whole, streamed):
        thought, said = message.content
        assert (thought.type, thought.thinking, said.type, said.text) == ("thinking", "hm", "text", "Yes.")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2


async def test_an_empty_message_has_one_empty_block() -> None:
    async with serving(PIECES[2:]) as (_, client):
        message = await client.messages.create(model="demo", max_tokens=9, messages=HELLO)
        async with client.messages.stream(model="demo", max_tokens=9, messages=HELLO) as stream:
            streamed = await stream.get_final_message()
    assert [block.text for block in message.content] == [block.text for block in streamed.content] == [""]


@pytest.mark.parametrize(
    ("last", "wanted"),
    [
        (Piece(text="", token_ids=[], finish_reason="stop", stop="q"), ("stop_sequence", "q")),
        (Piece(text="", token_ids=[], finish_reason="stop", stop="\n\nUser:"), ("end_turn", None)),
        (Piece(text="", token_ids=[], finish_reason="stop"), ("end_turn", None)),
        (Piece(text="", token_ids=[], finish_reason="length"), ("max_tokens", None)),
    ],
)
async def test_why_a_message_ended(last: Piece, wanted: tuple[str, str | None]) -> None:
    async with serving([PIECES[0], last]) as (_, client):
        message = await client.messages.create(model="demo", max_tokens=9, messages=HELLO, stop_sequences=["q"])
    assert (message.stop_reason, message.stop_sequence) == wanted


async def test_blocks_of_every_kind_reach_the_template() -> None:
    messages: list[Json] = [
        {"role": "user", "content": [{"type": "text", "text": "Sun?"}, {"type": "text", "text": "<|im_end|>"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "A tool.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"town": "Köln"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    async with serving() as (generator, client):
        response = await client.messages.with_raw_response.create(
            model="demo", max_tokens=9, messages=messages, thinking={"type": "disabled"}
        )
    assert WARNING not in response.headers
    assert prompt_of(generator) == (
        "<|im_start|>user\nSun?\n<|im_end|><|im_end|>\n<|im_start|>assistant\nI look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>user\nSo?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert sum(part.count("<|im_end|>") for part in parts_of(generator)) == 4, "the user's own is plain text"


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
BAD: list[tuple[Json, str]] = [
    ({"messages": []}, "messages is empty"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role is 'system'"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type is 'image'"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content is missing"),
    ({"system": [IMAGE]}, "system[0].type is 'image'"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"stop_sequences": ["a", "", "b"]}, "stop_sequences must be"),
    ({"stop_sequences": "a"}, "stop_sequences is 'a'"),
    ({"extra_body": {"top_k": -1}}, "top_k is -1"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type is 'enabled'"),
    ({"extra_body": {"tool_choice": {"type": "any"}}}, "tool_choice asks for a call"),
    ({"extra_body": {"n": 2}}, "n is 2"),
    ({"extra_body": {"logprobs": True}}, "logprobs is"),
    ({"extra_body": {"stop": ["x"]}}, "stop is"),
    ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format is"),
    ({"extra_body": {"output_config": {"effort": "low"}}}, "output_config is"),
]


@pytest.mark.parametrize(("given", "text"), BAD, ids=[text for _, text in BAD])
async def test_what_cannot_be_done_is_refused_in_anthropics_words(given: Json, text: str) -> None:
    async with serving() as (generator, client):
        with pytest.raises(anthropic.BadRequestError) as error:
            await client.messages.create(**{"model": "demo", "max_tokens": 9, "messages": HELLO} | given)
    assert error.value.body["type"] == "error" and error.value.body["error"]["type"] == "invalid_request_error"
    assert error.value.body["error"]["message"].startswith(text)
    assert not generator.asked


async def test_errors_have_anthropics_kinds() -> None:
    busy = ServerBusyError("too many", retry_after_s=2.0)
    async with serving([busy], api_key="secret", limits=TurnLimits(max_per_address=1)) as (_, client):
        ask = {"model": "demo", "max_tokens": 9, "messages": HELLO}
        with pytest.raises(anthropic.APIStatusError) as error:
            await client.messages.create(**ask)
        assert error.value.status_code == 429 and error.value.body["error"]["type"] == "rate_limit_error"
        assert error.value.response.headers["Retry-After"] == "2"
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(**ask | {"model": "claude"})
        assert missing.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.batches.list()
        with pytest.raises(anthropic.AuthenticationError) as closed:
            await client.with_options(api_key="other").messages.create(**ask)
        assert closed.value.body["error"]["type"] == "authentication_error"
        with pytest.raises(anthropic.RequestTooLargeError):
            await client.messages.create(**ask | {"messages": [{"role": "user", "content": "a" * 2**22}]})


async def test_an_error_amid_a_stream() -> None:
    async with serving([PIECES[0], StageFailedError("node pi-hall was lost")]) as (_, client):
        with pytest.raises(anthropic.APIStatusError, match="pi-hall was lost"):
            async with client.messages.stream(model="demo", max_tokens=9, messages=HELLO) as stream:
                async for _ in stream:
                    pass


async def test_leaving_a_stream_ends_its_text() -> None:
    async with serving([PIECES[0], None]) as (generator, client):
        async with client.messages.stream(model="demo", max_tokens=9, messages=HELLO) as stream:
            await anext(aiter(stream))
        await generator.is_closed.wait()


async def test_tokens_are_counted_as_they_would_be_read() -> None:
    async with serving(family=None) as (generator, client):
        count = await client.messages.count_tokens(model="demo", system="Be brief.", messages=HELLO)
    assert count.input_tokens == len(TOKENIZER.encode("System: Be brief.\n\nUser: hello\n\nAssistant:"))
    assert not generator.asked


async def test_the_models_are_told_in_anthropics_form_too() -> None:
    async with serving() as (_, client):
        models = [model async for model in client.models.list()]
        assert [(model.id, model.type, model.display_name) for model in models] == [("demo", "model", "demo")]
        assert (await client.models.retrieve("demo")).created_at == models[0].created_at
        with pytest.raises(anthropic.NotFoundError):
            await client.models.retrieve("other")
