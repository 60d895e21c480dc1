"""Grammars by llguidance: which tokens a JSON schema, a regular expression, a choice or a Lark grammar allows next.

A mask follows from the bytes of the text so far and those of every token. Where a text must go on with certain bytes,
llguidance allows only the tokens that the bundle's tokenizer itself would write for them.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from flowspec_edge.config import Grammar
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import FieldError, GrammarError, plain_text

NUM_COMPILED = 16
"""Grammars that are kept at hand."""
NUM_MATCHERS = 4
"""Of one grammar: of texts that are written with it at once."""
NUM_MASKS = 256
"""Of one grammar: those of a draft tree's rows, and more. They take 19 KB each with a vocabulary of 150,000 tokens."""
MAX_ROLLBACK = 64
"""Tokens by which a matcher goes back rather than another one is made: the depth of a draft tree and more."""
JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON in one line, as Python writes it. A model that may write any white space may write it for ever."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000, max_grammar_size=200_000, max_lexer_states=50_000, verbose_errors=False
)
"""Compiling takes up to a second on a Raspberry Pi, and a grammar up to 100 MB."""
MAX_FAULT_CHARACTERS = 300
UNSUPPORTED = "unsupported_parameter"
_PRINTABLE = frozenset(range(0x20, 0x7F))


class Grammars:
    """Compiles grammars for the tokens of a bundle, and keeps the last ones. It may be used from any thread.

    ``vocab_size`` is the model's, which may have more tokens than its tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(eos_token_ids)
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Grammar, GrammarConstraint] = OrderedDict()

    def compile(self, grammar: Grammar) -> GrammarConstraint:
        """What the grammar allows. Takes up to a second where it is a new one, so it is not for the event loop.

        Raises:
            FieldError: it is none, has what is not supported, or is too large; or there is none for this bundle.
        """
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
        matcher = LLMatcher(self._tokens, _source_of(grammar), log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        constraint = GrammarConstraint(matcher, self._vocab_size, self._ends)
        try:
            constraint.allowed(np.zeros(0, np.int64))
        except GrammarError as cause:
            raise _refusal("there is no text of it, or none can be found") from cause
        with self._lock:
            self._compiled[grammar] = constraint
            while len(self._compiled) > NUM_COMPILED:
                self._compiled.popitem(last=False)
            return self._compiled[grammar]

    @cached_property
    def _tokens(self) -> LLTokenizer:
        """Made when it is first needed, which takes a second and 50 MB with a vocabulary of 150,000 tokens."""
        if not self._ends:
            raise FieldError("grammar", "cannot be followed: the bundle names no token that ends a text", UNSUPPORTED)
        try:
            wrapper: Any = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._ends))
            return LLTokenizer(wrapper, eos_token=self._ends)
        except Exception as cause:  # the library raises bare Exception
            fault = f"cannot be followed: llguidance does not take the bundle's tokenizer ({cause})"
            raise FieldError("grammar", fault, UNSUPPORTED) from cause


class GrammarConstraint:
    """One grammar, whatever texts ask for it: see :class:`Constraint`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, ends: Sequence[int]) -> None:
        self._vocab_size = vocab_size
        self.ends = frozenset(ends)
        self._lock = threading.Lock()
        self._first = matcher
        self._places: list[_Place] = []  # the one used last comes last
        self._masks: OrderedDict[bytes, bytes] = OrderedDict()

    def allowed(self, written: NDArray[np.int64]) -> NDArray[np.bool_]:
        with self._lock:
            packed = self._masks.get(key := written.tobytes())
            if packed is None:
                packed = self._mask(written)
                self._masks[key] = packed
                if len(self._masks) > NUM_MASKS:
                    self._masks.popitem(last=False)
            else:
                self._masks.move_to_end(key)
        bits = np.frombuffer(packed, np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def num_allowed(self, written: NDArray[np.int64], tokens: Sequence[int]) -> int:
        with self._lock:
            if not self.ends.isdisjoint(written.tolist()) or (place := self._place_at(written)) is None:
                return 0
            allowed = itertools.takewhile(lambda token: token not in self.ends and place.try_on(token), tokens)
            num_allowed = sum(1 for _ in allowed)
            if place.matcher.is_error():
                self._places.remove(place)
            return num_allowed

    def _mask(self, written: NDArray[np.int64]) -> bytes:
        """As llguidance gives it. What is behind the end, or no text of the grammar's, can only end."""
        mask = np.zeros(self._vocab_size, np.bool_)
        if self.ends.isdisjoint(written.tolist()) and (place := self._place_at(written)) is not None:
            packed = np.frombuffer(place.matcher.compute_bitmask(), np.uint8)
            if place.matcher.is_error():
                self._places.remove(place)
                fault = _plain(place.matcher.get_error())
                raise GrammarError(f"the text cannot go on as its grammar asks, which became too complex: {fault}")
            bits = np.unpackbits(packed, bitorder="little")[: self._vocab_size]
            mask[: len(bits)] = bits
        if not mask.any():
            mask[list(self.ends)] = True
        return np.packbits(mask, bitorder="little").tobytes()

    def _place_at(self, written: NDArray[np.int64]) -> _Place | None:
        """A matcher that has taken just this text; None where the grammar does not allow it."""
        shared = [(_num_shared(place.tokens, written), number) for number, place in enumerate(self._places)]
        num_shared, number = max(shared, default=(0, 0))
        num_back = len(self._places[number].tokens) - num_shared if shared else 0
        is_far = num_back > MAX_ROLLBACK and len(shared) < NUM_MATCHERS
        place = self._places.pop(number) if shared and not is_far else None
        if place is None or not place.go_back(num_back):
            place = _Place(self._first.deep_copy(), written[:0])
        if not place.go_on(written):
            return None
        self._places.append(place)
        return place


@dataclass(slots=True)
class _Place:
    """A matcher, and the tokens that it has taken."""

    matcher: LLMatcher
    tokens: NDArray[np.int64]

    def go_back(self, num_tokens: int) -> bool:
        """Whether that can be done; where it cannot, the matcher is of no use any more."""
        if num_tokens and not self.matcher.rollback(num_tokens):
            return False
        self.tokens = self.tokens[: len(self.tokens) - num_tokens]
        return True

    def go_on(self, written: NDArray[np.int64]) -> bool:
        """Whether the grammar allows ``written``; where it does not, the matcher is of no use any more."""
        new = written[len(self.tokens) :].tolist()
        self.tokens = written
        return not new or self.matcher.consume_tokens(new)

    def try_on(self, token: int) -> bool:
        """Whether the grammar allows the token, and no other one for the same bytes. Only then it is taken."""
        forced = self.matcher.compute_ff_tokens()
        if (forced and forced[0] != token) or not self.matcher.try_consume_tokens([token]):
            return False
        self.tokens = np.append(self.tokens, token)
        return True


class _Vocabulary:
    """A tokenizer as llguidance wants to see it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        texts = [tokenizer.texts[token] for token in range(vocab_size)]
        self.special_token_ids = [token for token, text in enumerate(texts) if not text or token in ends]
        for token in self.special_token_ids:
            texts[token] = tokenizer.bytes_of(token) or b"<token %d>" % token
        self.tokens = texts
        self.eos_token_id = ends[0]
        self._tokenizer = tokenizer
        self._of_bytes = {text[0]: token for token, text in enumerate(texts) if len(text) == 1}
        if not self._of_bytes.keys() >= _PRINTABLE:
            raise ValueError("it does not have a token for each printable character of ASCII")

    def __call__(self, text: bytes) -> list[int]:
        """The tokens that stand for a text: its bytes' where the tokenizer would change it, up to one that has none."""
        tokens = self._tokenizer.encode_within(text.decode())
        if b"".join(map(self.tokens.__getitem__, tokens)) == text:
            return tokens
        return [self._of_bytes[byte] for byte in itertools.takewhile(self._of_bytes.__contains__, text)]


def _source_of(grammar: Grammar) -> str:
    """The grammar as llguidance reads it."""
    match grammar.kind:
        case "json":
            try:
                return LLMatcher.grammar_from_json_schema(grammar.text, defaults=JSON_FORM)  # type: ignore[arg-type]
            except ValueError as cause:
                raise _refusal(str(cause)) from cause
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            texts = json.loads(grammar.text)
            return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))
        case _:
            return LLMatcher.grammar_from_lark(grammar.text)


def _refusal(fault: str) -> FieldError:
    return FieldError("grammar", f"cannot be followed: {_plain(fault)}", "invalid_grammar")


def _plain(fault: str) -> str:
    first = fault.strip().partition("\n")[0]
    return plain_text(first[:MAX_FAULT_CHARACTERS])


def _num_shared(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """How many tokens both texts begin with."""
    num = min(len(first), len(second))
    differing = np.flatnonzero(first[:num] != second[:num])
    return int(differing[0]) if len(differing) else num
