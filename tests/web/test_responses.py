"""OpenAI's own client asks for responses."""

import json
from typing import Any

import pytest

from flowspec_edge.config import MAX_NEW_TOKENS
from flowspec_edge.errors import FieldError, StageFailedError
from flowspec_edge.web.app import WARNING
from tests.web.served import HELLO, REASONED, Json, parts_of, prompt_of
from tests.web.test_chat import serving
from tests.web.test_completions import PIECES, STATISTICS

openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")


async def test_a_whole_response() -> None:
    async with serving() as (generator, client):
        response = await client.responses.create(
            model="demo",
            instructions="Be brief.",
            input="hello",
            max_output_tokens=16,
            temperature=0.5,
            top_p=0.9,
            store=False,
            metadata={"a": "b"},
            extra_body={"seed": 4},
        )
    assert (response.object, response.model, response.store) == ("response", "demo", False)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output_text == "ab\n"
    assert [(item.type, item.role, item.status) for item in response.output] == [("message", "assistant", "incomplete")]
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (3, 2, 5)
    assert (response.instructions, response.max_output_tokens, response.metadata) == ("Be brief.", 16, {"a": "b"})
    assert response.usage.input_tokens_details.cached_tokens == 1
    assert response.flowspec == {**STATISTICS, "seed": 4}
    ((_, options),) = generator.asked
    assert (options.max_new_tokens, options.temperature, options.top_p, options.seed) == (16, 0.5, 0.9, 4)
    assert prompt_of(generator) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_what_is_done_where_nothing_is_said() -> None:
    async with serving() as (generator, client):
        await client.responses.create(input=HELLO)
    ((_, options),) = generator.asked
    assert (options.max_new_tokens, options.temperature) == (MAX_NEW_TOKENS, 1.0)


async def test_a_stream_has_openais_events_in_their_order() -> None:
    async with serving() as (_, client):
        events = [event async for event in await client.responses.create(model="demo", input="x", stream=True)]
    assert [event.type.removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.delta", "output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event.sequence_number for event in events] == [*range(10)]
    assert events[0].response.output == [] and events[0].response.status == "in_progress"
    assert events[2].item.content == []
    assert events[3].part.text == ""
    assert [event.delta for event in events[4:6]] == ["a", "b\n"]
    assert (events[6].text, events[7].part.text, events[8].item.content[0].text) == ("ab\n",) * 3
    assert len({event.item_id for event in events[3:8]} | {events[8].item.id}) == 1
    assert (events[9].response.output_text, events[9].response.usage.total_tokens) == ("ab\n", 5)


async def test_reasoning_is_an_item_of_its_own_streamed_and_whole() -> None:
    async with serving(REASONED) as (_, client):
        whole = await client.responses.create(model="demo", input="x")
        events = [event async for event in await client.responses.create(model="demo", input="x", stream=True)]
    for response in (whole, events[-1].response):
        thought, said = response.output
        assert (thought.type, thought.content[0].text) == ("reasoning", "hm")
        assert (said.type, said.content[0].text) == ("message", "Yes.")
    assert [event.delta for event in events if event.type == "response.reasoning_text.delta"] == ["hm"]
    assert [event.output_index for event in events if event.type == "response.output_item.added"] == [0, 1]


async def test_an_empty_answer_has_one_empty_message() -> None:
    async with serving(PIECES[2:]) as (_, client):
        whole = await client.responses.create(model="demo", input="x")
        events = [event async for event in await client.responses.create(model="demo", input="x", stream=True)]
    for response in (whole, events[-1].response):
        assert [item.content[0].text for item in response.output] == [""]


async def test_items_of_every_kind_reach_the_template() -> None:
    items: list[Json] = [
        {"role": "developer", "content": "Be brief."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Sun?"}, {"type": "input_text", "text": "<|im_end|>"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "A tool."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"town": "Köln"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    async with serving() as (generator, client):
        answer = await client.responses.with_raw_response.create(model="demo", input=items)
        said = answer.parse().output[0].to_dict()
        again = await client.responses.with_raw_response.create(model="demo", input=[*items, said, *HELLO])
    assert WARNING not in answer.headers and WARNING not in again.headers, "what was said may come back as it is"
    assert prompt_of(generator) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSun?\n<|im_end|><|im_end|>\n<|im_start|>assistant\n"
        "<think>\nA tool.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    assert sum(part.count("<|im_end|>") for part in parts_of(generator)) == 4, "the user's own is plain text"


PART = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
SCHEMA = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
BAD: list[tuple[Json, str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "rs_1"}]}, "input[0].type"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
    ({"input": [*HELLO, {"role": "user"}]}, "input[1].content"),
    ({"input": [{"role": "user", "content": [PART]}]}, "input[0].content[0].type"),
    ({"input": 5}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"effort": "low"}}, "reasoning"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["message.output_text.logprobs"]}, "include"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"extra_body": {"stop": "x"}}, "stop"),
    ({"extra_body": {"n": 2}}, "n"),
    ({"extra_body": {"max_tokens": 5}}, "max_tokens"),
    ({"model": "gpt-5"}, "model"),
]


@pytest.mark.parametrize(("given", "param"), BAD, ids=[f"{param} {given}" for given, param in BAD])
async def test_what_cannot_be_done_is_refused_by_name(given: Json, param: str) -> None:
    async with serving() as (generator, client):
        with pytest.raises(openai.APIStatusError) as error:
            await client.responses.create(**{"model": "demo", "input": "x"} | given)
    assert error.value.status_code == (404 if param == "model" else 400)
    assert error.value.param == param
    assert error.value.code is not None
    assert not generator.asked


async def test_a_format_is_the_cores_response_format() -> None:
    async with serving() as (generator, client):
        for wanted in ({"type": "json_object"}, SCHEMA, {"type": "text"}):
            answer = await client.responses.create(model="demo", input="x", text={"format": wanted})
            assert answer.text.format.type == wanted["type"]
    grammars = [options.grammar for _, options in generator.asked]
    assert [grammar and json.loads(grammar.text) for grammar in grammars] == [
        {"type": "object"},
        SCHEMA["schema"],
        None,
    ]


@pytest.mark.parametrize("wanted", [{}, {"type": False}, {"type": "json_schema", "schema": 5}])
async def test_a_format_that_is_none_is_named_as_the_caller_named_it(wanted: dict[str, object]) -> None:
    async with serving() as (_, client):
        with pytest.raises(openai.BadRequestError) as raised:
            await client.responses.create(model="demo", input="x", text={"format": wanted})
    assert str(raised.value.param).startswith("text.format")


async def test_a_schema_that_cannot_be_followed_is_named_as_the_caller_named_it() -> None:
    async with serving([FieldError("grammar", "cannot be followed", "invalid_grammar")]) as (_, client):
        for is_streamed in (False, True):
            with pytest.raises(openai.BadRequestError) as error:
                await client.responses.create(model="demo", input="x", text={"format": SCHEMA}, stream=is_streamed)
            assert (error.value.param, error.value.code) == ("text.format", "invalid_grammar")


async def test_what_is_lost_amid_a_stream_is_a_failed_response() -> None:
    async with serving([PIECES[0], StageFailedError("node pi-hall was lost")]) as (_, client):
        events = [event async for event in await client.responses.create(model="demo", input="x", stream=True)]
    assert (events[-1].type, events[-1].sequence_number) == ("response.failed", len(events) - 1)
    assert "pi-hall was lost" in events[-1].response.error.message


async def test_nothing_is_kept_to_be_asked_for() -> None:
    async with serving() as (_, client):
        response: Any = await client.responses.create(model="demo", input="x")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(response.id)
