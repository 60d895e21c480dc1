"""Tools in every dialect, as the clients that people have ask for them and read calls."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, NamedTuple

import aiohttp
import pytest

from flowspec_edge.config import MAX_GRAMMAR_CHARACTERS, GenerateOptions, Grammar, Piece, Prompt
from flowspec_edge.errors import FieldError
from tests.docs.documents import python_snippet
from tests.narrowing import present
from tests.web.served import HELLO, Json, prompt_of, serving_dialects
from tests.web.templates import FAMILIES
from tests.web.test_completions import STATISTICS, ScriptedGenerator

SCHEMA: Json = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
TOOL: Json = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
TIME: Json = {"type": "function", "function": {"name": "time"}}
TOLD = '{"name": "weather", "description": "The weather.", "parameters": ' + json.dumps(SCHEMA) + "}"
CALLS = [("weather", {"town": "Köln {<tool_call>"}), ("time", {})]
TEXT = "I look.\n" + "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'
    for name, arguments in CALLS
)


def script_of(text: str, finish_reason: str = "stop", size: int = 7) -> list[Piece]:
    """A text in small pieces."""
    parts = [text[at : at + size] for at in range(0, len(text), size)]
    pieces = [Piece(text=part, token_ids=[5]) for part in parts]
    return [*pieces, Piece(text="", token_ids=[], finish_reason=finish_reason, statistics=STATISTICS)]


SCRIPT = script_of(TEXT)


class Served(NamedTuple):
    generator: ScriptedGenerator
    url: str
    session: aiohttp.ClientSession

    async def post(self, path: str, body: Json) -> tuple[int, Json]:
        async with self.session.post(f"{self.url}{path}", json=body) as response:
            return response.status, await response.json()

    @property
    def grammar(self) -> Grammar | None:
        """That of the latest text."""
        return self.generator.asked[-1][1].grammar


@contextlib.asynccontextmanager
async def serving(
    script: Sequence[Piece | Exception | None] = SCRIPT, *, family: str | None = "Qwen 3"
) -> AsyncIterator[Served]:
    async with (
        serving_dialects(script, family=family) as (generator, url),
        aiohttp.ClientSession() as session,
        asyncio.timeout(30),
    ):
        yield Served(generator, url, session)


# ------------------------------------------------------------------------------------------------- the clients


async def test_openais_chats() -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")
    ask = {"model": "demo", "messages": HELLO, "tools": [TOOL, TIME]}
    async with serving() as served, openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        (choice,) = (await client.chat.completions.create(**ask)).choices
        async with client.chat.completions.stream(**ask) as stream:
            events = [event async for event in stream]
            (streamed,) = (await stream.get_final_completion()).choices
        prompt = prompt_of(served.generator)
    assert f"<tools>\n{json.dumps(TOOL)}\n{json.dumps(TIME)}\n</tools>" in prompt
    for given in (choice, streamed):
        assert (given.finish_reason, given.message.content) == ("tool_calls", "I look.")
        calls = given.message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == CALLS
        assert len({call.id for call in calls}) == 2 and {call.type for call in calls} == {"function"}
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert len(deltas) > 4, "arguments come as they are written"


REPLY: Json = {
    "type": "json_schema",
    "json_schema": {
        "name": "reply",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"said": {"type": "string"}},
            "required": ["said"],
            "additionalProperties": False,
        },
    },
}
SAID = '{"said": "<tool_call> is a mark"}'


@pytest.mark.parametrize("text", [SAID, TEXT.removeprefix("I look.\n")], ids=["content", "calls"])
async def test_openais_client_is_told_calls_or_what_it_asked_for(text: str) -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")
    pydantic = pytest.importorskip("pydantic")
    kind = pydantic.create_model("Reply", said=str)
    weather = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    flat = {"type": "function", **weather["function"]}
    chats = {"model": "demo", "messages": HELLO, "tools": [weather, TIME], "tool_choice": allowed("auto", "weather")}
    responses = {
        "model": "demo",
        "input": "hello",
        "tools": [flat],
        "tool_choice": allowed_in_responses("auto", "weather"),
    }
    async with (
        serving(script_of(text)) as served,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as client,
    ):
        (whole,) = (await client.chat.completions.create(**chats, response_format=REPLY)).choices
        parsed = (await client.chat.completions.parse(**chats | {"tools": [weather]}, response_format=kind)).choices
        async with client.chat.completions.stream(**chats | {"tools": [weather]}, response_format=kind) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices
        response = await client.responses.parse(**responses, text_format=kind)
        grammars = [options.grammar.text for _, options in served.generator.asked if options.grammar]
    for choice in (whole, *parsed, *streamed):
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls or ()]
        assert (choice.message.content or "", calls) == ((SAID, []) if text == SAID else ("", CALLS))
        assert choice.finish_reason == ("stop" if text == SAID else "tool_calls")
    for said in (parsed[0].message.parsed, streamed[0].message.parsed, response.output_parsed):
        assert said == (kind(said="<tool_call> is a mark") if text == SAID else None)
    assert [item.type for item in response.output] == (["message"] if text == SAID else ["function_call"] * 2)
    assert all('"said"' in grammar and "\nANY" in grammar and "time" not in grammar for grammar in grammars)


async def test_openais_responses() -> None:
    openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")
    tools = [{"type": "function", **tool["function"]} for tool in (TOOL, TIME)]
    ask = {"model": "demo", "input": "hello", "tools": tools}
    async with serving() as served, openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        whole = await client.responses.create(**ask, tool_choice={"type": "function", "name": "time"})
        async with client.responses.stream(**ask, parallel_tool_calls=False) as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_response()
        prompt = prompt_of(served.generator)
    assert f"<tools>\n{json.dumps(TOOL)}\n{json.dumps(TIME)}\n</tools>" in prompt
    for given in (whole, streamed):
        said, *calls = given.output
        assert (given.status, said.content[0].text) == ("completed", "I look.")
        assert [(call.type, call.status) for call in calls] == [("function_call", "completed")] * 2
        assert [(call.name, json.loads(call.arguments)) for call in calls] == CALLS
        assert all(call.call_id != call.id for call in calls)
        assert [tool.name for tool in given.tools] == ["weather", "time"]
    assert (whole.tool_choice.name, streamed.tool_choice) == ("time", "auto")
    assert (whole.parallel_tool_calls, streamed.parallel_tool_calls) == (True, False)
    assert [event.sequence_number for event in events] == [*range(len(events))]
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [json.loads(event.arguments) for event in done] == [arguments for _, arguments in CALLS]
    for event in done:
        deltas = [
            part.delta for part in events if part.type.endswith("arguments.delta") and part.item_id == event.item_id
        ]
        assert "".join(deltas) == event.arguments


async def test_anthropics_messages() -> None:
    anthropic = pytest.importorskip("anthropic", reason="Anthropic's client: pip install '.[dev]'")
    tools = [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}]
    tools.append({"type": "custom", "name": "time", "input_schema": {"type": "object"}})
    ask = {"model": "demo", "max_tokens": 99, "messages": HELLO, "tools": tools}
    async with serving() as served, anthropic.AsyncAnthropic(base_url=served.url, api_key="x") as client:
        whole = await client.messages.create(**ask)
        async with client.messages.stream(**ask) as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_message()
        prompt = prompt_of(served.generator)
    assert f"<tools>\n{json.dumps(TOOL)}\n" in prompt
    for message in (whole, streamed):
        said, *calls = message.content
        assert (message.stop_reason, said.text) == ("tool_use", "I look.")
        assert [(call.type, call.name, call.input) for call in calls] == [("tool_use", *call) for call in CALLS]
    parts = [event.partial_json for event in events if event.type == "input_json"]
    assert len(parts) > 4 and "".join(parts) == json.dumps(CALLS[0][1], ensure_ascii=False) + "{}"


async def test_ollamas_chats() -> None:
    ollama = pytest.importorskip("ollama", reason="Ollama's client: pip install '.[dev]'")
    async with serving() as served:
        client = ollama.AsyncClient(host=served.url)
        whole = await client.chat(model="demo", messages=HELLO, tools=[TOOL, TIME])
        parts = [
            part async for part in await client.chat(model="demo", messages=HELLO, tools=[TOOL, TIME], stream=True)
        ]
        prompt = prompt_of(served.generator)
    assert '"name": "weather", "description": "The weather.", "parameters": {"type": "object"' in prompt
    streamed = [call for part in parts for call in part.message.tool_calls or ()]
    for calls in (whole.message.tool_calls, streamed):
        assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert whole.message.content == "".join(part.message.content for part in parts) == "I look."
    assert (whole.done_reason, parts[-1].done_reason) == ("stop", "stop")


async def test_langchain() -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai: pip install '.[dev]'")
    async with serving() as served:
        for uses_responses in (False, True):
            model = langchain.ChatOpenAI(
                base_url=f"{served.url}/v1", api_key="x", model="demo", use_responses_api=uses_responses
            ).bind_tools([TOOL, {"type": "function", "function": TIME["function"] | {"description": "It."}}])
            whole = await model.ainvoke("hello")
            chunks = [chunk async for chunk in model.astream("hello")]
            streamed = chunks[0]
            for chunk in chunks[1:]:
                streamed += chunk
            for message in (whole, streamed):
                assert [(call["name"], call["args"]) for call in message.tool_calls] == CALLS
                assert message.text == "I look."


@pytest.mark.filterwarnings("ignore:.*ReadOnly:UserWarning")
async def test_litellm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the internet for a list of prices
    litellm = pytest.importorskip("litellm", reason="litellm: pip install '.[dev]'")
    typed = {"extra_headers": {"Content-Type": "application/json"}}

    def ask(provider: str, base: str) -> None:
        where = {"model": f"{provider}/demo", "api_base": base, **(typed if provider == "ollama_chat" else {})}
        answer = litellm.completion(api_key="x", messages=HELLO, tools=[TOOL, TIME], timeout=10, **where)
        calls = answer.choices[0].message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == CALLS, provider
        assert answer.choices[0].finish_reason == "tool_calls", provider

    async with serving() as served:
        for provider, base in (("openai", f"{served.url}/v1"), ("anthropic", served.url), ("ollama_chat", served.url)):
            await asyncio.to_thread(ask, provider, base)


class Caller(ScriptedGenerator):
    """Calls a tool in its first text, and says what came of it in the next one."""

    async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        self.script = script_of("Take one." if self.asked else FIRST_CALL)
        async for piece in super().generate(prompt, options):
            yield piece


FIRST_CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Cologne"}}\n</tool_call>'


async def test_our_own_client_as_the_documentation_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    code = python_snippet("docs/clients.md", "Tools")
    async with serving_dialects([], generator=Caller([])) as (generator, url), asyncio.timeout(30):
        here = code.replace("http://127.0.0.1:8008", url)
        assert here != code
        await asyncio.to_thread(exec, here, {})
    assert capsys.readouterr().out == "Take one.\n"
    assert "It rains in Cologne." in str(generator.asked[1][0])


# ------------------------------------------------------------------------------------------------- what is asked for


def chat(**fields: Any) -> Json:
    return {"messages": HELLO, "tools": [TOOL, TIME], **fields}


def named(name: str) -> Json:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str, **changed: Any) -> Json:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [*map(named, names)], **changed}}


def allowed_in_responses(mode: str, *names: str) -> Json:
    return {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", "name": name} for name in names]}


FORCED = 'start: "<tool_call>\\n{\\"name\\": \\"" calls'
CHOICES: list[tuple[str, Json, list[str], bool]] = [
    ("/v1/chat/completions", chat(), ["weather", "time"], False),
    ("/v1/chat/completions", chat(tool_choice="auto"), ["weather", "time"], False),
    ("/v1/chat/completions", chat(tool_choice="required"), ["weather", "time"], True),
    ("/v1/chat/completions", chat(tool_choice={"type": "function", "function": {"name": "time"}}), ["time"], True),
    ("/v1/chat/completions", chat(tool_choice=allowed("auto", "time")), ["time"], False),
    (
        "/v1/chat/completions",
        chat(tool_choice=allowed("required", "time", "weather", "time")),
        ["weather", "time"],
        True,
    ),
    ("/v1/chat/completions", chat(tool_choice="none"), [], False),
    ("/v1/responses", {"tool_choice": "required"}, ["weather", "time"], True),
    ("/v1/responses", {"tool_choice": {"type": "function", "name": "weather"}}, ["weather"], True),
    ("/v1/responses", {"tool_choice": allowed_in_responses("required", "time")}, ["time"], True),
    ("/v1/responses", {"tool_choice": allowed_in_responses("auto", "time", "weather")}, ["weather", "time"], False),
    ("/v1/responses", {"tool_choice": "none"}, [], False),
    ("/v1/messages", {"tool_choice": {"type": "auto"}}, ["weather", "time"], False),
    ("/v1/messages", {"tool_choice": {"type": "any"}}, ["weather", "time"], True),
    ("/v1/messages", {"tool_choice": {"type": "tool", "name": "weather"}}, ["weather"], True),
    ("/v1/messages", {"tool_choice": {"type": "none"}}, [], False),
]
FLAT = [{"type": "function", **tool["function"]} for tool in (TOOL, TIME)]
BLOCKS = [{"name": "weather", "input_schema": SCHEMA}, {"name": "time"}]
BASES: dict[str, Json] = {
    "/v1/chat/completions": {},
    "/v1/responses": {"input": "hello", "tools": FLAT},
    "/v1/messages": {"messages": HELLO, "tools": BLOCKS},
    "/api/chat": {"messages": HELLO, "tools": [TOOL, TIME], "stream": False},
}


@pytest.mark.parametrize(("path", "given", "names", "is_forced"), CHOICES)
async def test_whether_tools_are_called(path: str, given: Json, names: list[str], is_forced: bool) -> None:
    async with serving() as served:
        status, _ = await served.post(path, BASES[path] | given)
        assert status == 200
        prompt, grammar = prompt_of(served.generator), served.grammar
    assert ("weather" in prompt) is bool(names), "a model that may call none is told of none"
    assert (grammar is not None) is bool(names)
    if grammar is not None:
        assert (FORCED in grammar.text) is is_forced
        assert [name for name in ("weather", "time") if f'"{name}\\"' in grammar.text] == names


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/v1/chat/completions", chat(parallel_tool_calls=False)),
        ("/v1/responses", {"parallel_tool_calls": False}),
        ("/v1/messages", {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}),
    ],
)
async def test_one_call_alone(path: str, given: Json) -> None:
    async with serving() as served:
        await served.post(path, BASES[path] | given)
        assert served.grammar is not None and " call)*" not in served.grammar.text
        given.pop("parallel_tool_calls", given.pop("tool_choice", None))
        await served.post(path, BASES[path] | given)
        assert served.grammar is not None and " call)*" in served.grammar.text


def chats(**fields: Any) -> tuple[str, Json]:
    return "/v1/chat/completions", chat(**fields)


BAD: list[tuple[tuple[str, Json], str, str]] = [
    (chats(tools=[TOOL, TIME, TOOL]), "tools[2].function.name", "is 'weather', and so is that of tool 0"),
    (chats(tools=[{"type": "web_search"}]), "tools[0].type", "may be 'function'"),
    (chats(tools=[{"type": "function"}]), "tools[0].function", "is missing"),
    (chats(tools=[{"type": "function", "function": {}}]), "tools[0].function.name", "is missing"),
    (chats(tools=[named("a b")]), "tools[0].function.name", "letters, digits"),
    (chats(tools=[named("")]), "tools[0].function.name", "letters, digits"),
    (chats(tools=[named(f"f{at}") for at in range(129)]), "tools", "it may have 128"),
    (chats(tools="all"), "tools", "must be of type array"),
    (
        chats(tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]),
        "tools[0].function.parameters",
        "",
    ),
    (
        chats(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]),
        "tools[0].function.parameters",
        "arguments are an object",
    ),
    (chats(tool_choice=named("clock")), "tool_choice.function.name", "none of the tools (weather, time)"),
    (chats(tool_choice={"type": "function"}), "tool_choice.function", "is missing"),
    (chats(tool_choice={"type": "custom"}), "tool_choice.type", "may be 'function' or 'allowed_tools'"),
    (chats(tool_choice={"type": "allowed_tools"}), "tool_choice.allowed_tools", "is missing"),
    (chats(tool_choice=allowed("none", "time")), "tool_choice.allowed_tools.mode", "must be one of auto, required"),
    (chats(tool_choice=allowed("auto")), "tool_choice.allowed_tools.tools", "has 0 tools"),
    (
        chats(tool_choice=allowed("auto", "time", "clock")),
        "tool_choice.allowed_tools.tools[1].function.name",
        "none of the tools (weather, time)",
    ),
    (
        chats(tool_choice=allowed("auto", tools=[{"type": "mcp"}])),
        "tool_choice.allowed_tools.tools[0].type",
        "may be 'function'",
    ),
    (chats(tool_choice="always"), "tool_choice", "must be one of none, auto, required"),
    (chats(tool_choice="required", tools=[]), "tool_choice", "there are no tools"),
    (chats(tool_choice=named("clock"), tools=None), "tool_choice.function.name", "none of the tools (none)"),
    (chats(guided_grammar='start: "a"'), "guided_grammar", "beside tools"),
    (chats(guided_json="{"), "guided_json", "cannot be followed"),
    (chats(guided_json="true"), "guided_json", "must be an object"),
    (chats(ignore_eos=True), "ignore_eos", "beside a grammar or tools"),
    (chats(functions=[TIME["function"]]), "functions", "not supported"),
    (("/v1/responses", {"tools": [FLAT[0], FLAT[0]]}), "tools[1].name", "that of tool 0"),
    (("/v1/responses", {"tools": [{"type": "mcp"}]}), "tools[0].type", "may be 'function'"),
    (("/v1/responses", {"tools": [{"type": "function"}]}), "tools[0].name", "must be of type str"),
    (
        ("/v1/responses", {"tool_choice": {"type": "function", "name": "clock"}}),
        "tool_choice.name",
        "none of the tools",
    ),
    (("/v1/responses", {"tool_choice": {"type": "file_search"}}), "tool_choice.type", "may be 'function'"),
    (
        ("/v1/responses", {"tool_choice": allowed_in_responses("auto", "time", "clock")}),
        "tool_choice.tools[1].name",
        "none of the tools",
    ),
    (("/v1/responses", {"tool_choice": {"type": "allowed_tools"}}), "tool_choice.mode", "must be of type str"),
    (("/v1/responses", {"tool_choice": allowed_in_responses("auto")}), "tool_choice.tools", "has 0 tools"),
]


@pytest.mark.parametrize(("asked", "param", "text"), BAD, ids=[f"{param} {text}" for _, param, text in BAD])
async def test_what_cannot_be_called_is_refused_by_name(asked: tuple[str, Json], param: str, text: str) -> None:
    path, given = asked
    async with serving() as served:
        status, answer = await served.post(path, BASES[path] | given)
        assert not served.generator.asked
    assert (status, answer["error"]["param"]) == (400, param)
    assert text in answer["error"]["message"] and answer["error"]["code"] is not None


@pytest.mark.parametrize(
    ("path", "given", "text"),
    [
        ("/v1/messages", {"tools": [BLOCKS[0], BLOCKS[0]]}, "tools[1].name is 'weather'"),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools[0].input_schema is of"),
        ("/v1/messages", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type is 'bash_20250124'"),
        ("/v1/messages", {"tool_choice": {"type": "tool", "name": "clock"}}, "tool_choice.name is 'clock'"),
        ("/v1/messages", {"tool_choice": {"type": "tool"}}, "tool_choice.name is missing"),
        ("/v1/messages", {"tool_choice": {"type": "required"}}, "tool_choice.type is 'required'"),
        ("/api/chat", {"tools": [TOOL, TOOL]}, "tools[1].function.name is 'weather'"),
    ],
)
async def test_and_so_in_dialects_whose_errors_have_no_name(path: str, given: Json, text: str) -> None:
    async with serving() as served:
        status, answer = await served.post(path, BASES[path] | given)
        assert not served.generator.asked
    error = answer["error"]
    assert status == 400 and (error if path == "/api/chat" else error["message"]).startswith(text)


async def test_what_a_family_cannot_tell_from_its_calls_is_refused() -> None:
    """Calls of Llama 3.1 are JSON from their first character on."""
    async with serving(family="Llama 3.1") as served:
        for path, name, given in (
            ("/v1/chat/completions", "response_format", {"response_format": {"type": "json_object"}}),
            ("/v1/responses", "text.format", {"text": {"format": {"type": "json_object"}}}),
        ):
            status, answer = await served.post(path, chat(**given) if "chat" in path else BASES[path] | given)
            assert (status, answer["error"]["param"], answer["error"]["code"]) == (400, name, "unsupported_parameter")
            assert (
                'calls of this model, {"name": "NAME", "parameters": {...}}, cannot be told'
                in answer["error"]["message"]
            )
        status, answer = await served.post("/api/chat", BASES["/api/chat"] | {"format": "json"})
        assert status == 400 and answer["error"].startswith("format is given beside tools")
        assert not served.generator.asked
        for taken in (
            chat(response_format=REPLY),
            chat(guided_regex=".*"),
            chat(tool_choice="required", guided_json={}),
        ):
            assert (await served.post("/v1/chat/completions", taken))[0] == 200


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/v1/chat/completions", "tools[1].function.parameters"),
        ("/v1/responses", "tools[1].parameters"),
        ("/v1/messages", "tools[1].input_schema"),
        ("/api/chat", "tools[1].function.parameters"),
    ],
)
async def test_a_schema_that_only_a_ring_finds_at_fault_is_named(path: str, name: str) -> None:
    fault = FieldError("grammar", "cannot be followed: at 2(14): Invalid type: nope", "invalid_grammar")
    async with serving([fault]) as served:
        status, answer = await served.post(path, chat() if path == "/v1/chat/completions" else BASES[path])
        assert status == 400
        error = answer["error"] if isinstance(answer["error"], str) else answer["error"]["message"]
        assert error.startswith(f"{name} cannot be followed: at 2(14): Invalid type: nope")
        served.generator.script = [FieldError("grammar", "cannot be followed: too complex", "invalid_grammar")]
        _, answer = await served.post(path, chat() if path == "/v1/chat/completions" else BASES[path])
        error = answer["error"] if isinstance(answer["error"], str) else answer["error"]["message"]
        assert error.startswith("tools cannot be followed")


async def test_schemas_that_are_too_large_together() -> None:
    large = {"type": "object", "description": "x" * (MAX_GRAMMAR_CHARACTERS // 2)}
    tools = [{"type": "function", "function": {"name": f"f{at}", "parameters": large}} for at in range(2)]
    async with serving() as served:
        status, answer = await served.post("/v1/chat/completions", chat(tools=tools))
    assert (status, answer["error"]["param"]) == (400, "tools")


# ------------------------------------------------------------------------------------------------- what is written


async def test_a_call_that_is_cut_off_is_no_call_that_a_client_would_make() -> None:
    begun = TEXT[: TEXT.index('<tool_call>"')]
    async with serving(script_of(begun, "length")) as served:
        _, answer = await served.post("/v1/chat/completions", chat())
        (choice,) = answer["choices"]
        assert choice["finish_reason"] == "length"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"town": "Köln {'
        _, answer = await served.post("/v1/responses", BASES["/v1/responses"])
        assert (answer["status"], answer["output"][-1]["status"]) == ("incomplete", "incomplete")
        _, answer = await served.post("/v1/messages", BASES["/v1/messages"])
        assert (answer["stop_reason"], answer["content"][-1]["input"]) == ("max_tokens", {})
        _, answer = await served.post("/api/chat", BASES["/api/chat"])
        assert answer["done_reason"] == "length" and "tool_calls" not in answer["message"]


async def test_where_no_tool_may_be_called_a_call_is_text() -> None:
    async with serving() as served:
        _, answer = await served.post("/v1/chat/completions", chat(tool_choice="none"))
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", TEXT)


async def test_a_model_thinks_before_it_calls_where_it_may_and_calls_at_once_where_it_must(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, names, special = FAMILIES["Qwen 3"]
    thinking = source.removesuffix("{%- endif %}\n") + "{{- '<think>\\n' }}{%- endif %}"
    monkeypatch.setitem(FAMILIES, "thinking", (thinking, names, special))
    thought = "hm <tool_call> hm\n</think>\n\n"
    async with serving(script_of(thought + TEXT), family="thinking") as served:
        _, answer = await served.post("/v1/chat/completions", chat())
        message = answer["choices"][0]["message"]
        assert prompt_of(served.generator).endswith("<think>\n")
        assert (message["reasoning_content"], message["content"]) == ("hm <tool_call> hm", "I look.")
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "time"]
        served.generator.script, served.generator.asked[:] = SCRIPT, []
        _, answer = await served.post("/v1/chat/completions", chat(tool_choice="required"))
        assert prompt_of(served.generator).endswith("</think>\n\n")
        assert "reasoning_content" not in answer["choices"][0]["message"]


async def test_several_choices_each_with_calls_of_its_own() -> None:
    async with serving() as served:
        _, answer = await served.post("/v1/chat/completions", chat(n=2))
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len({*ids}) == 4


CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Köln"}'}}
AGAIN: list[Json] = [
    {"role": "system", "content": "Be brief."},
    *HELLO,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c2", "content": "noon"},
]


@pytest.mark.parametrize("family", ["Gemma", "Llama 2", "Phi-3", None])
async def test_a_template_without_tools_gets_them_as_plain_messages(family: str | None) -> None:
    begin = AGAIN[family == "Gemma" :]
    async with serving(family=family) as served:
        _, answer = await served.post("/v1/chat/completions", chat(messages=begin))
        prompt = prompt_of(served.generator)
        assert len(answer["choices"][0]["message"]["tool_calls"]) == 2
        served.generator.asked.clear()
        await served.post("/v1/chat/completions", {"messages": begin})
        untold = prompt_of(served.generator)
    assert TOLD in prompt and '{"name": "time"}' in prompt and TOLD not in untold
    place = prompt.index(TOLD)
    assert place > prompt.index("Be brief.") if family != "Gemma" else place < prompt.index("hello")
    results = "<tool_response>\nsunny\n</tool_response>\n\n<tool_response>\nnoon\n</tool_response>"
    for text in (prompt, untold):
        assert '<tool_call>\n{"name": "weather", "arguments": {"town": "Köln"}}\n</tool_call>' in text
        assert text.index("hello") < text.index('<tool_call>\n{"name": "weather"') < text.index(results)


async def test_special_tokens_of_calls_are_told_to_whoever_reads_them() -> None:
    calls = '[TOOL_CALLS] [{"name": "time", "arguments": {}}]'
    async with serving(script_of(calls), family="Mistral 0.3") as served:
        _, answer = await served.post("/v1/chat/completions", chat())
        ((_, options),) = served.generator.asked
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "time", "arguments": "{}"} and len(call["id"]) == 9
    assert answer["choices"][0]["message"]["content"] is None
    assert options.shown_token_ids == (4,) and "<[4]>" in present(options.grammar).text


async def test_tools_are_counted_among_the_tokens_of_a_dialogue() -> None:
    async with serving() as served:
        _, more = await served.post("/v1/messages/count_tokens", BASES["/v1/messages"])
        _, fewer = await served.post("/v1/messages/count_tokens", {"messages": HELLO})
        assert more["input_tokens"] > fewer["input_tokens"] + 20
        _, more = await served.post("/tokenize", chat())
        _, fewer = await served.post("/tokenize", {"messages": HELLO})
        assert more["count"] > fewer["count"] + 20
