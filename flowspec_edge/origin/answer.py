"""An answer as it grows: its tokens, the text that is certain of them, and the counts of all rings that wrote at it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from flowspec_edge.config import GenerateOptions, Logprobs, Piece, RowKind, TokenLogprobs, UnfinishedText
from flowspec_edge.core.device.energy_shares import TextEnergy
from flowspec_edge.core.planning.arithmetic import ComputedLayers, changed_layers
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.engine.text_stream import TextStream
from flowspec_edge.engine.tokenizer import Tokenizer


class Answer:
    """The answer to a prompt, of which the token ids are given.

    One ring after another may write at it. A ring that goes on with an answer takes ``written`` for its prompt. Since
    the draw of a token depends on seed, position and the tokens before it alone, the text is the same as if one ring
    had written it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], options: GenerateOptions) -> None:
        self._prompt = tuple(prompt)
        self._options = options
        self._tokens: list[int] = []
        self._bytes_of = tokenizer.bytes_of
        self._text = TextStream(
            tokenizer,
            options.stop,
            before=self._prompt,
            min_tokens=options.min_tokens,
            shown=options.shown_token_ids,
        )
        self._ending: str | None = None
        self._counts: list[GenerationStatistics] = []  # one for each ring that wrote at it
        self._of_prompt = GenerationStatistics()  # of the one that read the prompt and wrote the first token
        self._computed: Sequence[ComputedLayers] = ()  # by the ring that wrote last
        self._row_kind: RowKind = "float32"  # of the ring that wrote last
        self._changes: list[dict[str, Any]] = []
        self._energies: list[TextEnergy] = []  # one for each ring that wrote at it
        self._num_resumed = 0  # tokens that another origin wrote
        self._is_shared = False
        self._began = self._last = time.monotonic()
        self._first: float | None = None
        self._num_first = 0

    @classmethod
    def resume(
        cls, tokenizer: Tokenizer, text: UnfinishedText, options: GenerateOptions, ending: str | None = None
    ) -> Answer:
        """An answer that another origin began, with the options that it began with; ``ending`` where it lacks only the
        last piece. What its tokens say was given there, up to what is held back. Takes 10 us per token.
        """
        answer = cls(tokenizer, text.prompt, options)
        answer._text.take(text.tokens)
        answer._tokens += text.tokens
        answer._num_resumed = len(text.tokens)
        answer._ending = ending
        answer._counts.append(GenerationStatistics())  # of the rings that wrote there, about which nothing is known
        return answer

    @property
    def written(self) -> tuple[int, ...]:
        """The prompt and the tokens so far."""
        return (*self._prompt, *self._tokens)

    @property
    def num_written(self) -> int:
        """How many tokens there are behind the prompt."""
        return len(self._tokens)

    @property
    def options_left(self) -> GenerateOptions:
        """The options of a generation that goes on behind ``written``."""
        return dataclasses.replace(self._options, max_new_tokens=self._options.max_new_tokens - self.num_written)

    @property
    def num_rings(self) -> int:
        """How many rings wrote at it."""
        return len(self._counts)

    def note_company(self) -> None:
        """Another text is written beside it."""
        self._is_shared = True

    def had_ring_for_itself(self, schedule: str) -> bool:
        """Whether one ring wrote all of it, by that schedule and with no other text beside it."""
        return self.num_rings == 1 and not self._is_shared and self._options.schedule == schedule

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has ended it."""
        return self._text.is_stopped

    @property
    def ending(self) -> str | None:
        """The reason to finish an answer that has nothing left to write."""
        return "stop" if self.is_stopped else self._ending

    def begin(
        self,
        counts: GenerationStatistics,
        computed: Sequence[ComputedLayers],
        energy: TextEnergy | None = None,
        row_kind: RowKind = "float32",
    ) -> None:
        """A ring begins to write at it, and keeps its figures in ``counts``, and what its boards take in ``energy``. It
        computes the layers like that, and hidden rows travel as ``row_kind``.
        """
        if self._tokens and self._computed:  # else all are drawn from what this ring computes, or nothing is known
            self._changes += [
                {"at_token": len(self._tokens), **dataclasses.asdict(changed)}
                for changed in changed_layers(self._computed, computed)
            ]
        self._counts.append(counts)
        self._energies += [energy] if energy is not None else []
        if not self._tokens:
            self._of_prompt = counts
        self._computed, self._row_kind = computed, row_kind

    def take(self, tokens: tuple[int, ...], logprobs: Sequence[TokenLogprobs] = ()) -> Piece:
        """Append tokens that became final, up to a stop string; returns the piece that they make."""
        text, offsets = self._text.take(tokens)
        num_taken = len(offsets)
        self._last = time.monotonic()
        if self._first is None:
            self._first, self._num_first = self._last, len(self._tokens) + num_taken
        prompt = None if self._tokens else list(self._prompt)
        self._tokens += tokens[:num_taken]
        told = self._with_texts(logprobs[:num_taken], offsets) if logprobs else None
        return Piece(text=text, token_ids=list(tokens[:num_taken]), prompt_token_ids=prompt, logprobs=told)

    def finish(self, reason: str) -> Piece:
        """End it; returns the last piece, with the statistics of the whole answer."""
        text = self._text.finish()
        return Piece(text=text, token_ids=[], finish_reason=reason, stop=self._text.stop, statistics=self._report())

    def _with_texts(self, logprobs: Sequence[TokenLogprobs], offsets: Sequence[int]) -> Logprobs:
        named = {part.token for one in logprobs for part in (one.drawn, *one.top)}
        return Logprobs(tokens=logprobs, offsets=offsets, texts={token: self._bytes_of(token) for token in named})

    def _report(self) -> dict[str, Any]:
        """The statistics of a finished generation, as users see them (docs/clients.md, "What the figures mean")."""
        decode_s = self._last - (self._first or self._last)
        counts = sum(self._counts, GenerationStatistics())
        return {
            "prompt_tokens": len(self._prompt),
            "cached_tokens": self._of_prompt.num_rows_kept,
            "completion_tokens": len(self._tokens),
            "hidden_rows": self._row_kind,
            "arithmetic_changes": self._changes,
            "trips": counts.num_trips,
            "verifications": counts.num_verifications,
            "acceptance_length": round(counts.acceptance_length, 3),
            "rows_sent": counts.num_rows_sent,
            "rows_useful": counts.num_rows_useful,
            "draft_passes": counts.num_draft_passes,
            "first_token_s": round((self._first or self._last) - self._began, 4),
            "decode_s": round(decode_s, 4),
            "tokens_per_s": round((len(self._tokens) - self._num_first) / decode_s, 2) if decode_s else 0.0,
            **self._energy_report(),
        }

    def _energy_report(self) -> dict[str, Any]:
        """Nothing where no board told what it took."""
        telling = {node for energy in self._energies for node in energy.telling}
        silent = {node for energy in self._energies for node in energy.silent} - telling
        if not telling:
            return {}
        joules = max(sum(energy.joules for energy in self._energies), 0.0)
        num_tokens = len(self._tokens) - self._num_resumed
        return {
            "joules": round(joules, 3),
            "joules_per_token": round(joules / num_tokens, 4) if num_tokens else None,
            "metered_nodes": sorted(telling),
            "unmetered_nodes": sorted(silent),
        }
