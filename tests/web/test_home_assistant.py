"""Home Assistant's requests: its Ollama and OpenAI integrations call these clients with just these arguments."""

import json
from typing import Any

import pytest

from flowspec_edge.engine.grammar import Grammars
from tests.web.served import TOKENIZER, Json, prompt_of, serving_dialects
from tests.web.test_completions import ScriptedGenerator
from tests.web.test_tools import script_of

GRAMMARS = Grammars(TOKENIZER, TOKENIZER.texts.num_ids, [0])
TURN_ON: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "area": {"type": "string", "format": "lower"},
        "domain": {"type": "array", "items": {"type": "string"}},
        "brightness": {"type": "integer", "minimum": 0, "maximum": 100, "description": "in %"},
        "temperature": {"type": "number", "nullable": True},
        "color": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3, "format": "RGB"},
        "page": {"anyOf": [{"format": "url"}, {"enum": ["none"]}]},
    },
    "required": [],
}
"""As voluptuous is turned into OpenAPI: no ``additionalProperties``, and formats that JSON Schema does not know."""
TASK: Json = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
CALL = '<tool_call>\n{"name": "HassTurnOn", "arguments": {"name": "lamp"}}\n</tool_call>'
DIALOGUE: list[Json] = [
    {"role": "system", "content": "You are a voice assistant for Home Assistant."},
    {"role": "user", "content": "Turn on the lamp"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "HassTurnOn", "arguments": {"name": "lamp"}}}]},
    {"role": "tool", "content": '{"data":{"success":["lamp"]},"error":null}'},
]


def grammar_of(generator: ScriptedGenerator) -> str:
    """That of the latest text, which can be followed."""
    grammar = generator.asked[-1][1].grammar
    assert grammar is not None
    GRAMMARS.compile(grammar)
    return grammar.text


@pytest.mark.parametrize("family", ["Qwen 3", "Llama 3.1", "Mistral 0.3", None])
async def test_its_ollama_integration(family: str | None) -> None:
    ollama = pytest.importorskip("ollama", reason="Ollama's client: pip install '.[dev]'")
    tool = {"name": "HassTurnOn", "description": "Turns on a device.", "parameters": TURN_ON}
    ask: dict[str, Any] = {
        "model": "demo:latest",
        "tools": [{"type": "function", "function": tool}],
        "stream": True,
        "options": {"num_ctx": 8192},
        "think": False,
    }
    headers = {"Authorization": "Bearer secret"}
    async with serving_dialects(script_of("Done."), family=family, api_key="secret") as (generator, url):
        client = ollama.AsyncClient(host=url, headers=headers)
        assert [model.model for model in (await client.list()).models] == ["demo:latest"]
        for messages, keep_alive in ((DIALOGUE[:2], -1), (DIALOGUE, "300s")):
            parts = [
                part async for part in await client.chat(messages=messages, keep_alive=keep_alive, format=None, **ask)
            ]
            assert "".join(part["message"].get("content") or "" for part in parts) == "Done." and parts[-1]["done"]
            assert "HassTurnOn" in grammar_of(generator) and '"lower"' not in grammar_of(generator)
        task = ask | {"tools": None}
        async for _ in await client.chat(messages=DIALOGUE[:2], keep_alive=-1, format=TASK, **task):
            pass
        assert '"answer"' in grammar_of(generator)
        async for _ in await client.chat(messages=DIALOGUE[:2], keep_alive=-1, format=TASK, **ask):
            pass
        assert '"answer"' in grammar_of(generator) and "HassTurnOn" in grammar_of(generator)
    assert "Turn on the lamp" in prompt_of(generator)


async def test_its_openai_integration() -> None:
    """Which takes its address from ``OPENAI_BASE_URL``."""
    openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")
    ask: dict[str, Any] = {
        "model": "demo",
        "max_output_tokens": 3000,
        "user": "01JABC",
        "store": False,
        "stream": True,
        "top_p": 1.0,
        "temperature": 1.0,
        "prompt_cache_retention": "24h",
    }
    tool = {
        "type": "function",
        "name": "HassTurnOn",
        "parameters": TURN_ON,
        "description": "Turns on.",
        "strict": False,
    }
    asked: list[Json] = [
        {"type": "message", "role": "developer", "content": DIALOGUE[0]["content"]},
        {"type": "message", "role": "user", "content": DIALOGUE[1]["content"]},
    ]
    called = {"type": "function_call", "name": "HassTurnOn", "arguments": '{"name": "lamp"}', "call_id": "call_1"}
    result = {"type": "function_call_output", "call_id": "call_1", "output": '{"success": ["lamp"]}'}
    thought: Json = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None}
    strict = {**TASK, "strict": True, "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "task", "schema": strict}}
    async with serving_dialects(script_of(CALL), api_key="secret") as (generator, url):
        client = openai.AsyncOpenAI(api_key="secret", base_url=f"{url}/v1")
        assert [model.id async for model in client.with_options(timeout=10.0).models.list()] == ["demo"]
        events = [event async for event in await client.responses.create(input=asked, tools=[tool], **ask)]
        done = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert [json.loads(event.arguments) for event in done] == [{"name": "lamp"}]
        assert events[-1].type == "response.completed" and events[-1].response.usage.output_tokens > 0
        generator.script = [*script_of("Done.")]
        for further in ({"tools": [tool]}, {"text": form}, {"text": form, "tools": [tool]}):
            stream = await client.responses.create(input=[*asked, called, thought, result], **further, **ask)
            texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            assert "".join(texts) == "Done."
            assert ('"answer"' in grammar_of(generator)) is ("text" in further)
        await client.close()
