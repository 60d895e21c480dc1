"""What every dialect of the API makes of a request: texts to write side by side, and the form of their answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from flowspec_edge.config import GenerateOptions, Logprobs, Piece, Prompt
from flowspec_edge.errors import FieldError
from flowspec_edge.web.error_forms import openai_error
from flowspec_edge.web.framing import DATA_EVENTS, Framing, Json
from flowspec_edge.web.refusals import Refusal

_LINE = re.compile(r"\bat (\d+)\(")
"""How llguidance names the line of a Lark grammar that is at fault."""


class TextGenerator(Protocol):
    """What the API serves.

    ``generate`` raises RequestError where the request is at fault, and another FlowspecError where the server is.
    """

    @property
    def model(self) -> str: ...

    @property
    def bundle(self) -> str: ...

    def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]: ...


@dataclass(frozen=True, slots=True)
class AskedText:
    """One text to write: a choice of the answer.

    ``grammar_field`` is what the caller calls its grammar, and ``grammar_lines`` what each of its first lines, where
    it was made of several fields.
    """

    prompt: Prompt
    options: GenerateOptions
    grammar_field: str = "grammar"
    grammar_lines: Sequence[str] = ()

    def in_callers_words(self, cause: FieldError) -> FieldError:
        """A fault of the grammar, which only a ring can read."""
        found = _LINE.search(cause.fault)
        line = 0 if found is None else int(found[1])
        return cause.named(self.grammar_lines[line - 1] if 1 <= line <= len(self.grammar_lines) else self.grammar_field)


class AnswerForm(Protocol):
    """Gives an answer the form of its dialect."""

    def events(self, choice: int, piece: Piece) -> list[Json]:
        """The events of a stream that tell of a piece without a notice."""

    def last_events(self) -> list[Json]:
        """The events behind the last piece of all choices."""

    def whole(self, choices: Sequence[Piece]) -> Json:
        """The answer at once, of the whole text of each choice."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, whichever dialect it came in.

    ``warnings`` are told in a header. ``framing`` is how a stream is sent, and ``failed`` makes the event that ends one
    early.
    """

    texts: Sequence[AskedText]
    form: AnswerForm
    is_streamed: bool
    warnings: Sequence[str] = ()
    framing: Framing = DATA_EVENTS
    failed: Callable[[Refusal], Json] = openai_error


class ChoicePiece(NamedTuple):
    choice: int
    piece: Piece


async def side_by_side(answers: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[ChoicePiece, None]:
    """The pieces of all answers as they come, each with its answer's place. An error in one ends them all."""

    async def take(choice: int) -> Piece | None:
        return await anext(answers[choice], None)

    taking = {asyncio.create_task(take(choice)): choice for choice in range(len(answers))}
    try:
        while taking:
            done, _ = await asyncio.wait(taking, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=taking.__getitem__):
                if (piece := task.result()) is not None:
                    yield ChoicePiece(taking[task], piece)
                    taking[asyncio.create_task(take(taking[task]))] = taking[task]
                del taking[task]
    finally:
        for task in taking:
            task.cancel()
        await asyncio.gather(*taking, return_exceptions=True)  # nobody is left to hear of them
        for answer in answers:
            await answer.aclose()


def joined(pieces: Sequence[Piece]) -> Piece:
    """One text's pieces as one; notices are left out."""
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=[token for piece in pieces for token in piece.token_ids],
        logprobs=Logprobs.joined(piece.logprobs for piece in pieces),
    )
