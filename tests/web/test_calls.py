"""Calls of tools, drawn under their grammar from logits as wild as can be: each is what its tool's schema asks for."""

import contextlib
import itertools
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.core.rows import Before
from flowspec_edge.core.speculation.verify import Sampler, noise_of
from flowspec_edge.engine.grammar import GrammarConstraint, Grammars
from flowspec_edge.engine.text_stream import TextStream
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import FieldError
from flowspec_edge.web.call_form import PLAIN_CALLS, PYTHON_TAG, CallForm
from flowspec_edge.web.call_grammar import CallableTool, special_tokens_of, write_call_grammar
from flowspec_edge.web.content_rule import content_rules
from flowspec_edge.web.message_split import CallPart, MessageSplit, Said
from tests.web.test_call_form import FORMS

END = 0
MARKS = ("[TOOL_CALLS]", PYTHON_TAG, "[ARGS]")
WEATHER = CallableTool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "town": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["°C", "°F", None]},
        },
        "required": ["town", "days"],
        "additionalProperties": False,
    },
)
LAMPS = CallableTool(
    "lamps.set-all",
    {
        "type": "object",
        "properties": {
            "lamps": {
                "type": "array",
                "minItems": 1,
                "maxItems": 2,
                "items": {
                    "type": "object",
                    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,5}$"}, "on": {"type": "boolean"}},
                    "required": ["name", "on"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["lamps"],
        "additionalProperties": False,
    },
)
STOP = CallableTool("stop", {"type": "object", "properties": {}, "additionalProperties": False})
TOOLS = [WEATHER, LAMPS, STOP]
SCHEMAS = {tool.name: tool.parameters for tool in TOOLS}
KINDS = {
    "plain": PLAIN_CALLS,
    "with names between special tokens": CallForm("[TOOL_CALLS]", "[ARGS]", "", between="[TOOL_CALLS]"),
    **FORMS,
}


class Model:
    """The demo model's tokenizer with the special tokens of other families, and what draws without knowing anything."""

    def __init__(self, folder: Path) -> None:
        content = json.loads((DEMO_BUNDLE / "tokenizer.json").read_text(encoding="utf-8"))
        first = Tokenizer(DEMO_BUNDLE / "tokenizer.json").texts.num_ids
        self.special = {mark: first + at for at, mark in enumerate(MARKS)}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"] += [
            {"id": token, "content": mark, "special": True, **flags} for mark, token in self.special.items()
        ]
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(content), encoding="utf-8")
        self.tokenizer = Tokenizer(path)
        self.vocab_size = first + len(MARKS)
        self.noise = noise_of(self.vocab_size)
        self.grammars = Grammars(self.tokenizer, self.vocab_size, [END])

    def constraint(self, form: CallForm, tools: Sequence[CallableTool] = TOOLS, **options: Any) -> GrammarConstraint:
        defaults = {"is_forced": True, "is_parallel": True, "is_reasoning": False}
        return self.grammars.compile(write_call_grammar(form, tools, self.special, **{**defaults, **options}))

    def tokens(self, text: str) -> list[int]:
        """Those of a text that has been written."""
        found: list[int] = []
        for mark, token in self.special.items():
            if mark in text:
                before, _, behind = text.partition(mark)
                return [*self.tokens(before), token, *self.tokens(behind)]
        return found + self.tokenizer.encode_within(text)

    def draw(self, constraint: GrammarConstraint, seed: int, begun: str = "", length: int = 400) -> list[int]:
        """A text that goes on with what has ``begun``."""
        options = GenerateOptions(temperature=1.0, seed=seed, grammar=Grammar("lark", ""))
        sampler = Sampler(options, self.noise, constraint)
        rng, tokens = np.random.default_rng(seed), self.tokens(begun)
        while len(tokens) < length and tokens[-1:] != [END]:
            logits = (rng.standard_normal(self.vocab_size) * 3).astype(np.float32)
            tokens.append(sampler.draw(logits, len(tokens), Before(np.array(tokens, np.int64), 0)))
        return tokens

    def allows(self, constraint: GrammarConstraint, text: str) -> bool:
        """Whether a message may be this text, and end there."""
        tokens = [*self.tokens(text), END]
        return all(constraint.allowed(np.array(tokens[:at], np.int64))[token] for at, token in enumerate(tokens))

    def read(self, form: CallForm, tokens: Sequence[int], seed: int, **options: bool) -> Said:
        """What comes of a message that is written in pieces: all that was said, and each call in one part."""
        stream = TextStream(self.tokenizer, shown=special_tokens_of(form, self.special))
        rng, pieces, left = random.Random(seed), list[str](), list(tokens)
        while left:
            num = rng.randint(1, 6)
            pieces.append(stream.feed(tuple(left[:num])))
            left = left[num:]
        return read([*pieces, stream.finish()], form, **options)


def read(pieces: Sequence[str], form: CallForm, **options: bool) -> Said:
    split = MessageSplit(calls=form, **options)
    said = [split.feed(piece, is_last=at == len(pieces) - 1) for at, piece in enumerate(pieces)]
    calls: dict[int, CallPart] = {}
    for part in itertools.chain.from_iterable(one.calls for one in said):
        assert part.is_first is (part.number not in calls)
        assert part.is_first or not calls[part.number].is_whole
        calls[part.number] = calls[part.number].joined(part) if part.number in calls else part
    assert (split.finish_reason("stop") == "tool_calls") is (
        bool(calls) and all(one.is_whole for one in calls.values())
    )
    assert list(calls) == [*range(len(calls))]
    return Said("".join(one.reasoning for one in said), "".join(one.content for one in said), tuple(calls.values()))


def check(calls: Sequence[CallPart]) -> None:
    for call in calls:
        assert call.is_whole
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("tokenizer"))


def test_two_hundred_calls_are_what_their_schemas_ask_for(model: Model) -> None:
    """In every form that is known, forced and begun in the midst of a text, one and several in a message."""
    num_calls, names, seed = 0, set[str](), 0
    kinds = list(KINDS.values())
    while num_calls < 200:
        form, is_forced = kinds[seed % len(kinds)], seed % 2 == 0
        begun = "" if is_forced else f"{'Wait. ' if form.mark else ''}{form.mark or form.begin}"
        tokens = model.draw(model.constraint(form, is_forced=is_forced), seed, begun)
        assert tokens[-1] == END, "the schemas leave no room for more"
        said = model.read(form, tokens, seed)
        assert said.content == ("" if is_forced or not form.mark else "Wait.")
        check(said.calls)
        num_calls += len(said.calls)
        names |= {call.name for call in said.calls}
        seed += 1
    assert names == set(SCHEMAS), "all tools are called"
    assert seed < 200, "some messages have several calls"


CALL = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
HERMES = {
    "hello": True,
    "": True,
    "a <tool_cal and so on": True,
    f"hello\n{CALL}": True,
    f"{CALL}\n{CALL}": True,
    f"{CALL} and so on": False,
    "hello <tool_call> and so on": False,
    '<tool_call>\n{"name": "start", "arguments": {}}\n</tool_call>': False,
    '<tool_call>\n{"name": "stop", "arguments": {"a": 1}}\n</tool_call>': False,
    "<think>\nA <tool_call> it is\n</think>\n\nhello": True,
    f"<think>\nA <tool_call> it is\n</think>\n\n{CALL}": True,
    f"\n <think>\n{CALL}": True,
    "<think>\nhm\n</think>\n\n<tool_call> and so on": False,
    "hm <think> <tool_call> and so on": False,
}


@pytest.mark.parametrize("text", HERMES)
def test_any_text_may_come_and_behind_a_mark_only_a_call(model: Model, text: str) -> None:
    assert model.allows(model.constraint(PLAIN_CALLS, is_forced=False), text) is HERMES[text]


def test_within_reasoning_that_the_prompt_began_nothing_is_a_call(model: Model) -> None:
    constraint = model.constraint(PLAIN_CALLS, is_forced=False, is_reasoning=True)
    for text, may_come in (
        ("hm", True),
        ("hm <tool_call> hm", True),
        ("hm <tool_call> hm</think>\n\nhello", True),
        (f"hm <tool_call> hm</think>\n\n{CALL}", True),
        ("hm</think>\n\n<tool_call> hm", False),
    ):
        assert model.allows(constraint, text) is may_come, text


LLAMA_CALL = '{"name": "stop", "parameters": {}}'
LLAMA = {
    "hello": True,
    LLAMA_CALL: True,
    f"\n{LLAMA_CALL}": True,
    f"{PYTHON_TAG}{LLAMA_CALL}": True,
    f"{PYTHON_TAG}print(1)": False,
    '{"name": "Bonn"}': False,
    '{"names": ["Bonn"]}': True,
    f"hello {LLAMA_CALL}": True,
    f"{LLAMA_CALL}{LLAMA_CALL}": False,
    f"<think>hm</think>\n\n{LLAMA_CALL}": True,
    '<think>hm</think>\n\n{"name": "Bonn"}': False,
}


@pytest.mark.parametrize("text", LLAMA)
def test_where_calls_have_no_mark_they_begin_with_the_message(model: Model, text: str) -> None:
    form = FORMS["Llama 3.1"]
    assert model.allows(model.constraint(form, is_forced=False), text) is LLAMA[text]
    if LLAMA[text]:
        said = read([*text], form)
        assert bool(said.calls) is ("{" in text and not text.startswith(("hello", '{"names')))
        assert said.calls or said.content == text


def test_forced_calls_are_of_the_tools_that_may_be_called_and_as_many(model: Model) -> None:
    one = model.constraint(PLAIN_CALLS, [STOP], is_parallel=False)
    assert model.allows(one, CALL)
    for text in ("hello", f"{CALL}\n{CALL}", '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'):
        assert not model.allows(one, text), text
    assert model.allows(model.constraint(PLAIN_CALLS, [STOP]), f"{CALL}\n{CALL}")
    assert model.allows(model.constraint(FORMS["Llama 3.1"], [STOP]), f"{PYTHON_TAG}{LLAMA_CALL}")


def test_ids_that_a_model_writes_are_left_out(model: Model) -> None:
    form = FORMS["Mistral 0.3"]
    text = '[TOOL_CALLS] [{"name": "stop", "arguments": {}, "id": "a1B2c3D4e"}, {"name": "stop", "arguments": {}}]'
    assert model.allows(model.constraint(form), text)
    said = model.read(form, [*model.tokens(text), END], 0)
    assert [(call.name, call.arguments) for call in said.calls] == [("stop", "{}")] * 2
    assert all(len(call.id) == 9 and call.id != "a1B2c3D4e" for call in said.calls)


def test_a_call_that_is_cut_off_is_told_up_to_there_and_never_as_a_whole_one() -> None:
    text = f"Hi \n{CALL}".replace("{}", '{"a": {"b": "}\\"{"}}')
    for end in range(len(text) + 1):
        said = read([*text[:end], ""], PLAIN_CALLS)
        assert "Hi \n".startswith(said.content) or "<tool_call>".startswith(said.content[4:])
        if said.calls:
            assert said.content == "Hi" and '{"a": {"b": "}\\"{"}}'.startswith(said.calls[0].arguments)
            assert said.calls[0].is_whole is (said.calls[0].arguments[-2:] == "}}")


def test_what_is_said_comes_at_once_but_what_may_be_a_mark() -> None:
    split = MessageSplit(calls=PLAIN_CALLS)
    told = [split.feed(piece).content for piece in ("One ", "<", "two>", "\n\n<tool", "_call> ")]
    assert told == ["One", "", " <two>", "", ""]


def test_names_and_schemas_stand_in_the_grammar_as_they_are(model: Model) -> None:
    odd = CallableTool("a.b-c_1", {"type": "object", "properties": {'"/\\\n[TOOL_CALLS]<[1]>': {"const": "\\/é🙂"}}})
    odd.parameters["required"] = list(odd.parameters["properties"])
    odd.parameters["additionalProperties"] = False
    for form in KINDS.values():
        tokens = model.draw(model.constraint(form, [odd], is_parallel=False), 1)
        (call,) = model.read(form, tokens, 1).calls
        jsonschema.validate(json.loads(call.arguments), odd.parameters)
        assert call.name == odd.name and call.is_whole


REPLY = {
    "type": "object",
    "properties": {"reply": {"type": "string", "maxLength": 8}, "name": {"enum": ["<tool_call>", "[TOOL_CALLS]"]}},
    "required": ["reply", "name"],
    "additionalProperties": False,
}
CONTENTS = {
    "json": Grammar("json", json.dumps(REPLY)),
    "regex": Grammar("regex", r"(.|\n){0,99}[a-f]{2}/\.\\"),
    "choice": Grammar("choice", json.dumps(["yes", "a <tool_call>", '"no"', *(form.begin for form in KINDS.values())])),
}


def fits(content: str, asked: Grammar) -> bool:
    match asked.kind:
        case "json":
            jsonschema.validate(json.loads(content), REPLY)
            return True
        case "regex":
            return re.fullmatch(asked.text, content) is not None
    return content in json.loads(asked.text)[:3]  # what begins as calls do is none


@pytest.mark.parametrize("kind", ["plain", "with names between special tokens", "Llama 3.1", "Mistral 0.3"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_message_is_a_call_or_what_it_is_asked_to_be(model: Model, kind: str, content: str) -> None:
    form, asked = KINDS[kind], CONTENTS[content]
    constraint = model.constraint(form, is_forced=False, content=asked)
    thought = "<think>\n{<tool_call>[\n</think>\n\n"
    for seed, (begun, is_call) in enumerate(((form.begin, True), (thought + form.begin, True), (thought, False))):
        tokens = model.draw(constraint, seed, begun)
        said = model.read(form, tokens, seed, is_either=True)
        assert tokens[-1] == END and bool(said.reasoning) is begun.startswith(thought)
        check(said.calls)
        assert not said.content if said.calls else not is_call and fits(said.content, asked)


def test_what_a_message_may_not_be_beside_tools(model: Model) -> None:
    constraint = model.constraint(PLAIN_CALLS, is_forced=False, content=CONTENTS["regex"])
    for text, may_come in (
        ("ab/.\\", True),
        ("<tool/ab/.\\", True),
        ("ab//\\", False),
        (' <tool_call>\n{"name": "/ab/.\\', False),
        ("<think> ab/.\\", False),
        ("<think></think>ab/.\\", True),
        (CALL, True),
        (f"ab/.\\ {CALL}", False),
    ):
        assert model.allows(constraint, text) is may_come, text


def test_within_reasoning_that_the_prompt_began_nothing_is_what_is_asked_for(model: Model) -> None:
    constraint = model.constraint(PLAIN_CALLS, is_forced=False, is_reasoning=True, content=CONTENTS["choice"])
    for text in ("yes</think>\n\nyes", f"hm </think>{CALL}", "</think>a <tool_call>"):
        assert model.allows(constraint, text), text
    for text in ("yes", CALL, "hm</think>yes</think>yes", "</think>\n<tool_call>"):
        assert not model.allows(constraint, text), text


def object_of(*required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"town": {}, "name": {}}, "required": [*required], **more}


TOLD_APART: list[tuple[str, Grammar, bool]] = [
    ("Llama 3.1", Grammar("json", json.dumps(object_of("town"))), True),
    ("Llama 3.1", Grammar("json", json.dumps(object_of("name"))), False),
    ("Llama 3.1", Grammar("json", json.dumps(object_of("town", properties={}))), False),
    ("Llama 3.1", Grammar("json", json.dumps(object_of("name", properties={"name": {}}))), False),
    ("Llama 3.1", Grammar("json", json.dumps(object_of("town", anyOf=[{}]))), False),
    ("Llama 3.1", Grammar("json", '{"type": "object"}'), False),
    ("Llama 3.1", Grammar("json", '{"type": "array"}'), True),
    ("Llama 3.1", Grammar("json", "{}"), False),
    ("Llama 3.1", Grammar("regex", ".*"), True),
    ("Llama 3.1", Grammar("lark", 'start: "a"'), False),
    ("Mistral 0.3", Grammar("json", "{}"), True),
    ("Qwen 3", Grammar("json", '{"type": "object"}'), True),
    ("Qwen 3", Grammar("lark", 'start: "a"'), False),
]


@pytest.mark.parametrize(("family", "content", "is_told_apart"), TOLD_APART)
def test_where_calls_cannot_be_told_from_what_is_asked_for(family: str, content: Grammar, is_told_apart: bool) -> None:
    with contextlib.nullcontext() if is_told_apart else pytest.raises(FieldError, match="cannot be told from"):
        content_rules(FORMS[family], content)


def test_schemas_are_followed_in_the_order_in_which_calls_are_told_from_them(model: Model) -> None:
    """What is refused where calls begin as JSON does relies on that: the first property comes first, if it must."""
    text = '{"name": 1, "town": 2}'
    for required, may_come in ((["town"], False), (["name"], True), ([], True)):
        content = Grammar("json", json.dumps(object_of(*required)))
        assert model.allows(model.constraint(PLAIN_CALLS, is_forced=False, content=content), text) is False
        assert model.allows(model.constraint(PLAIN_CALLS, is_forced=False, content=content), '{"name": 1}') is may_come


def test_special_tokens_are_told_where_calls_have_them() -> None:
    special: dict[str, Any] = {"[TOOL_CALLS]": 5, PYTHON_TAG: 6, "[ARGS]": 7}
    assert special_tokens_of(FORMS["Mistral 0.3"], special) == (5,)
    assert special_tokens_of(FORMS["Llama 3.1"], special) == (6,)
    assert special_tokens_of(KINDS["with names between special tokens"], special) == (5, 7)
    assert special_tokens_of(PLAIN_CALLS, special) == ()
