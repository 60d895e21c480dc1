"""What a ring is worth: expected tokens per second of a schedule, from its trip, its interval and its draft tree.

The *trip* is the time of one round of the ring and the head that waits for nobody; the *interval* is how long its slowest part
is busy with a chunk, so that a chunk can leave in every interval. A token comes back one trip after its row left: in the time
of a trip a ring brings at most what a tree of the rows under way is worth (Little's law; bench/bound.py counts it on real
text). Both more trip and more interval always cost, which the planner's search relies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowspec_edge.core.limits import MAX_LIVING_ROWS
from flowspec_edge.core.speculation.schedules import find_schedule
from flowspec_edge.core.speculation.schedules.pipedec import LEVEL_ROWS
from flowspec_edge.core.speculation.schedules.rounds import TREE_PASSES, TREE_ROWS

LIVING_SHARE = 0.6
"""Rows under way that live, of those that a full pipeline holds: the others hang on what was refused meanwhile."""
REFUSAL_SHARE = 0.15
"""Of an interval, per token: how long the first stage still works on dead rows when a token comes that was not under way.

Both fitted to flowspec on 15 rings of 1 to 8 stages on the virtual clock, whose tokens/s they tell within 15 %."""
CHUNK_ROWS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)
"""Chunk sizes that are tried: between two of them the best rate changes by under 1 %."""
ROUND_GAIN = {"chunked": 1.0, "pruned": 1.42, "lockstep": 1.42}
"""Tokens/s over those of chunked: means of docs/performance.md (virtual clock, commit 1739c86)."""
CURVE_ROWS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 400.0)


@dataclass(frozen=True, slots=True)
class AcceptanceCurve:
    """``tokens[i]`` is the acceptance length of the drafter's best tree of ``rows[i]`` rows, root and bonus included.

    Between the points it is a line, beyond the last it stays.
    """

    rows: tuple[float, ...]
    tokens: tuple[float, ...]

    def at(self, num_rows: Any) -> Any:
        """Tokens per trip with so many draft rows under way."""
        return np.interp(num_rows, self.rows, self.tokens)

    def scaled(self, factor: float) -> AcceptanceCurve:
        """With ``factor`` times as many tokens beyond the first, which no draft is needed for; never more than rows."""
        tokens = (1 + (tokens - 1) * factor for tokens in self.tokens)
        return AcceptanceCurve(
            self.rows, tuple(min(n, max(rows, 1.0)) for n, rows in zip(tokens, self.rows, strict=True))
        )

    @classmethod
    def from_places(cls, places: Sequence[Sequence[int]]) -> AcceptanceCurve:
        """From the places, in score order and from 1 on, of the rows of each tree that the target took."""
        return cls(CURVE_ROWS, tuple(tokens_of_best_rows(places, rows) for rows in CURVE_ROWS))


NO_DRAFTS = AcceptanceCurve((1.0,), (1.0,))
"""Of a bundle without a drafter."""
TYPICAL_DRAFTS = AcceptanceCurve(
    (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0),
    (1.0, 1.63, 1.98, 2.22, 2.59, 2.85, 3.2, 3.42, 3.66, 3.81, 4.02, 4.15, 4.29, 4.37, 4.51),
)
"""Of a draft head before anything was seen of it: an earlier demo model's, greedy, 41 trees of six texts (bench/bound.py)."""


def tokens_of_best_rows(places: Sequence[Sequence[int]], num_rows: float) -> float:
    """Mean tokens that trees of ``num_rows`` rows bring, the root's bonus included; between whole numbers, a line."""
    if not places:
        return 1.0
    whole = int(num_rows)
    below, above = (sum(place < n for path in places for place in path) / len(places) for n in (whole, whole + 1))
    return 1 + below + (above - below) * (num_rows - whole)


@dataclass(frozen=True, slots=True)
class Throughput:
    """Expected tokens/s of one schedule. ``draft_ms`` is a pass of the drafter, which only schedules with rounds wait for."""

    schedule: str
    acceptance: AcceptanceCurve
    draft_ms: float = 0.0

    def __post_init__(self) -> None:
        find_schedule(self.schedule)  # raises RequestError where there is none

    def chunk_rows(self, num_stages: int) -> tuple[int, ...]:
        """Chunk sizes to try on a ring of so many stages."""
        if self.schedule == "autoregressive":
            return (1,)
        if self.schedule in ROUND_GAIN:
            return (-(-TREE_ROWS // (num_stages + 1)),)
        return (LEVEL_ROWS,) if self.schedule == "pipedec" else CHUNK_ROWS

    def tokens_per_s(self, num_rows: int, trip_ms: Any, interval_ms: Any, num_stages: Any) -> Any:
        """With chunks of ``num_rows``; numbers or arrays of one shape.

        It falls, or stays, wherever trip or interval grow: tokens per trip grow slower than the rows that bring them.
        """
        if self.schedule == "autoregressive":
            return 1000 / trip_ms
        if self.schedule in ROUND_GAIN:
            round_ms = trip_ms + num_stages * interval_ms + TREE_PASSES * self.draft_ms
            return 1000 * ROUND_GAIN[self.schedule] * self.acceptance.at(TREE_ROWS) / round_ms
        living = np.minimum(LIVING_SHARE * num_rows * trip_ms / interval_ms, MAX_LIVING_ROWS)
        rate = 1000 / (trip_ms / self.acceptance.at(living) + REFUSAL_SHARE * interval_ms)
        return np.maximum(rate, 1000 / trip_ms) if num_rows == 1 and self.schedule == "flowspec" else rate
