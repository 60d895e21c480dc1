"""Texts drawn under grammars, from logits as wild as can be: what ends is valid, with every kind of tokenizer."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.core.rows import Before
from flowspec_edge.core.speculation.constraint import forced_behind
from flowspec_edge.core.speculation.verify import Sampler, noise_of
from flowspec_edge.engine.grammar import GrammarConstraint, Grammars
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import FieldError, GrammarError
from tests.tokenizer_kinds import KINDS, open_changed

TOKENIZER = Tokenizer(DEMO_BUNDLE / "tokenizer.json")
NUM_PADDED = 37
"""Tokens that the model has beyond its tokenizer's."""
VOCAB = TOKENIZER.texts.num_ids + NUM_PADDED
END = 0
GRAMMARS = Grammars(TOKENIZER, VOCAB, [END])
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "età": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "gr\u00fcn", 'a"b']}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "età", "tags"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"type": "array", "items": {"type": "number"}, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"type": "boolean"}, {"const": {"kind": "none", "of": [1, 2]}}]},
    {
        "$defs": {
            "node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}
        },
        "$ref": "#/$defs/node",
    },
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    {"type": "string", "format": "date"},
]


def constraint_of(kind: str, text: str) -> GrammarConstraint:
    GRAMMARS._compiled.clear()  # no text was written with this one
    return GRAMMARS.compile(Grammar(kind, text))


def drawn(constraint: GrammarConstraint, seed: int, vocab_size: int, end: int, length: int = 120) -> list[int]:
    """A text drawn from logits that know nothing, with closing brackets and quotes likelier than others."""
    options = GenerateOptions(temperature=1.0, seed=seed, grammar=Grammar("json", ""))
    sampler = Sampler(options, noise_of(vocab_size), constraint)
    rng, tokens = np.random.default_rng(seed), list[int]()
    while len(tokens) < length and tokens[-1:] != [end]:
        logits = (rng.standard_normal(vocab_size) * 3).astype(np.float32)
        tokens.append(sampler.draw(logits, len(tokens), Before(np.array(tokens, np.int64), 0)))
    return tokens


def test_two_hundred_texts_are_what_their_schemas_ask_for() -> None:
    num_ended = 0
    for seed in range(200):
        schema = SCHEMAS[seed % len(SCHEMAS)]
        tokens = drawn(GRAMMARS.compile(Grammar("json", json.dumps(schema))), seed, VOCAB, END)
        if tokens[-1] == END:
            num_ended += 1
            jsonschema.validate(json.loads(TOKENIZER.decode(tokens)), schema)
    assert num_ended > 150


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_can_follow_a_schema(tmp_path: Path, kind: str) -> None:
    tokenizer = open_changed(tmp_path, kind)
    vocab_size, end = (
        tokenizer.texts.num_ids + 3,
        next(token for token in range(tokenizer.texts.num_ids) if not tokenizer.texts[token]),
    )
    constraint = Grammars(tokenizer, vocab_size, [end]).compile(Grammar("json", json.dumps(PERSON)))
    begun = forced_behind(np.zeros(0, np.int64), constraint)
    assert begun and '{"name": "'.startswith(text := tokenizer.decode(begun)) and len(text) > 6
    assert list(begun) == tokenizer.encode_within('{"name": "')[: len(begun)], "the tokens that it would write itself"
    for seed in range(12):
        tokens = drawn(constraint, seed, vocab_size, end)
        if tokens[-1] == end:
            jsonschema.validate(json.loads(tokenizer.decode(tokens)), PERSON)


@pytest.mark.parametrize(
    ("kind", "text", "rule"),
    [
        ("regex", r"[a-c]{2,4}(\.[0-9]+)?", r"[a-c]{2,4}(\.[0-9]+)?"),
        ("choice", json.dumps(["yes", "no", 'née "x" \\ /a/i\n']), r'yes|no|née "x" \\ /a/i\n'),
        ("lark", 'start: "(" inner ")"\ninner: /[0-9]/ | start', r"\(+[0-9]\)+"),
    ],
)
def test_other_grammars(kind: str, text: str, rule: str) -> None:
    constraint, found = constraint_of(kind, text), set()
    for seed in range(30):
        tokens = drawn(constraint, seed, VOCAB, END)
        if tokens[-1] == END:
            found.add(TOKENIZER.decode(tokens))
    assert len(found) > 1
    for one in found:
        assert re.fullmatch(rule, one)


def texts_in_any_order(seed: int) -> Iterator[list[int]]:
    """Beginnings of three texts, of drafts beside them, and of what no grammar allows, forth and back."""
    rng = np.random.default_rng(seed)
    constraint = constraint_of("json", json.dumps(PERSON))
    texts = [drawn(constraint, number, VOCAB, END, 60) for number in range(3)]
    for _ in range(150):
        text = texts[rng.integers(3)]
        text = text[: rng.integers(len(text) + 1)]
        yield [*text, *rng.integers(0, VOCAB, rng.integers(2)).tolist()]


def test_chains_may_come_as_far_as_each_of_their_tokens_may() -> None:
    """Right ones and beyond their end, with a wrong token in the midst, and in other tokens for the same text."""
    rng, lengths = np.random.default_rng(1), list[int]()
    for seed in range(12):
        schema = json.dumps(SCHEMAS[seed % 3])
        text = drawn(constraint_of("json", schema), seed, VOCAB, END, 40)
        first = int(rng.integers(len(text)))
        chain = [*text[first:], *text[:3]]
        at = int(rng.integers(len(chain)))
        letters = [token for letter in TOKENIZER.decode(chain[at:]) for token in TOKENIZER.encode_within(letter)]
        for tokens in (chain, [*chain[:at], int(rng.integers(VOCAB)), *chain[at:]], [*chain[:at], *letters]):
            constraint = constraint_of("json", schema)
            lengths.append(constraint.num_allowed(np.array(text[:first], np.int64), tokens))
            allowed = (constraint.allowed(np.array([*text[:first], *tokens[:at]])) for at in range(len(tokens)))
            refused = (at for at, token in enumerate(tokens) if not next(allowed)[token] or token == END)
            assert lengths[-1] == next(refused, len(tokens)), (seed, tokens)
    assert len(set(lengths)) > 6


def test_what_is_allowed_follows_from_the_tokens_alone() -> None:
    used = constraint_of("json", json.dumps(PERSON))
    for text in texts_in_any_order(1):
        written = np.array(text, np.int64)
        fresh = constraint_of("json", json.dumps(PERSON))
        np.testing.assert_array_equal(used.allowed(written), fresh.allowed(written))
        used._masks.clear()


def test_a_text_ends_where_its_grammar_does_and_a_stranger_at_once() -> None:
    constraint = constraint_of("choice", '["yes", "no"]')
    first = constraint.allowed(np.zeros(0, np.int64))
    assert not first[END] and not first[-NUM_PADDED:].any()
    for text in ("yes", "maybe"):
        written = np.array(TOKENIZER.encode(text), np.int64)
        assert np.flatnonzero(constraint.allowed(written)).tolist() == [END]
        assert forced_behind(written, constraint) == ()


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("json", '{"type":', "EOF while parsing"),
        ("json", '{"type": "nope"}', "Invalid type: nope"),
        ("json", '{"not": {"type": "string"}}', 'Unimplemented keys: ["not"]'),
        ("json", '{"$ref": "http://example.com/schema"}', "Default retriever does not fetch resources"),
        ("json", '{"allOf":[' * 2000, "recursion limit"),
        ("json", '{"$ref": "#"}', "there is no text of it"),
        ("regex", "(a", "invalid regex"),
        ("regex", "(?=a)b", "invalid regex"),
        ("lark", "start: other", "unknown name"),
        ("lark", 'start: start "a"', "there is no text of it"),
        ("lark", "", "Empty grammar"),
    ],
)
def test_what_is_no_grammar_is_refused(kind: str, text: str, fault: str) -> None:
    with pytest.raises(FieldError, match=re.escape(fault)) as error:
        constraint_of(kind, text)
    assert (error.value.name, error.value.code) == ("grammar", "invalid_grammar")


def test_bundles_that_cannot_follow_a_grammar_say_why(tmp_path: Path) -> None:
    grammar = Grammar("choice", '["a"]')
    with pytest.raises(FieldError, match="names no token that ends a text"):
        Grammars(TOKENIZER, VOCAB, []).compile(grammar)
    byteless = open_changed(tmp_path, "bytes, as the demo model", lambda content: content["model"]["vocab"].pop("Z"))
    with pytest.raises(FieldError, match="does not have a token for each printable"):
        Grammars(byteless, VOCAB, [END]).compile(grammar)


def test_where_a_model_has_no_token_for_a_byte_texts_without_it_can_be_had(tmp_path: Path) -> None:
    """As the tokenizer of SmolLM 2, which lacks some control characters, and bytes that no UTF-8 has."""
    lacking = open_changed(
        tmp_path, "bytes, as the demo model", lambda content: [content["model"]["vocab"].pop(text) for text in "ĀĄ"]
    )
    grammars = Grammars(lacking, VOCAB, [END])
    tokens = drawn(grammars.compile(Grammar("json", json.dumps(PERSON))), 3, VOCAB, END)
    jsonschema.validate(json.loads(lacking.decode(tokens)), PERSON)
    with pytest.raises(FieldError, match="there is no text of it"):
        grammars.compile(Grammar("regex", r"\x04a"))
    constraint = grammars.compile(Grammar("regex", r"a\x04b"))
    with pytest.raises(GrammarError, match="cannot go on as its grammar asks"):
        constraint.allowed(np.array(lacking.encode("a"), np.int64))


def test_grammars_are_kept() -> None:
    grammars = Grammars(TOKENIZER, VOCAB, [END])
    first = grammars.compile(Grammar("choice", '["a"]'))
    assert grammars.compile(Grammar("choice", '["a"]')) is first
    for number in range(16):
        grammars.compile(Grammar("choice", f'["{number}"]'))
    assert grammars.compile(Grammar("choice", '["a"]')) is not first
