"""The drafted part of a session's tree: scores, what the drafter has run, and what it should run next.

A row's score is the log-probability that the target takes the whole path from the root to it, so a parent never scores below
its child and score order keeps causality. When the root moves, surviving rows keep their place and their draft: scores count
from the new root, and the frontier goes on growing where it is. (FlowSpec, section 3: dynamic draft expansion.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.acceptance import Acceptance, Edge
from flowspec_edge.core.lookup import MAX_MATCH, Lookup
from flowspec_edge.core.tree import NO_PARENT, Row, Tree
from flowspec_edge.core.verify import Sampler

MIN_LOOKUP_MATCH = 2
"""One matching token alone is no reason for a new row; it counts for a token that is drafted anyway."""
LOOKUP_ROWS = 24
"""New rows from the text itself at a time."""
LOOKUP_SEEDS = 8
"""How many of the likeliest rows are looked up anew when the root moves."""
LOOKUP_MIN_SCORE = math.log(0.01)
REFRESH_SCORE = math.log(0.3)
"""What running a row anew is worth, against running one for the first time."""


@dataclass(frozen=True, slots=True)
class DraftShape:
    """How a draft tree grows: rows per pass of the drafter, each with its likeliest ``proposals``, of which up to ``children``
    may become rows, and of those the likeliest ``rows_per_pass`` of the pass.
    """

    width: int = 10
    proposals: int = 64
    children: int = 10
    rows_per_pass: int = 40


class Drafting:
    """Scores of one session's drafted rows, and the drafter's state.

    Without ``acceptance`` the draft's own probabilities are taken for the chance of acceptance; without ``lookup`` the text
    itself proposes nothing; without ``sampler`` the draft does not know the noise that the target will be sampled with.
    """

    def __init__(
        self,
        tree: Tree,
        shape: DraftShape,
        *,
        acceptance: Acceptance | None = None,
        lookup: Lookup | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        self._tree = tree
        self._sampler = sampler
        self._acceptance = acceptance
        self._lookup = lookup
        self.shape = shape
        self.scores: dict[int, float] = {}  # log-probability from the root, per drafted row
        self.passes = 0  # since the last restart
        self._edges: dict[int, Edge] = {}
        self._ran: dict[int, int] = {}  # per row: the number of the pass that ran it last
        self._num_passes = 0
        self._stale_from = 0

    def forget(self, ids: Sequence[int]) -> None:
        """Rows that live no more."""
        for id in ids:
            self.scores.pop(id, None)
            self._edges.pop(id, None)
            self._ran.pop(id, None)

    def observe(self, parent: int, token: int) -> None:
        """The target chose ``token`` after ``parent``: learn from the children that were drafted for it."""
        if self._acceptance is None:
            return
        children = self._tree[parent].children.items()
        drafted = [
            (self._edges[child], child_token == token) for child_token, child in children if child in self._edges
        ]
        if drafted:
            self._acceptance.observe(drafted)

    def move_root(self, root: int, text: Sequence[int], next_id: int) -> list[Row]:
        """The text went on by ``text``, and scores count from ``root`` now. Returns rows that the text itself proposes,
        numbered from ``next_id``.
        """
        scores: dict[int, float] = {}
        for row in self._tree.descendants(root):
            edge = self._edges.get(row.id)
            if edge is not None:
                scores[row.id] = scores.get(row.parent, 0.0) + self._log_chance(edge)
        self.scores = scores
        self.passes = 0
        if self._lookup is None:
            return []
        self._lookup.extend(text)
        return self._look_up([root, *heapq.nlargest(LOOKUP_SEEDS, scores, key=scores.__getitem__)], next_id)

    def restart(self) -> None:
        """Draft everything below the root anew: what earlier passes ran does not count."""
        self._stale_from = self._num_passes
        self.passes = 0

    def has_run(self, id: int) -> bool:
        return self._ran.get(id, 0) > self._stale_from

    def frontier(self, width: int, max_depth: int) -> list[int]:
        """The likeliest rows whose children are not drafted yet, though their parent's are; at most ``width``.

        Rows at ``max_depth`` and below it (positions) have no use for children.
        """
        return [id for id, is_first in self._runnable(max_depth, float("-inf")) if is_first][:width]

    def stale(self, width: int, max_depth: int) -> list[int]:
        """The likeliest rows that ran before their parent was run again: better features are to be had."""
        return [id for id, is_first in self._runnable(max_depth, float("-inf")) if not is_first][:width]

    def next_pass(self, width: int, max_depth: int, min_score: float) -> list[int]:
        """The rows that are most worth a pass, frontier and stale ones together."""
        return [id for id, _ in islice(self._runnable(max_depth, min_score), width)]

    def merge(
        self, parents: Sequence[int], tokens: NDArray[np.int64], log_probs: NDArray[np.float32], next_id: int
    ) -> list[Row]:
        """Take in one pass: children of ``parents``, [rows, k] tokens and log-probabilities. Returns the new rows.

        Children that exist get the new score; of the others the likeliest ``rows_per_pass`` become rows, numbered from
        ``next_id``. Parents that died meanwhile count for nothing.
        """
        self.passes += 1
        self._num_passes += 1
        proposals: list[tuple[float, int, int, Edge]] = []
        for parent, row_tokens, row_log_probs in zip(parents, tokens, log_probs, strict=True):
            row = self._tree.get(parent)
            if row is None:
                continue
            self._ran[parent] = self._num_passes
            if row.is_committed:
                continue
            base = self.scores.get(parent, 0.0)
            matches = self._matches(parent)
            known = {token: child for token, child in row.children.items() if child in self._edges}
            ranked = self._rank(row_tokens, row_log_probs, row.depth + 1)
            least = ranked[-1][1]
            for token, log_prob in ranked[: self.shape.children] + [one for one in ranked[self.shape.children:] if one[0] in known]:
                edge = Edge(log_prob, matches.get(token, 0))
                score = base + self._log_chance(edge)
                if token in row.children:
                    known.pop(token, None)
                    self._score(row.children[token], edge, score)
                else:
                    proposals.append((-score, parent, token, edge))
            for token, child in known.items():  # the draft does not see them among its likeliest
                edge = Edge(least - 1, matches.get(token, 0))
                self._score(child, edge, base + self._log_chance(edge))
        proposals.sort()
        added: list[Row] = []
        for negative_score, parent, token, edge in proposals[: max(self.shape.rows_per_pass, 5 * len(parents) // 2)]:
            added.append(self._add(Row(next_id + len(added), parent, token), edge, -negative_score))
        return added + self._look_up([row.id for row in added], next_id + len(added))

    def _rank(
        self, tokens: NDArray[np.int64], log_probs: NDArray[np.float32], position: int
    ) -> list[tuple[int, float]]:
        """What the draft proposes for a position, the likeliest first."""
        if self._sampler is not None:
            log_probs = self._sampler.foresee(tokens, log_probs, position)
            order = np.argsort(-log_probs, kind="stable")
            tokens, log_probs = tokens[order], log_probs[order]
        return list(zip(tokens.tolist(), log_probs.tolist(), strict=True))

    def _runnable(self, max_depth: int, min_score: float) -> Iterable[tuple[int, bool]]:
        """Rows that the drafter can run, the most worthwhile first, and whether it is for the first time."""
        ran, tree = self._ran, self._tree
        ready: list[tuple[float, int, bool]] = []
        for id, score in self.scores.items():
            if score < min_score:
                continue
            row = tree[id]
            parent_ran, has_run = ran.get(row.parent, 0), self.has_run(id)
            if parent_ran <= self._stale_from or row.depth >= max_depth:
                continue
            if not has_run:
                ready.append((-score, id, True))
            elif ran[id] < parent_ran and score + REFRESH_SCORE >= min_score:
                ready.append((-score - REFRESH_SCORE, id, False))
        heapq.heapify(ready)
        while ready:
            _, id, is_first = heapq.heappop(ready)
            yield id, is_first

    def _look_up(self, ids: Sequence[int], next_id: int) -> list[Row]:
        """Add what the text itself proposes below these rows, and below what was added, likeliest first."""
        added: list[Row] = []
        ready = [(-self.scores.get(id, 0.0), id) for id in ids] if self._lookup is not None else []
        heapq.heapify(ready)
        while ready and len(added) < LOOKUP_ROWS:
            negative_score, id = heapq.heappop(ready)
            row = self._tree[id]
            token, match = next(iter(self._matches(id).items()), (0, 0))
            edge = Edge(None, match)
            if match < MIN_LOOKUP_MATCH or row.is_committed or token in row.children:
                continue
            score = -negative_score + self._log_chance(edge)
            if score >= LOOKUP_MIN_SCORE:
                added.append(self._add(Row(next_id + len(added), id, token), edge, score))
                heapq.heappush(ready, (-score, added[-1].id))
        return added

    def _matches(self, id: int) -> dict[int, int]:
        """What the text proposes after a row: token -> length of the match, the longest first."""
        if self._lookup is None:
            return {}
        path: list[int] = []
        row = self._tree[id]
        while len(path) < MAX_MATCH:
            path.append(row.token)
            if row.parent == NO_PARENT:
                break
            row = self._tree[row.parent]
        return self._lookup.proposals(path[::-1])

    def _add(self, row: Row, edge: Edge, score: float) -> Row:
        self._tree.add(row)
        self._score(row.id, edge, score)
        return row

    def _score(self, id: int, edge: Edge, score: float) -> None:
        self._edges[id] = edge
        self.scores[id] = score

    def _log_chance(self, edge: Edge) -> float:
        if self._acceptance is not None:
            return self._acceptance.log_chance(edge)
        assert edge.draft_log_prob is not None, "only calibrated drafts are looked up"
        return edge.draft_log_prob
