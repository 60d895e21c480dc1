"""The chance that the target takes a drafted token, learned from what it took before.

A draft head's probability says which token the head prefers, not how often it is right. A match with an earlier place
of the text has a length, which does not say what the match is worth. Each verification shows, for every drafted child
of the root, whether the target took it. These hits and trials are counted by bins of the draft's log-probability, by
length of the match, and by both together. Their ratios are the chances of acceptance, of which path scores are made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.speculation.lookup import MAX_MATCH

NUM_BINS = 24
BIN_WIDTH = 0.4
"""Bins of the draft's log-probability: 24 of width 0.4 reach from probability 1 down to e**-9.6."""
PRIOR_WEIGHT = 80.0
"""How many observations weigh as much as the chance that is assumed without any."""
MATCH_PRIOR = (0.0, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.75)
"""The assumed chance of a token that followed the same tokens earlier, by how many these are; from 2 on.

The chances are a little lower than measured on source code."""
MAX_CHANCE = 0.98
"""No draft counts as certain."""
FORGETTING = 0.999
"""Weight of the past at each verification: a text that turns into a table is noticed within some thousand tokens."""
MAX_WEIGHT = 1e9
"""Beyond this weight of an observation all counts are scaled down, or floats would overflow in the end."""


class Edge(NamedTuple):
    """Why a child was drafted.

    ``draft_log_prob`` is the draft's log-probability; None while no pass has run the parent. ``match`` is how many
    tokens before the child match an earlier place of the text after which the same token came; 0 for none.
    """

    draft_log_prob: float | None
    match: int = 0


class _Counts:
    """Hits and trials. Old ones fade, because new ones are added with a weight that grows."""

    def __init__(self, num_cells: int) -> None:
        self.hits = [0.0] * num_cells
        self.trials = [0.0] * num_cells

    def chance(self, cell: int, prior: float, prior_weight: float) -> float:
        return (self.hits[cell] + prior_weight * prior) / (self.trials[cell] + prior_weight)

    def scale(self, factor: float) -> None:
        self.hits = [hits * factor for hits in self.hits]
        self.trials = [trials * factor for trials in self.trials]

    def add(self, cell: int, weight: float, is_hit: bool) -> None:
        self.hits[cell] += weight * is_hit
        self.trials[cell] += weight


class Acceptance:
    """Chance that the target takes a drafted child, given that it has taken the parent."""

    def __init__(self) -> None:
        self._weight = 1.0  # of the next observation; the prior weighs PRIOR_WEIGHT of them
        self._by_draft = _Counts(NUM_BINS)
        self._by_match = _Counts(MAX_MATCH + 1)
        self._by_both = _Counts(NUM_BINS * (MAX_MATCH + 1))

    def log_chance(self, edge: Edge) -> float:
        """The logarithm of the chance of a child with this edge."""
        draft_log_prob, match = edge
        prior_weight = PRIOR_WEIGHT * self._weight
        chance = 0.0
        if match:
            chance = self._by_match.chance(match, MATCH_PRIOR[match], prior_weight)
        if draft_log_prob is not None:
            bin = _bin(draft_log_prob)
            drafted = self._by_draft.chance(bin, math.exp(draft_log_prob), prior_weight)
            chance = drafted
            if match:
                chance = self._by_both.chance(
                    bin * (MAX_MATCH + 1) + match,
                    1 - (1 - drafted) * (1 - self._by_match.chance(match, MATCH_PRIOR[match], prior_weight)),
                    prior_weight,
                )
        return math.log(min(max(chance, 1e-9), MAX_CHANCE))

    def log_chances(self, draft_log_probs: NDArray[np.float32]) -> NDArray[np.float64]:
        """``log_chance`` of many children without a match, in an array of any shape."""
        prior_weight = PRIOR_WEIGHT * self._weight
        bins = np.clip(-draft_log_probs / BIN_WIDTH, 0, NUM_BINS - 1).astype(np.int64)
        hits, trials = np.array(self._by_draft.hits)[bins], np.array(self._by_draft.trials)[bins]
        chances = (hits + prior_weight * np.exp(draft_log_probs.astype(np.float64))) / (trials + prior_weight)
        return np.log(np.clip(chances, 1e-9, MAX_CHANCE))  # type: ignore[no-any-return]

    def observe(self, children: list[tuple[Edge, bool]]) -> None:
        """Learn from the drafted children of one verified row: the edge of each, and whether the target took it."""
        self._weight /= FORGETTING
        if self._weight > MAX_WEIGHT:
            for counts in (self._by_draft, self._by_match, self._by_both):
                counts.scale(1 / self._weight)
            self._weight = 1.0
        for (draft_log_prob, match), is_taken in children:
            if match:
                self._by_match.add(match, self._weight, is_taken)
            if draft_log_prob is not None:
                bin = _bin(draft_log_prob)
                if match:
                    self._by_both.add(bin * (MAX_MATCH + 1) + match, self._weight, is_taken)
                else:
                    self._by_draft.add(bin, self._weight, is_taken)


def _bin(draft_log_prob: float) -> int:
    return int(min(max(-draft_log_prob / BIN_WIDTH, 0), NUM_BINS - 1))
