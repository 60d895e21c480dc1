"""The chance that the target takes a drafted token, learned from what it took before.

A draft head's probability says which token the head prefers, not how often it is right. A match with an earlier place
of the text has a length, which does not say what the match is worth. Each verification shows, for every drafted child
of the root, whether the target took it. These hits and trials are counted by bins of the draft's log-probability, by
length of the match, and by both together. Their ratios are the chances of acceptance, of which path scores are made.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.speculation.lookup import MAX_MATCH

NUM_BINS = 24
BIN_WIDTH = 0.4
"""Bins of the draft's log-probability: 24 of width 0.4 reach from probability 1 down to e**-9.6."""
PRIOR_WEIGHT = 80.0
"""How many observations weigh as much as the chance that is assumed without any."""
MATCH_PRIORS = np.array([0.0, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.75])
"""The assumed chance of a token that followed the same tokens earlier, by how many these are; from 2 on.

The chances are a little lower than measured on source code."""
MIN_CHANCE, MAX_CHANCE = 1e-9, 0.98
"""No draft counts as impossible, and none as certain."""
FORGETTING = 0.999
"""Weight of the past at each verification: a text that turns into a table is noticed within some thousand tokens."""
MAX_WEIGHT = 1e9
"""Beyond this weight of an observation all counts are scaled down, or floats would overflow in the end."""

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]


class _Counts:
    """Hits and trials. Old ones fade, because new ones are added with a weight that grows."""

    def __init__(self, num_cells: int) -> None:
        self._hits, self._trials = np.zeros(num_cells), np.zeros(num_cells)

    def chances(self, cells: Any, priors: Any, prior_weight: float) -> Any:
        """The chances in these cells, given those that are assumed without any observation."""
        return (self._hits[cells] + prior_weight * priors) / (self._trials + prior_weight)[cells]

    def scale(self, factor: float) -> None:
        self._hits *= factor
        self._trials *= factor

    def add(self, cell: int, weight: float, is_hit: bool) -> None:
        self._hits[cell] += weight * is_hit
        self._trials[cell] += weight


class Acceptance:
    """Chance that the target takes a drafted child, given that it has taken the parent.

    Of each child ``log_probs`` has the draft's log-probability, NaN while no pass has run the parent; and ``matches``
    how many tokens before the child match an earlier place of the text after which the same token came, 0 for none.
    Both are arrays of one shape.
    """

    def __init__(self) -> None:
        self._weight = 1.0  # of the next observation; the prior weighs PRIOR_WEIGHT of them
        self._by_draft = _Counts(NUM_BINS)
        self._by_match = _Counts(MAX_MATCH + 1)
        self._by_both = _Counts(NUM_BINS * (MAX_MATCH + 1))
        self._weigh_matches()

    def log_chances(self, log_probs: Reals, matches: Ints) -> Reals:
        """The logarithm of the chance of each child."""
        bins, prior_weight = _bins(log_probs), PRIOR_WEIGHT * self._weight
        chances: Reals = self._by_draft.chances(bins, np.exp(log_probs), prior_weight)
        at = matches.nonzero()
        if len(at[0]):
            drafted, match = chances[at], matches[at]
            matched = self._match_chances[match]
            both = self._by_both.chances(
                bins[at] * (MAX_MATCH + 1) + match, drafted + matched - drafted * matched, prior_weight
            )
            chances[at] = np.where(np.isnan(drafted), matched, both)
        return np.log(np.minimum(np.maximum(chances, MIN_CHANCE), MAX_CHANCE))

    def log_chance_of_match(self, match: int) -> float:
        """The same for one child that only the text proposes, after a match of this length."""
        return self._match_log_chances[match]

    def observe(self, log_probs: Reals, matches: Ints, is_taken: NDArray[np.bool_]) -> None:
        """Learn from the drafted children of one verified row; ``is_taken`` says which the target took, if any."""
        self._weight /= FORGETTING
        if self._weight > MAX_WEIGHT:
            for counts in (self._by_draft, self._by_match, self._by_both):
                counts.scale(1 / self._weight)
            self._weight = 1.0
        children = zip(_bins(log_probs).tolist(), log_probs.tolist(), matches.tolist(), is_taken.tolist(), strict=True)
        for bin, log_prob, match, is_one in children:
            if match:
                self._by_match.add(match, self._weight, is_one)
            if not math.isnan(log_prob):
                if match:
                    self._by_both.add(bin * (MAX_MATCH + 1) + match, self._weight, is_one)
                else:
                    self._by_draft.add(bin, self._weight, is_one)
        self._weigh_matches()

    def _weigh_matches(self) -> None:
        """Set what a match of each length is worth, which is asked for more often than it changes."""
        self._match_chances = self._by_match.chances(slice(None), MATCH_PRIORS, PRIOR_WEIGHT * self._weight)
        chances: list[float] = self._match_chances.tolist()
        self._match_log_chances = [math.log(min(max(chance, MIN_CHANCE), MAX_CHANCE)) for chance in chances]


def _bins(log_probs: Reals) -> Ints:
    """The bin of each log-probability, and any where there is none."""
    return np.fmin(np.fmax(log_probs / -BIN_WIDTH, 0), NUM_BINS - 1).astype(np.int64)
