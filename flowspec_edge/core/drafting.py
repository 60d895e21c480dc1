"""Growing the draft tree: scores, frontier, and when another pass of the drafter is worth having.

A row's score is its cumulative draft log-probability from the root, so a parent never scores below its child and score
order keeps causality. After each accepted token the drafter starts again from the new root with the target's own hidden
rows; what it finds is merged into the living tree by token path, where rows that exist keep their draft id and take the new
score. While nothing is accepted, the frontier grows deeper instead. (FlowSpec, section 3: dynamic draft expansion.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.tree import Row, Tree


@dataclass(frozen=True, slots=True)
class DraftShape:
    """How large a draft tree grows.

    ``width`` rows are expanded in one pass and each gets ``width`` children, of which the pass adds the likeliest
    ``rows_per_pass``; ``depth`` counts passes after each accepted token, ``extra_depth`` those that may follow while
    nothing is accepted and the ring would run empty.
    """

    width: int = 10
    depth: int = 6
    extra_depth: int = 6
    rows_per_pass: int = 40


class Drafting:
    """The unsent part of one session's draft tree, and the state of the round that grows it."""

    def __init__(self, tree: Tree, shape: DraftShape) -> None:
        self._tree = tree
        self.shape = shape
        self.scores: dict[int, float] = {}  # log-probability from the root, per drafted row
        self.root = 0
        self.passes = 0  # of this round
        self._expanded: set[int] = set()

    def restart(self, root: int) -> None:
        """Begin a round: the root moved. Surviving rows keep their place, their scores count from the new root."""
        base = self.scores.pop(root, 0.0)
        kept = {row.id for row in self._tree.descendants(root)}
        self.scores = {id: score - base for id, score in self.scores.items() if id in kept}
        self.root = root
        self.passes = 0
        self._expanded.clear()

    def frontier(self, max_depth: int) -> list[Row]:
        """The likeliest rows that this round has not expanded yet, at most ``width``, parents expanded before them.

        Rows at ``max_depth`` and below it (positions) have no use for children.
        """
        tree, scores = self._tree, self.scores
        ready = [
            id
            for id in scores
            if id not in self._expanded and tree[id].parent in self._expanded and tree[id].depth < max_depth
        ]
        ready.sort(key=lambda id: -scores[id])
        return [Row(id, tree[id].parent, tree[id].token) for id in ready[: self.shape.width]]

    def merge(
        self, parents: list[int], tokens: NDArray[np.int64], log_probs: NDArray[np.float32], next_id: int
    ) -> list[Row]:
        """Take in one pass: children of ``parents``, [rows, k] tokens and log-probabilities. Returns the new rows.

        Children that exist get the new score; of the others the likeliest ``rows_per_pass`` become rows, numbered from
        ``next_id``.
        """
        self.passes += 1
        self._expanded.update(parents)
        base = np.array([self.scores.get(id, 0.0) for id in parents])  # the root's score is 0
        totals = base[:, None] + log_probs  # [rows, k]
        added: list[Row] = []
        best_first = np.argsort(-totals, axis=None, kind="stable")
        for place in best_first.tolist():
            index, column = divmod(place, totals.shape[1])
            parent = self._tree[parents[index]]
            token = int(tokens[index, column])
            score = float(totals[index, column])
            existing = parent.children.get(token)
            if existing is not None:
                self.scores[existing] = score
            elif len(added) < self.shape.rows_per_pass:
                row = Row(next_id + len(added), parent.id, token)
                self._tree.add(row)
                self.scores[row.id] = score
                added.append(row)
        return added
