"""The prompt and the options of a generation, and the pieces of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flowspec_edge.errors import FieldError

MAX_STOP_CHARACTERS = 1024
"""Of one stop string: a paragraph. Looking out for it takes the more time to prepare the longer it is."""
MAX_NEW_TOKENS = 2**20
"""That may be asked for. A text ends before where its model's context is full."""

MIN_TEMPERATURE = 1e-6
"""Below it the likeliest token is drawn anyway, and logits that are divided by it overflow in the end."""


class TextPart(NamedTuple):
    """A part of a prompt. Where special tokens are not parsed, as in what people say in a chat, they are plain text."""

    text: str
    parses_special: bool = True


Text = str | Sequence[TextPart]
"""A text in which special tokens are parsed, or parts that choose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """Options of one generation.

    A temperature of 0 is greedy; ``top_k`` of 0 and ``top_p`` of 1 keep every token. The text ends before the first of
    the strings in ``stop``, none of which is empty.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    schedule: str = "flowspec"
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            raise FieldError("max_new_tokens", f"is {self.max_new_tokens}; it must lie between 1 and {MAX_NEW_TOKENS}")
        if self.temperature != 0 and not MIN_TEMPERATURE <= self.temperature <= 10:
            raise FieldError(
                "temperature", f"is {self.temperature}; it must be 0 (greedy) or lie between {MIN_TEMPERATURE} and 10"
            )
        if self.top_k < 0:
            raise FieldError("top_k", f"is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise FieldError("top_p", f"is {self.top_p}; it must lie above 0 and at most 1 (off)")
        if not 0 <= self.seed < 2**64:
            raise FieldError("seed", f"is {self.seed}; it must lie between 0 and {2**64 - 1}")
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise FieldError(
                    "stop", f"string has {len(text)} characters; each must have 1 to {MAX_STOP_CHARACTERS}"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of the answer. The last piece has a finish reason and the statistics.

    A piece with a ``notice`` has no text: it says what the answer waits for. The first one with tokens tells those of
    the prompt in ``prompt_token_ids``.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    statistics: dict[str, Any] | None = None
    notice: str | None = None
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnfinishedText:
    """A text to go on with, as the same bundle began it: the tokens of its prompt, and those written so far."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


Prompt = Text | Sequence[int] | UnfinishedText
"""A text, its tokens, or a text to go on with."""
