"""Chats and completions as OpenAI's own client asks for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flowspec_edge.config import MAX_NEW_TOKENS, Piece
from flowspec_edge.errors import StageFailedError
from flowspec_edge.web.app import WARNING
from flowspec_edge.web.chat import PLAIN_STOP
from flowspec_edge.web.turns import TurnLimits
from tests.web.served import HELLO, REASONED, Json, parts_of, prompt_of, serving_dialects
from tests.web.templates import FAMILIES
from tests.web.test_completions import PIECES, STATISTICS, ScriptedGenerator

openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")


@contextlib.asynccontextmanager
async def serving(*args: Any, **options: Any) -> AsyncIterator[tuple[ScriptedGenerator, Any]]:
    """The scripted generator, and OpenAI's client of it."""
    async with (
        serving_dialects(*args, **options) as (generator, url),
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
        asyncio.timeout(10),
    ):
        yield generator, client


async def test_a_whole_answer() -> None:
    async with serving() as (generator, client):
        answer = await client.chat.completions.create(model="demo", messages=HELLO, seed=4, max_tokens=16.0, stop=None)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "ab\n", "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.flowspec == {**STATISTICS, "seed": 4, "chat_template": "the model's"}
    ((_, options),) = generator.asked
    assert prompt_of(generator) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert (options.seed, options.max_new_tokens, options.temperature) == (4, 16, 1.0)


async def test_what_is_done_where_nothing_is_said() -> None:
    async with serving() as (generator, client):
        seeds = {(await client.chat.completions.create(model="demo", messages=HELLO)).flowspec["seed"] for _ in "ab"}
    assert len(seeds) == 2
    assert [(options.seed in seeds, options.max_new_tokens) for _, options in generator.asked] == [
        (True, MAX_NEW_TOKENS)
    ] * 2


@pytest.mark.parametrize("includes_usage", [True, False])
async def test_a_stream(includes_usage: bool) -> None:
    async with serving() as (_, client):
        stream = await client.chat.completions.create(
            model="demo", messages=HELLO, stream=True, stream_options={"include_usage": includes_usage}
        )
        chunks = [chunk async for chunk in stream]
    told = [chunk for chunk in chunks if chunk.choices]
    assert [(chunk.choices[0].delta.role, chunk.choices[0].delta.content) for chunk in told] == [
        ("assistant", ""),
        (None, "a"),
        (None, "b\n"),
        (None, None),
    ]
    assert [chunk.choices[0].finish_reason for chunk in told] == [None, None, None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in told)
    assert [chunk.usage.total_tokens for chunk in chunks if not chunk.choices] == ([5] if includes_usage else [])


async def test_reasoning_comes_apart_streamed_and_whole() -> None:
    async with serving(REASONED) as (_, client):
        answer = await client.chat.completions.create(model="demo", messages=HELLO)
        stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "Yes.")
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."


async def test_a_model_that_would_think_answers_at_once_where_its_answer_has_a_form(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answer = [Piece(text='{"a": 1}', token_ids=[5]), *PIECES[2:]]
    template = "{{ messages[0].content }}<|im_start|>assistant\n<think>\n"
    monkeypatch.setitem(FAMILIES, "thinking", (template, *FAMILIES["Qwen 3"][1:]))
    async with serving(answer, family="thinking") as (generator, client):
        given = await client.chat.completions.create(
            model="demo", messages=HELLO, response_format={"type": "json_object"}
        )
    assert prompt_of(generator).endswith("<think>\n</think>\n\n")
    assert given.choices[0].message.content == '{"a": 1}'


async def test_messages_of_all_roles_and_parts_reach_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Köln"}'}}
    messages: list[Json] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Sun?"}, {"type": "text", "text": "<|im_end|>"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    async with serving() as (generator, client):
        await client.chat.completions.create(
            model="demo", messages=messages, extra_body={"chat_template_kwargs": {"enable_thinking": False}}
        )
    assert prompt_of(generator) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSun?\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert sum(part.count("<|im_end|>") for part in parts_of(generator)) == 4, "the user's own is plain text"


async def test_a_model_without_a_template_gets_a_plain_one_and_that_is_said() -> None:
    async with serving(family=None) as (generator, client):
        response = await client.chat.completions.with_raw_response.create(model="demo", messages=HELLO, stop=["q"])
    assert "no chat template" in response.headers[WARNING]
    assert response.parse().flowspec["chat_template"] == "plain"
    assert prompt_of(generator) == "User: hello\n\nAssistant:"
    assert generator.asked[0][1].stop == ("q", PLAIN_STOP)


async def test_several_choices_are_written_side_by_side_each_with_a_seed_of_its_own() -> None:
    async with serving() as (generator, client):
        answer = await client.chat.completions.create(model="demo", messages=HELLO, n=3, seed=2**64 - 2)
        stream = await client.chat.completions.create(
            model="demo", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [
        (0, "ab\n"),
        (1, "ab\n"),
        (2, "ab\n"),
    ]
    assert [options.seed for _, options in generator.asked[:3]] == [2**64 - 2, 2**64 - 1, 0]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6)
    for choice in range(2):
        told = [
            chunk.choices[0].delta.content or ""
            for chunk in chunks
            if chunk.choices and chunk.choices[0].index == choice
        ]
        assert "".join(told) == "ab\n"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 4)


async def test_an_error_in_one_choice_ends_all_and_frees_their_places() -> None:
    limits = TurnLimits(max_sessions=3, max_queue=0, max_per_address=3)
    async with serving([PIECES[0], StageFailedError("lost")], limits=limits) as (generator, client):
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="lost"):
                await client.chat.completions.create(model="demo", messages=HELLO, n=3)
        with pytest.raises(openai.BadRequestError, match="4 texts are asked for, and 3"):
            await client.chat.completions.create(model="demo", messages=HELLO, n=4)
        assert len(generator.asked) == 6


async def test_leaving_a_stream_ends_its_texts() -> None:
    async with serving([PIECES[0], None]) as (generator, client):
        stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True, n=2)
        await anext(aiter(stream))
        await stream.close()
        await generator.is_closed.wait()


async def test_an_error_amid_a_stream() -> None:
    async with serving([PIECES[0], StageFailedError("node pi-hall was lost")]) as (_, client):
        stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="pi-hall was lost"):
            async for _ in stream:
                pass


PART = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
BAD: list[tuple[Json, str, str]] = [
    ({"messages": []}, "messages", "is empty"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role", "'king'"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
    ({"messages": [*HELLO, {"role": "user"}]}, "messages[1].content", "is missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "is 5"),
    ({"messages": [{"role": "user", "content": [PART]}]}, "messages[0].content[0].type", "'image_url'"),
    ({"max_tokens": 0}, "max_tokens", "is 0"),
    ({"max_completion_tokens": 0}, "max_completion_tokens", "is 0"),
    ({"temperature": "hot"}, "temperature", "is 'hot'"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "must lie between -2 and 2"),
    ({"top_logprobs": 3}, "top_logprobs", "logprobs is not true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must lie between 0 and 20"),
    ({"extra_body": {"best_of": 2}}, "best_of", "texts are not chosen among here"),
    ({"tool_choice": "required"}, "tool_choice", "no tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "must be one of text, json_object, json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "is missing"),
    ({"extra_body": {"guided_choice": []}}, "guided_choice", "has 0 texts"),
    ({"extra_body": {"guided_regex": "a", "guided_grammar": "b"}}, "guided_grammar", "beside guided_regex"),
    ({"extra_body": {"structured_outputs": {"structural_tag": "{}"}}}, "structured_outputs", "has none of json"),
    ({"extra_body": {"guided_regex": "a", "ignore_eos": True}}, "ignore_eos", "beside a grammar"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
    ({"model": "gpt-5"}, "model", "not served here"),
    ({"extra_body": {"echo": True}}, "echo", "not supported"),
    ({"extra_body": {"flowspec": {"resumable": True}}}, "flowspec", "not supported"),
]


@pytest.mark.parametrize(("given", "param", "text"), BAD, ids=[f"{param} {text}" for _, param, text in BAD])
async def test_what_cannot_be_done_is_refused_in_the_callers_words(given: Json, param: str, text: str) -> None:
    async with serving() as (generator, client):
        with pytest.raises(openai.APIStatusError) as error:
            await client.chat.completions.create(**{"model": "demo", "messages": HELLO} | given)
    assert error.value.status_code == (404 if param == "model" else 400)
    assert error.value.param == param and text in error.value.message
    assert error.value.code is not None
    assert not generator.asked


async def test_what_changes_nothing_is_taken() -> None:
    async with serving() as (_, client):
        response = await client.chat.completions.with_raw_response.create(
            model="demo",
            messages=HELLO,
            user="me",
            metadata={"a": "b"},
            store=False,
            presence_penalty=0,
            logit_bias={},
            response_format={"type": "text"},
            logprobs=False,
            n=1,
            tools=[],
            parallel_tool_calls=True,
        )
        assert WARNING not in response.headers
        response = await client.chat.completions.with_raw_response.create(
            model="demo", messages=HELLO, extra_body={"colour": "red"}
        )
        assert response.headers[WARNING].endswith("colour")


async def test_a_strict_server_refuses_what_it_does_not_know() -> None:
    async with serving(is_strict=True) as (_, client):
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(model="demo", messages=HELLO, extra_body={"colour": "red"})
    assert (error.value.param, error.value.code) == ("colour", "unknown_parameter")


async def test_a_template_that_refuses_is_the_requests_fault() -> None:
    async with serving(family="Gemma") as (_, client):
        with pytest.raises(openai.BadRequestError, match="System role not supported"):
            await client.chat.completions.create(model="demo", messages=[{"role": "system", "content": "x"}, *HELLO])


# ------------------------------------------------------------------------------------------------- completions


async def test_prompts_of_every_kind() -> None:
    async with serving() as (generator, client):
        for prompt, wanted in (
            ("x", ["x"]),
            (["x", "y"], ["x", "y"]),
            ([1, 2], [[1, 2]]),
            ([[1, 2], [3]], [[1, 2], [3]]),
        ):
            generator.asked.clear()
            answer = await client.completions.create(model="demo", prompt=prompt, seed=5, n=2)
            assert [given for given, _ in generator.asked] == [one for one in wanted for _ in range(2)]
            assert [options.seed for _, options in generator.asked] == [5, 6] * len(wanted)
            assert [choice.index for choice in answer.choices] == [*range(2 * len(wanted))]
            assert answer.usage.prompt_tokens == 3 * len(wanted)


async def test_echo_and_usage_in_completions() -> None:
    async with serving() as (_, client):
        answer = await client.completions.create(model="demo", prompt="x", echo=True)
        assert answer.choices[0].text == "xab\n"
        stream = await client.completions.create(
            model="demo", prompt="x", echo=True, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["xa", "b\n", ""]
    assert [chunk.usage and chunk.usage.total_tokens for chunk in chunks] == [None, None, None, 5]


async def test_models_and_what_is_not_there() -> None:
    async with serving() as (_, client):
        assert (await client.models.retrieve("demo")).id == "demo"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("org/other")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
            await client.embeddings.create(model="demo", input="x")
        with pytest.raises(openai.APIStatusError) as wrong:
            await client.get("/chat/completions", cast_to=object)
        assert wrong.value.status_code == 405 and wrong.value.response.headers["Allow"] == "POST"
        assert wrong.value.body["type"] == "invalid_request_error"
        with pytest.raises(openai.APIStatusError) as large:
            await client.chat.completions.create(model="demo", messages=[HELLO[0] | {"content": "a" * 2**22}])
        assert large.value.status_code == 413 and large.value.body["type"] == "invalid_request_error"
