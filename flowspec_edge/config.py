"""The prompt and the options of a generation, and the pieces of its answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from flowspec_edge.errors import FieldError

MAX_STOP_CHARACTERS = 1024
"""Of one stop string: a paragraph. Looking out for it takes the more time to prepare the longer it is."""
MAX_NEW_TOKENS = 2**20
"""That may be asked for. A text ends before where its model's context is full."""

MAX_TOP_LOGPROBS = 20
"""The likeliest tokens in place of each that are told of: OpenAI's limit."""
MAX_NAMED_TOKENS = 1024
"""That options may name, each by its id. Each takes a microsecond whenever a token is drawn."""

MAX_GRAMMAR_CHARACTERS = 2**16
"""Of a grammar's text: a schema of some thousand properties."""
GRAMMAR_KINDS = ("json", "regex", "choice", "lark")

RowKind = Literal["float32", "float16", "bfloat16"]
"""In which numbers hidden rows travel between boards (``core/row_kinds.py``). ``float16`` has 11 bits of precision and
values up to 65504, ``bfloat16`` 8 bits and values as large as those of float32."""
ROW_KINDS: tuple[RowKind, ...] = get_args(RowKind)

MIN_TEMPERATURE = 1e-6
"""Below it the likeliest token is drawn anyway, and logits that are divided by it overflow in the end."""


class TextPart(NamedTuple):
    """A part of a prompt. Where special tokens are not parsed, as in what people say in a chat, they are plain text."""

    text: str
    parses_special: bool = True


Text = str | Sequence[TextPart]
"""A text in which special tokens are parsed, or parts that choose."""


class Grammar(NamedTuple):
    """What a text may be, and all of it must be: by its ``kind`` a JSON schema, a regular expression, a JSON list of
    texts of which it is one, or a Lark grammar.
    """

    kind: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """Options of one generation.

    A temperature of 0 is greedy; ``top_k`` of 0, ``top_p`` of 1 and ``min_p`` of 0 keep every token. The text ends
    before the first of the strings in ``stop``, none of which is empty.

    Before that the logits change, in this order (docs/design.md, "Drawing"). ``logit_bias`` adds a number to each of
    some tokens. ``repetition_penalty`` divides the positive logits of all tokens of prompt and text by it, and
    multiplies the negative ones: 1 is off (arXiv 1909.05858). ``frequency_penalty`` is taken off as often as a token
    stands in the text, without the prompt, and ``presence_penalty`` once where it does (as OpenAI's).

    The text ends behind an end-of-sequence token, unless ``ignore_eos``, and behind any of ``stop_token_ids``. None of
    these is drawn, and no stop string ends the text, before it has ``min_tokens``. With ``num_logprobs`` pieces tell
    each token's log-probability and as many of the likeliest in its place; 0 tells its own alone, None nothing.

    With a ``grammar`` no token is drawn that it does not allow. The text ends where the grammar does; where it is cut
    before, by its length or a stop string, it is a beginning of what the grammar allows.

    Special tokens are no part of the text but for those in ``shown_token_ids``, which are told by their names.

    ``label`` is by what whoever looks at a ring's work knows the text; nothing else depends on it.
    What was computed for earlier texts of the same ``owner`` may serve this one, and that for other owners' may not.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    schedule: str = "flowspec"
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    num_logprobs: int | None = None
    grammar: Grammar | None = None
    shown_token_ids: tuple[int, ...] = ()
    label: str = ""
    owner: str = ""

    def __post_init__(self) -> None:
        _check_range("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= 10:
            raise FieldError(
                "temperature", f"is {self.temperature}; it must be 0 (greedy) or lie between {MIN_TEMPERATURE} and 10"
            )
        if self.top_k < 0:
            raise FieldError("top_k", f"is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise FieldError("top_p", f"is {self.top_p}; it must lie above 0 and at most 1 (off)")
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("seed", self.seed, 0, 2**64 - 1)
        _check_range("min_tokens", self.min_tokens, 0, MAX_NEW_TOKENS)
        if self.num_logprobs is not None:
            _check_range("num_logprobs", self.num_logprobs, 0, MAX_TOP_LOGPROBS)
        self._check_tokens()
        if self.grammar is not None:
            self._check_grammar(self.grammar)
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise FieldError(
                    "stop", f"string has {len(text)} characters; each must have 1 to {MAX_STOP_CHARACTERS}"
                )

    def _check_tokens(self) -> None:
        biased = [token for token, _ in self.logit_bias]
        if len(biased) != len({*biased}):
            raise FieldError("logit_bias", "names a token twice")
        for token, bias in self.logit_bias:
            _check_range(f"logit_bias.{token}", bias, -100, 100)
        for name, tokens in (("logit_bias", biased), ("stop_token_ids", self.stop_token_ids)):
            if len(tokens) > MAX_NAMED_TOKENS:
                raise FieldError(name, f"names {len(tokens)} tokens; it may name {MAX_NAMED_TOKENS}")

    def _check_grammar(self, grammar: Grammar) -> None:
        if grammar.kind not in GRAMMAR_KINDS:
            raise FieldError(
                "grammar", f"is of kind {grammar.kind!r:.80}; it must be one of {', '.join(GRAMMAR_KINDS)}"
            )
        if len(grammar.text) > MAX_GRAMMAR_CHARACTERS:
            raise FieldError(
                "grammar", f"has {len(grammar.text)} characters; it may have {MAX_GRAMMAR_CHARACTERS}", "too_large"
            )
        for name, is_set in (("ignore_eos", self.ignore_eos), ("min_tokens", self.min_tokens > 0)):
            if is_set:
                raise FieldError(
                    name, "is set beside a grammar or tools, which alone say where the text ends; leave it out"
                )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises FieldError where a token that is named is none of a model with so many."""
        for name, tokens in (
            ("logit_bias", [token for token, _ in self.logit_bias]),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in tokens:
                if not 0 <= token < vocab_size:
                    raise FieldError(name, f"names token {token}; the model's lie between 0 and {vocab_size - 1}")

    @property
    def looks_back(self) -> bool:
        """Whether the draw of a token depends on those before it otherwise than by the model."""
        has_penalty = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return has_penalty or self.min_tokens > 0 or self.grammar is not None

    @property
    def cuts_off(self) -> bool:
        """Whether some tokens are never drawn because they are unlikely."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def end_token_ids(self, eos_token_ids: Iterable[int]) -> frozenset[int]:
        """The tokens behind which a text ends, of a model with these end-of-sequence tokens."""
        return frozenset(self.stop_token_ids).union(() if self.ignore_eos else eos_token_ids)

    def for_drawing(self, eos_token_ids: Iterable[int]) -> GenerateOptions:
        """What matters where a token is drawn: ``stop_token_ids`` are then all that wait for ``min_tokens``."""
        ends = self.end_token_ids(eos_token_ids) if self.min_tokens else ()
        return replace(self, stop=(), stop_token_ids=tuple(sorted(ends)))


def _check_range(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most or not math.isfinite(value):
        raise FieldError(name, f"is {value}; it must lie between {least} and {most}")


class Logprob(NamedTuple):
    """A token and the natural logarithm of its probability."""

    token: int
    logprob: float


class TokenLogprobs(NamedTuple):
    """A token that was drawn, and the likeliest ones in its place, the first one first.

    The probabilities are the model's own: before penalties and biases, at temperature 1, with no token cut off.
    """

    drawn: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Of the tokens of a piece. ``offsets`` are the characters of the text before each, ``texts`` the bytes of every
    token that is named.
    """

    tokens: Sequence[TokenLogprobs]
    offsets: Sequence[int]
    texts: Mapping[int, bytes]

    @classmethod
    def joined(cls, parts: Iterable[Logprobs | None]) -> Logprobs | None:
        """Those of one piece after the other; None where none has any."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        return cls(
            tokens=[token for part in found for token in part.tokens],
            offsets=[offset for part in found for offset in part.offsets],
            texts={token: text for part in found for token, text in part.texts.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of the answer. The last piece has a finish reason and the statistics, and in ``stop`` the stop string
    that ended the text.

    A piece with a ``notice`` has no text: it says what the answer waits for. The first one with tokens tells those of
    the prompt in ``prompt_token_ids``. ``logprobs`` are there where they were asked for, as many as ``token_ids``.
    ``reasoning`` is what a model thinks before it answers in a dialogue, where that comes apart.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop: str | None = None
    statistics: dict[str, Any] | None = None
    notice: str | None = None
    prompt_token_ids: list[int] | None = None
    logprobs: Logprobs | None = None
    reasoning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedText:
    """A text to go on with, as the same bundle began it: the tokens of its prompt, and those written so far."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


Prompt = Text | Sequence[int] | UnfinishedText
"""A text, its tokens, or a text to go on with."""
