"""OpenAI's client, the API, a ring and the demo model: texts that a schema, an expression or a grammar asks for."""

import json
import re
from typing import Any

import jsonschema
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, Grammar, UnfinishedText
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.web.chat_template import ChatTemplate
from tests.ring.conftest import answer_of, ring_of, tokens_of, unsplit_tokens
from tests.ring.test_drawing import client_of

openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "function": {"type": "string", "maxLength": 8},
        "is_public": {"type": "boolean"},
        "arguments": {"type": "array", "items": {"enum": ["self", "path", "number"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["function", "is_public", "arguments"],
    "additionalProperties": False,
}
GRAMMAR = Grammar("json", json.dumps(SCHEMA))


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 4, "top_p": 0.95, "repetition_penalty": 1.1}])
async def test_a_ring_writes_what_the_unsplit_model_writes_under_a_schema(
    options: dict[str, Any], int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    asked = GenerateOptions(max_new_tokens=80, grammar=GRAMMAR, **options)
    expected = unsplit_tokens(int8_bundle, prompts[0], asked)
    async with ring_of(2, int8_bundle) as ring:
        assert tokens_of(await answer_of(ring, prompts[0], asked)) == expected
        began = UnfinishedText(prompt=tuple(prompts[0]), tokens=tuple(expected[:9]))
        answer = await ring.begin(began, asked)
        assert [token async for piece in ring.write(answer) for token in piece.token_ids] == expected[9:]
    text = Tokenizer(int8_bundle.directory / "tokenizer.json").decode(expected)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert expected[-1] in int8_bundle.manifest.eos_token_ids


async def test_openais_client_gets_what_it_asks_for(int8_bundle: Bundle) -> None:
    name = int8_bundle.manifest.name
    chat = {"model": name, "messages": [{"role": "user", "content": "def main("}], "max_tokens": 80, "seed": 1}
    text = {"model": name, "prompt": "def main(", "max_tokens": 40, "seed": 3, "temperature": 1.0}
    schema = {"type": "json_schema", "json_schema": {"name": "f", "schema": SCHEMA, "strict": True}}
    async with client_of(int8_bundle, ChatTemplate.of_bundle(int8_bundle)) as client:
        whole = await client.chat.completions.create(**chat, response_format=schema, n=2)
        stream = await client.chat.completions.create(**chat, response_format=schema, stream=True)
        chunks = [chunk async for chunk in stream]
        cut = await client.chat.completions.create(**chat | {"max_tokens": 3}, response_format={"type": "json_object"})
        regex = await client.completions.create(**text, extra_body={"guided_regex": "[a-z]{3}-[0-9]{2}"})
        choice = await client.completions.create(**text, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
        faults = []
        for extra in (
            {"guided_json": {"type": "nope"}},
            {"structured_outputs": {"grammar": "start: other"}},
            {"guided_regex": "(a", "stream": True},
            {"guided_choice": ["a"], "guided_regex": "a"},
            {"response_format": {"type": "xml"}},
            {"guided_json": {"type": "object", "description": "x" * 70_000}},
        ):
            with pytest.raises(openai.BadRequestError) as error:
                await client.completions.create(**text, extra_body=extra)
            faults.append((error.value.param, error.value.code))
        with pytest.raises(openai.BadRequestError) as error:
            broken = {"type": "json_schema", "json_schema": {"name": "f", "schema": {"not": {}}}}
            await client.chat.completions.create(**chat, response_format=broken)
    for written in whole.choices:
        jsonschema.validate(json.loads(written.message.content), SCHEMA)
        assert written.finish_reason == "stop"
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert streamed == whole.choices[0].message.content
    assert cut.choices[0].finish_reason == "length" and cut.choices[0].message.content.startswith("{")
    assert re.fullmatch("[a-z]{3}-[0-9]{2}", regex.choices[0].text) and choice.choices[0].text in ("yes", "no")
    assert faults == [
        ("guided_json", "invalid_grammar"),
        ("structured_outputs.grammar", "invalid_grammar"),
        ("guided_regex", "invalid_grammar"),
        ("guided_choice", "invalid_value"),
        ("response_format.type", "unsupported_parameter"),
        ("guided_json", "invalid_value"),
    ]
    assert (error.value.param, error.value.code) == ("response_format", "invalid_grammar")
    assert "Unimplemented keys" in error.value.message
