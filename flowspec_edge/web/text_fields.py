"""The fields that all dialects have of how a text is drawn and sent."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from flowspec_edge.config import GenerateOptions
from flowspec_edge.errors import FieldError
from flowspec_edge.web.fields import UNSUPPORTED, Json, Whole, whole
from flowspec_edge.web.grammar_fields import GrammarFields, grammar_of
from flowspec_edge.web.refusals import NO_MODEL

MAX_STOPS = 4
"""OpenAI's limit."""
MAX_CHOICES = 128
"""OpenAI's limit."""
SEED_BITS = 53
"""Of a seed that is drawn: every language's JSON can tell it."""


SAME = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos"),
    "schedule",
)
"""Fields that are options of that name and need no reading."""


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None


class TextFields(GrammarFields, kw_only=True):
    """Fields as clients send them. Their absence is None, and so is null."""

    model: str | None = None
    max_tokens: Whole | None = None
    max_completion_tokens: Whole | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: Whole | None = None
    n: Whole | None = None
    best_of: Whole | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def check_model(fields: TextFields, model: str) -> None:
    """Raises FieldError where another model is asked for."""
    if fields.model is not None and fields.model != model:
        raise FieldError("model", f"{fields.model!r:.80} is not served here; this is {model}", NO_MODEL)


def options_of(fields: TextFields, default: GenerateOptions) -> GenerateOptions:
    """How to draw a text; ``default`` has what is done where a field is absent, but for the seed, which is drawn.

    Raises:
        RequestError: a field is out of range.
    """
    length = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    seed = whole("seed", fields.seed, -1)
    named, grammar = grammar_of(fields)
    try:
        return replace(
            default,
            max_new_tokens=whole(length, getattr(fields, length), default.max_new_tokens),
            top_k=whole("top_k", fields.top_k, default.top_k),
            seed=secrets.randbits(SEED_BITS) if fields.seed is None else seed,
            stop=_stops(fields.stop),
            logit_bias=tuple((fields.logit_bias or {}).items()),
            stop_token_ids=tuple(fields.stop_token_ids or ()),
            min_tokens=whole("min_tokens", fields.min_tokens, default.min_tokens),
            grammar=grammar,
            **{name: value for name in SAME if (value := getattr(fields, name)) is not None},
        )
    except FieldError as cause:
        names = {"max_new_tokens": length, "grammar": named}
        raise cause.named(names.get(cause.name, cause.name)) from None


def num_choices(fields: TextFields, num_prompts: int = 1) -> int:
    """How many texts each prompt gets.

    Raises:
        FieldError: too many or none, or some are to be thrown away.
    """
    num = _num_texts("n", whole("n", fields.n, 1), num_prompts)
    if (best_of := whole("best_of", fields.best_of, num)) != num:
        raise FieldError("best_of", f"is {best_of} and n is {num}; texts are not chosen among here", UNSUPPORTED)
    return num


def num_candidates(fields: TextFields, num_prompts: int) -> tuple[int, int]:
    """How many texts each prompt gets, and how many are written for it, of which these are the likeliest.

    Raises:
        FieldError: too many or none, or more are to be given than are written, or streamed before that is known.
    """
    num = _num_texts("n", whole("n", fields.n, 1), num_prompts)
    best_of = _num_texts("best_of", whole("best_of", fields.best_of, num), num_prompts)
    if best_of < num:
        raise FieldError("best_of", f"is {best_of} and n is {num}; no more can be given than are written")
    if best_of > num and fields.stream:
        raise FieldError("best_of", "chooses among whole texts, which cannot be streamed; leave one of both out")
    return num, best_of


def _num_texts(name: str, num: int, num_prompts: int) -> int:
    if not 1 <= num * num_prompts <= MAX_CHOICES:
        of = "" if num_prompts == 1 else f" and there are {num_prompts} prompts"
        raise FieldError(name, f"is {num}{of}; 1 to {MAX_CHOICES} texts are written for a request")
    return num


def options_of_choice(options: GenerateOptions, number: int) -> GenerateOptions:
    """Of the choices of one prompt each has a seed of its own, the next one of the one before."""
    return replace(options, seed=(options.seed + number) % 2**64)


def usage_of(statistics: Sequence[Json], num_choices: int) -> Json:
    """What OpenAI counts: the tokens of each prompt once, and those of all texts."""
    firsts = statistics[::num_choices]
    prompt = sum(choice["prompt_tokens"] for choice in firsts)
    completion = sum(choice["completion_tokens"] for choice in statistics)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choice.get("cached_tokens", 0) for choice in firsts)},
    }


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS or not all(stops):
        raise FieldError("stop", f"must be a text or a list of at most {MAX_STOPS} texts, none of them empty")
    return tuple(stops)
