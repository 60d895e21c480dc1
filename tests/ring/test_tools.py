"""OpenAI's client, the API, a ring and the demo model: tools are called as their schemas ask for."""

import json
from typing import Any

import jsonschema
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.web.call_form import PLAIN_CALLS
from flowspec_edge.web.call_grammar import CallableTool, write_call_grammar
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.plain_calls import as_plain_messages
from tests.ring.conftest import unsplit_tokens
from tests.ring.test_drawing import client_of
from tests.web.test_calls import LAMPS, SCHEMAS, STOP, WEATHER

openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")

MESSAGES = [{"role": "user", "content": "import os\n\ndef main(argv):"}]


def told(tool: CallableTool, **changed: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.name, "parameters": {**tool.parameters, **changed}}}


REPLY = {
    "type": "object",
    "properties": {"reply": {"type": "string", "maxLength": 8}, "is_public": {"type": "boolean"}},
    "required": ["reply", "is_public"],
    "additionalProperties": False,
}
TOOLS = [told(WEATHER), told(LAMPS), told(STOP)]


async def test_calls_are_what_is_asked_for_and_what_the_unsplit_model_writes(int8_bundle: Bundle) -> None:
    ask: dict[str, Any] = {"model": int8_bundle.manifest.name, "messages": MESSAGES, "max_tokens": 120}
    one: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False}
    template = ChatTemplate.of_bundle(int8_bundle)
    plain = {"messages": as_plain_messages(MESSAGES, TOOLS, has_system=True), "add_generation_prompt": True}
    prompt = Tokenizer(int8_bundle.directory / "tokenizer.json").encode(template.render_now(plain))
    reply = {"type": "json_schema", "json_schema": {"name": "reply", "schema": REPLY}}
    async with client_of(int8_bundle, template) as client:
        whole = await client.chat.completions.create(**ask, **one, tools=TOOLS, n=2, seed=5)
        stream = await client.chat.completions.create(**ask, **one, tools=TOOLS, seed=5, stream=True)
        parts = [part async for chunk in stream for part in chunk.choices[0].delta.tool_calls or ()]
        auto = await client.chat.completions.create(**ask | {"max_tokens": 24}, tools=TOOLS, temperature=0)
        either = await client.chat.completions.create(
            **ask, tools=TOOLS, response_format=reply, parallel_tool_calls=False, n=2, seed=4
        )
        with pytest.raises(openai.BadRequestError) as error:
            await client.chat.completions.create(**ask, tools=[TOOLS[0], told(STOP, properties={"a": {"type": "no"}})])
    for choice in whole.choices:
        (call,) = choice.message.tool_calls
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    for choice in either.choices:
        assert choice.finish_reason in ("stop", "tool_calls")
        if choice.message.tool_calls:
            (call,) = choice.message.tool_calls
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        else:
            jsonschema.validate(json.loads(choice.message.content), REPLY)
    first = whole.choices[0].message.tool_calls[0].function
    assert "".join(part.function.arguments for part in parts) == first.arguments
    assert [part.function.name for part in parts if part.id] == [first.name]
    grammars = [
        write_call_grammar(
            PLAIN_CALLS, [WEATHER, LAMPS, STOP], {}, is_forced=is_forced, is_parallel=not is_forced, is_reasoning=False
        )
        for is_forced in (True, False)
    ]
    drawn = GenerateOptions(max_new_tokens=120, temperature=1.0, seed=5, grammar=grammars[0])
    assert whole.choices[0].token_ids == unsplit_tokens(int8_bundle, prompt, drawn)
    content = Grammar("json", json.dumps(REPLY))
    grammar = write_call_grammar(
        PLAIN_CALLS,
        [WEATHER, LAMPS, STOP],
        {},
        is_forced=False,
        is_parallel=False,
        is_reasoning=False,
        content=content,
    )
    drawn = GenerateOptions(max_new_tokens=120, temperature=1.0, seed=4, grammar=grammar)
    assert either.choices[0].token_ids == unsplit_tokens(int8_bundle, prompt, drawn)
    greedy = GenerateOptions(max_new_tokens=24, grammar=grammars[1])
    assert auto.choices[0].token_ids == unsplit_tokens(int8_bundle, prompt, greedy)
    assert (error.value.param, error.value.code) == ("tools[1].function.parameters", "invalid_grammar")
