"""Estimates the tokens/s of a schedule on a ring, from the ring's trip and interval and from the draft tree.

The *trip* is the time of one round through ring and head without waiting. The *interval* is how long the slowest part
is busy with a chunk, so that one chunk can leave in every interval. A token comes back one trip after its row left, so
during a trip a ring brings at most the tokens of a draft tree of all rows under way (Little's law; bench/bound.py
measures it on real text). The planner's search relies on one thing: a longer trip or a longer interval never brings
more tokens/s.
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
"""The share of the rows in a full pipeline that live. The others lie below rows that were refused meanwhile."""
REFUSAL_SHARE = 0.15
"""What each token costs on average, as a share of an interval, because a token that was not under way waits until the
first stage is done with dead rows.

This and LIVING_SHARE are fitted to flowspec on 15 rings of 1 to 8 stages on the virtual clock, whose tokens/s they
predict within 15 %.
"""
CHUNK_ROWS = (1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)
"""The chunk sizes that are tried. Between two of them the best rate changes by under 1 %."""
ROUND_GAIN = {"chunked": 1.0, "pruned": 1.42, "lockstep": 1.42}
"""Tokens/s relative to chunked: means of docs/performance.md (virtual clock, commit 1739c86)."""
CURVE_ROWS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0, 400.0)


@dataclass(frozen=True, slots=True)
class AcceptanceCurve:
    """The acceptance length of a drafter's best tree by its size: ``tokens[i]`` for ``rows[i]``, root and bonus
    included.

    Between two points it is linear, and beyond the last one constant.
    """

    rows: tuple[float, ...]
    tokens: tuple[float, ...]

    @property
    def has_drafts(self) -> bool:
        """Whether it is that of a drafter at all."""
        return len(self.rows) > 1

    def at(self, num_rows: Any) -> Any:
        """The tokens per trip with ``num_rows`` draft rows under way."""
        return np.interp(num_rows, self.rows, self.tokens)

    def scaled(self, factor: float) -> AcceptanceCurve:
        """The curve with ``factor`` times as many tokens beyond the first, which needs no draft; never more tokens than
        rows.
        """
        tokens = (1 + (tokens - 1) * factor for tokens in self.tokens)
        return AcceptanceCurve(
            self.rows, tuple(min(n, max(rows, 1.0)) for n, rows in zip(tokens, self.rows, strict=True))
        )

    @classmethod
    def from_places(cls, places: Sequence[Sequence[int]]) -> AcceptanceCurve:
        """The curve from trees, each given by the places of the rows that the target accepted.

        A place counts the rows of the tree in the order of their scores, from 1 on.
        """
        return cls(CURVE_ROWS, tuple(tokens_of_best_rows(places, rows) for rows in CURVE_ROWS))


NO_DRAFTS = AcceptanceCurve((1.0,), (1.0,))
"""The curve of a bundle without a drafter."""
TYPICAL_DRAFTS = AcceptanceCurve(
    (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 256.0),
    (1.0, 1.63, 1.98, 2.22, 2.59, 2.85, 3.2, 3.42, 3.66, 3.81, 4.02, 4.15, 4.29, 4.37, 4.51),
)
"""The curve assumed of a draft head at first: that of an earlier demo model, greedy, 41 trees of six texts
(bench/bound.py). What heads bring differs; core/planning/draft_gain.py learns how much.
"""


def tokens_of_best_rows(places: Sequence[Sequence[int]], num_rows: float) -> float:
    """The mean tokens of trees of ``num_rows`` rows, the root's bonus included. It is linear between whole numbers."""
    if not places:
        return 1.0
    whole = int(num_rows)
    below, above = (sum(place < n for path in places for place in path) / len(places) for n in (whole, whole + 1))
    return 1 + below + (above - below) * (num_rows - whole)


@dataclass(frozen=True, slots=True)
class Throughput:
    """The expected tokens/s of one schedule.

    Only schedules with rounds wait for a pass of the drafter, of ``draft_ms``.
    """

    schedule: str
    acceptance: AcceptanceCurve
    draft_ms: float = 0.0

    def __post_init__(self) -> None:
        find_schedule(self.schedule)  # raises RequestError where there is none

    def chunk_rows(self, num_stages: int) -> tuple[int, ...]:
        """The chunk sizes to try on a ring of ``num_stages``."""
        if self.schedule == "autoregressive":
            return (1,)
        if self.schedule in ROUND_GAIN:
            return (-(-TREE_ROWS // (num_stages + 1)),)
        return (LEVEL_ROWS,) if self.schedule == "pipedec" else CHUNK_ROWS

    def tokens_per_s(self, num_rows: float, trip_ms: Any, interval_ms: Any, num_stages: Any) -> Any:
        """The tokens/s with chunks of ``num_rows``; the other arguments are numbers or arrays of one shape.

        The rate never grows with trip or interval: tokens per trip grow more slowly than the rows that bring them.
        """
        if self.schedule == "autoregressive":
            return 1000 / trip_ms
        if self.schedule in ROUND_GAIN:
            round_ms = trip_ms + num_stages * interval_ms + TREE_PASSES * self.draft_ms
            return 1000 * ROUND_GAIN[self.schedule] * self.acceptance.at(TREE_ROWS) / round_ms
        living = np.minimum(LIVING_SHARE * num_rows * trip_ms / interval_ms, MAX_LIVING_ROWS)
        rate = 1000 / (trip_ms / self.acceptance.at(living) + REFUSAL_SHARE * interval_ms)
        return np.maximum(rate, 1000 / trip_ms) if num_rows == 1 and self.schedule == "flowspec" else rate
