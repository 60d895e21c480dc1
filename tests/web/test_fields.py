"""Bodies become fields; what is wrong with them is said in the caller's words."""

import contextlib
import gc
import json
import logging
import time

import msgspec
import pytest

from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.core.asked_text import AskedText
from flowspec_edge.errors import FieldError, RequestError
from flowspec_edge.web.chat import ChatFields
from flowspec_edge.web.completions import DEFAULT, CompletionFields, prompts_of
from flowspec_edge.web.fields import NEUTRAL, Json, parse_fields, whole
from flowspec_edge.web.ollama import OllamaChatFields
from flowspec_edge.web.responses import ResponseFields
from flowspec_edge.web.text_fields import options_of
from flowspec_edge.web.tokens import DetokenizeFields
from tests.slowness import slowness


def parse(body: object) -> tuple[CompletionFields, list[str]]:
    return parse_fields(json.dumps(body).encode(), CompletionFields, is_strict=False)


def test_null_is_absent_and_16_0_is_16() -> None:
    absent = options_of(parse({"seed": 7})[0], DEFAULT)
    names = ("model", "max_tokens", "temperature", "top_p", "top_k", "stop", "n", "schedule", "logit_bias", "suffix")
    assert options_of(parse({**dict.fromkeys(names), "seed": 7.0})[0], DEFAULT) == absent
    assert options_of(parse({"max_tokens": 16.0, "seed": 7})[0], DEFAULT).max_new_tokens == 16
    with pytest.raises(FieldError, match=r"n is 16.5; it must be a whole number"):
        whole("n", 16.5, 1)


@pytest.mark.parametrize("name", sorted(NEUTRAL.keys() - CompletionFields.__struct_fields__))
def test_what_would_change_the_answer_is_refused_by_name_and_what_asks_for_nothing_is_not(name: str) -> None:
    for neutral in (None, *NEUTRAL[name]):
        assert parse({name: neutral}) == (CompletionFields(), [])
    with pytest.raises(FieldError, match=f"^{name} is .* not supported") as error:
        parse({name: "0.25"})
    assert (error.value.name, error.value.code) == (name, "unsupported_parameter")


def test_how_tokens_are_drawn() -> None:
    body = {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "logit_bias": {"50": -100, "7": 1.5},
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "min_tokens": 5.0,
        "seed": 7,
    }
    assert options_of(parse(body)[0], DEFAULT) == GenerateOptions(
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=1,
        frequency_penalty=-0.5,
        logit_bias=((50, -100.0), (7, 1.5)),
        stop_token_ids=(3, 4),
        ignore_eos=True,
        min_tokens=5,
        seed=7,
    )
    for name, value in (("presence_penalty", 2.5), ("min_p", -1), ("logit_bias", {"5": 101}), ("min_tokens", -1)):
        with pytest.raises(FieldError) as error:
            options_of(parse({name: value})[0], DEFAULT)
        assert error.value.name.partition(".")[0] == name


def test_true_is_no_1_and_0_0_is_0() -> None:
    assert parse({"top_logprobs": 0.0})[1] == []
    for name, value in (("top_logprobs", False), ("length_penalty", True), ("use_beam_search", 0)):
        with pytest.raises(FieldError):
            parse({name: value})


def test_unknown_fields_are_told_of_once_and_refused_where_that_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "x", "user": "me", "foo\n": {"deep": [1]}, "bar": 1}
    with caplog.at_level(logging.INFO):
        fields, warnings = parse(body)
    assert bytes(fields.prompt) == b'"x"'
    assert warnings == ["fields that are not known were passed over: foo\\x0a, bar"]
    assert [record.getMessage() for record in caplog.records] == warnings
    with pytest.raises(FieldError, match=r"^foo\\x0a is a field that is not known") as error:
        parse_fields(json.dumps(body).encode(), CompletionFields, is_strict=True)
    assert error.value.code == "unknown_parameter"


NESTED: list[tuple[type[msgspec.Struct], Json, list[str]]] = [
    (ChatFields, {"messages": [{"role": "user", "content": "x", "colour": 1}]}, ["messages[0].colour"]),
    (
        ChatFields,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "b\n": 1}]}], "c": 1},
        ["c", "messages[0].content[0].b\\x0a"],
    ),
    (
        ChatFields,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "d": 1}, "e": 1}]}]},
        ["messages[0].tool_calls[0].function.d", "messages[0].tool_calls[0].e"],
    ),
    (ChatFields, {"messages": [], "stream_options": {"f": 1}}, ["stream_options.f"]),
    (CompletionFields, {"flowspec": {"resume": {"g": 1}}}, ["flowspec.resume.g"]),
    (OllamaChatFields, {"options": {"h": 1}}, ["options.h"]),
    (ChatFields, {"messages": [{"role": "user", "content": "x", "i": None, "j": [], "refusal": "no"}], "k": None}, []),
]


@pytest.mark.parametrize(("kind", "body", "names"), NESTED)
def test_fields_within_are_looked_at_as_those_above(kind: type[msgspec.Struct], body: Json, names: list[str]) -> None:
    sent = json.dumps(body).encode()
    _, warnings = parse_fields(sent, kind, is_strict=False)
    assert warnings == ([f"fields that are not known were passed over: {', '.join(names)}"] if names else [])
    with pytest.raises(FieldError) if names else contextlib.nullcontext() as error:
        parse_fields(sent, kind, is_strict=True)
    assert error is None or error.value.name == names[0]


@pytest.mark.parametrize(
    ("kind", "body", "name", "text"),
    [
        (CompletionFields, {"flowspec": {"resume": {"token_ids": [1, "2"]}}}, "flowspec.resume.token_ids[1]", "is '2'"),
        (CompletionFields, {"max_tokens": "5"}, "max_tokens", "it must be of type int | float"),
        (CompletionFields, {"stop": "y" * 70_000}, "stop", "has 70002 bytes"),
        (CompletionFields, {"logit_bias": {"the": 1}}, "logit_bias", "it must be of type int"),
        (CompletionFields, {"logit_bias": {"5": "x"}}, "logit_bias[...]", "it must be of type float"),
    ],
)
def test_a_field_at_fault_is_named(kind: type[msgspec.Struct], body: object, name: str, text: str) -> None:
    with pytest.raises(FieldError) as error:
        parse_fields(json.dumps(body).encode(), kind, is_strict=False)
    assert error.value.name == name and text in str(error.value)


@pytest.mark.parametrize("body", [b"", b"{", b"5", b"null", b'"x"', b"{} {}", b'{"a": }', b"\xff", b'{"\xff": 1}'])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="not a JSON object|not JSON"):
        parse_fields(body, CompletionFields, is_strict=False)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "x", "foo": [{"a": place, "b": [1, 2, 3]} for place in range(60_000)]},
        {"prompt": list(range(100_000, 240_000))},
        {"prompt": "x", "stop": ["a"] * 250_000},
        {"prompt": {str(place): [] for place in range(90_000)}},
        {"prompt": [[] for place in range(1_000_000)]},
        {"prompt": [*range(200_000), "x"]},
        {f"{place:x}": 0 for place in range(400_000)},
        {"messages": [{"role": "user", "content": []}] * 90_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "", "colour": 1}]}] * 40_000},
        {"input": [{"role": "user", "content": []}] * 90_000},
        {"input": [{"type": "function_call", "call_id": "", "name": ""}] * 40_000},
        {"tokens": [*range(100_000, 240_000)]},
        {"messages": [{"role": "user", "content": "x" * 10}] * 90_000 + [5]},
        {"messages": [{"role": "user", "content": "x"}], "tools": [[]] * 1_000_000},
    ],
)
def test_a_body_of_megabytes_holds_up_the_loop_for_no_tenth_of_a_second(body: Json) -> None:
    sent = json.dumps(body, separators=(",", ":")).encode()
    assert len(sent) >= 950_000
    kinds: dict[str, type[msgspec.Struct]]
    kinds = {"messages": ChatFields, "input": ResponseFields, "tokens": DetokenizeFields}
    kind = next((kinds[name] for name in body if name in kinds), CompletionFields)
    times = []
    slow = slowness()
    gc.freeze()  # the test process has far more objects than a server, which a collection would go through
    for _ in range(3):
        began = time.thread_time()
        with contextlib.suppress(RequestError):
            fields, _ = parse_fields(sent, kind, is_strict=False)
            if isinstance(fields, CompletionFields):
                prompts_of(fields)
        times.append(time.thread_time() - began)
    gc.unfreeze()
    assert min(times) < 0.1 * max(slow, slowness())


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json", '{"type":"null"}'),
        Grammar("regex", "a+"),
        Grammar("choice", '["yes", "n\\u00e9e"]'),
        Grammar("lark", 'start: "a"'),
    ],
)
def test_the_clients_grammar_is_the_servers(grammar: Grammar) -> None:
    body = json.dumps(AskedText("x", GenerateOptions(grammar=grammar), 1, is_resumable=False).request()).encode()
    fields, _ = parse_fields(body, CompletionFields, is_strict=True)
    assert options_of(fields, GenerateOptions()).grammar == grammar
