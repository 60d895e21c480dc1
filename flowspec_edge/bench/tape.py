"""Records the target's hidden rows and logits along one text, so that they are computed only once.

All schedules write the same text. So the target runs once per prompt and options, and every schedule on every testbed
reads the result. Draft rows that are not part of the text need no values, because no verification reaches them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import PREFILL_ROWS
from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.unsplit import UnsplitModel


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """One text of the target: the prompt and its continuation, and the normed hidden row and logits
    at each position.
    """

    num_prompt: int
    tokens: tuple[int, ...]
    hidden: ev.Floats  # [tokens, hidden_size]
    logits: ev.Floats  # [tokens, vocab_size]

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.tokens[: self.num_prompt]

    @property
    def continuation(self) -> tuple[int, ...]:
        return self.tokens[self.num_prompt :]

    @property
    def is_looping(self) -> bool:
        """Whether the last third of the continuation repeats itself with a period of at most half of that third."""
        tail = self.continuation[-(len(self.continuation) // 3) :]
        return any(
            all(tail[i] == tail[i - period] for i in range(period, len(tail)))
            for period in range(1, len(tail) // 2 + 1)
        )


class TapeRecorder:
    """Runs a bundle's target in this process."""

    def __init__(self, bundle: Bundle) -> None:
        self._unsplit = UnsplitModel(bundle.directory, bundle.manifest)
        self._stage = StageRunner(bundle.directory, bundle.manifest, 0, bundle.manifest.geometry.num_layers)
        self._head = Head(bundle.directory, bundle.manifest)

    def record(self, prompt: list[int], options: GenerateOptions) -> Tape:
        """Write the continuation of ``prompt``, then compute the values of every position in one run over the whole
        text.
        """
        tokens = [*prompt, *self._unsplit.generate(prompt, options)]
        slots = KvSlots(len(tokens))
        self._stage.open_cache(0, slots.capacity)
        hidden = []
        for start in range(0, len(tokens), PREFILL_ROWS):
            part = range(start, min(start + PREFILL_ROWS, len(tokens)))
            rows = tuple(Row(i, i - 1 if i else NO_PARENT, tokens[i]) for i in part)
            forward = ev.RunForward(0, rows, None, slots.place(rows))
            hidden.append(self._stage.run(forward).hidden.copy())
        self._stage.free_cache(0)
        every = np.concatenate(hidden)
        return Tape(len(prompt), tuple(tokens), every, self._head.logits(every))
