"""The drafted part of a session's tree: its scores, what the drafter has run, and what it should run next.

A row's score is the log of the chance that the target takes the whole path from the root to it. So a parent never
scores below its child, and in the order of scores it comes first. When the root moves, surviving rows keep their place
and what was drafted below them: scores count from the new root, and the frontier goes on growing where it is.
(FlowSpec, section 3: dynamic draft expansion.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.acceptance import Acceptance, Edge
from flowspec_edge.core.speculation.lookup import MAX_MATCH, Lookup
from flowspec_edge.core.speculation.tree import Tree, TreeRow

LOOKUP_ROWS = 24
"""The most rows that one lookup adds."""
LOOKUP_SEEDS = 8
"""How many of the likeliest rows are looked up anew when the root moves."""
LOOKUP_MIN_SCORE = math.log(0.01)
"""Lookup adds no row that scores less."""
REFRESH_SCORE = math.log(0.3)
"""Running a row again counts like running one for the first time that is 0.3 times as likely."""


@dataclass(frozen=True, slots=True)
class DraftShape:
    """How a draft tree grows.

    A pass of the drafter runs ``width`` rows, and proposes the likeliest ``proposals`` tokens after each. Of these up
    to ``children`` may become rows, and of those the likeliest ``rows_per_pass`` of the pass do.
    """

    width: int = 10
    proposals: int = 64
    children: int = 10
    rows_per_pass: int = 40


class Drafting:
    """Scores of one session's drafted rows, and which of them the drafter has run.

    Without ``acceptance`` the draft's own probabilities are taken for the chances of acceptance. Without ``lookup``
    nothing is drafted from the text itself.
    """

    def __init__(
        self,
        tree: Tree,
        shape: DraftShape,
        *,
        acceptance: Acceptance | None = None,
        lookup: Lookup | None = None,
    ) -> None:
        self._tree = tree
        self._acceptance = acceptance
        self._lookup = lookup
        self.shape = shape
        self.scores: dict[int, float] = {}  # log-chance from the root, per drafted row
        self.num_passes = 0
        self._edges: dict[int, Edge] = {}
        self._ran: dict[int, int] = {}  # per row: the number of the pass that ran it last, from 1

    def forget(self, ids: Sequence[int]) -> None:
        """These rows have died."""
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
        """The text has grown by the tokens ``text``, and scores count from ``root`` now.

        Returns the rows that lookup has added, with draft ids from ``next_id`` on.
        """
        scores: dict[int, float] = {}
        for row in self._tree.descendants(root):
            edge = self._edges.get(row.id)
            if edge is not None:
                scores[row.id] = scores.get(row.parent, 0.0) + self._log_chance(edge)
        self.scores = scores
        if self._lookup is None:
            return []
        self._lookup.extend(text)
        return self._look_up([root, *heapq.nlargest(LOOKUP_SEEDS, scores, key=scores.__getitem__)], next_id)

    def frontier(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        """The likeliest rows whose children are not drafted yet, though their parent's are; at most ``width``.

        Rows at position ``max_depth`` and deeper are left out, since their children could not become text. Only passes
        after number ``since`` count: rows that earlier ones ran are to be run again.
        """
        runnable = self._runnable(max_depth, float("-inf"), since)
        return [id for id, is_first in runnable if is_first][:width]

    def stale(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        """The likeliest rows that ran before their parent ran again: another pass would see its newer features."""
        runnable = self._runnable(max_depth, float("-inf"), since)
        return [id for id, is_first in runnable if not is_first][:width]

    def next_pass(self, width: int, max_depth: int, min_score: float) -> list[int]:
        """The rows that are most worth a pass, frontier and stale ones together."""
        return [id for id, _ in islice(self._runnable(max_depth, min_score), width)]

    def unsent(self, root: int, sent: AbstractSet[int], max_depth: int, min_score: float) -> Iterator[int]:
        """Drafted rows that may be sent, best first, parents before children; none below ``min_score``."""
        tree, scores = self._tree, self.scores
        ready = [
            (-score, id)
            for id, score in scores.items()
            if score >= min_score and id not in sent and ((parent := tree[id].parent) == root or parent in sent)
        ]
        heapq.heapify(ready)
        while ready:
            _, id = heapq.heappop(ready)
            row = tree[id]
            if row.depth > max_depth:
                continue
            yield id
            for child in row.children.values():
                if scores[child] >= min_score:
                    heapq.heappush(ready, (-scores[child], child))

    def merge(
        self, parents: Sequence[int], tokens: NDArray[np.int64], log_probs: NDArray[np.float32], next_id: int
    ) -> list[Row]:
        """Take in one pass: children of ``parents``, [rows, k] tokens and log-probabilities, the likeliest first.

        Returns the new rows.

        Children that exist get the new score. Of the others the likeliest become rows, with draft ids from ``next_id``
        on: ``rows_per_pass``, or 2.5 per parent if that is more. Parents that died meanwhile get no children.
        """
        self.num_passes += 1
        self._ran.update((parent, self.num_passes) for parent in parents if parent in self._tree)
        living = [index for index, parent in enumerate(parents) if self._has_open_end(parent)]
        if not living:
            return []
        rows = [self._tree[parents[index]] for index in living]
        tokens, log_probs = tokens[living], log_probs[living]
        matches = [self._matches(row) for row in rows]
        scores = self._score_proposals(rows, tokens, log_probs, matches)  # [rows, children]
        added: list[Row] = []
        num_added = max(self.shape.rows_per_pass, 5 * len(parents) // 2)
        for place in np.argsort(-scores, axis=None, kind="stable")[:num_added].tolist():
            index, column = divmod(place, scores.shape[1])
            if scores[index, column] == -np.inf:
                break
            row = Row(next_id + len(added), rows[index].id, int(tokens[index, column]))
            edge = Edge(float(log_probs[index, column]), matches[index].get(row.token, 0))
            added.append(self._add(row, edge, float(scores[index, column])))
        return added + self._look_up([row.id for row in added], next_id + len(added))

    def _has_open_end(self, id: int) -> bool:
        row = self._tree.get(id)
        return row is not None and not row.is_committed

    def _score_proposals(
        self,
        rows: Sequence[TreeRow],
        tokens: NDArray[np.int64],
        log_probs: NDArray[np.float32],
        matches: Sequence[dict[int, int]],
    ) -> NDArray[np.float64]:
        """The scores [rows, children] of proposals that may become rows.

        A proposal that is a row already gets its new score, and minus infinity in the result.
        """
        best = log_probs[:, : self.shape.children]
        chances = best.astype(np.float64) if self._acceptance is None else self._acceptance.log_chances(best)
        bases = [self.scores.get(row.id, 0.0) for row in rows]
        scores: NDArray[np.float64] = chances + np.array(bases)[:, None]
        for index, (row, base, matched) in enumerate(zip(rows, bases, matches, strict=True)):
            if not matched and not row.children:
                continue
            columns = {token: column for column, token in enumerate(tokens[index].tolist())}
            for token in {**matched, **row.children}:
                column = columns.get(token)
                # A token that the draft does not propose is less likely than all that it proposes.
                log_prob = float(log_probs[index, -1] - 1 if column is None else log_probs[index, column])
                edge = Edge(log_prob, matched.get(token, 0))
                score = base + self._log_chance(edge)
                child = row.children.get(token)
                if child is not None:
                    self._score(child, edge, score)
                if column is not None and column < scores.shape[1]:
                    scores[index, column] = score if child is None else -np.inf
        return scores

    def _runnable(self, max_depth: int, min_score: float, since: int = 0) -> Iterable[tuple[int, bool]]:
        """Rows that the drafter can run, the most worthwhile first, and whether each would run for the first time."""
        ran, tree = self._ran, self._tree
        ready: list[tuple[float, int, bool]] = []
        for id, score in self.scores.items():
            if score < min_score:
                continue
            row = tree[id]
            parent_ran, row_ran = ran.get(row.parent, 0), ran.get(id, 0)
            if parent_ran <= since or row.depth >= max_depth:
                continue
            if row_ran <= since:
                ready.append((-score, id, True))
            elif row_ran < parent_ran and score + REFRESH_SCORE >= min_score:
                ready.append((-score - REFRESH_SCORE, id, False))
        heapq.heapify(ready)
        while ready:
            _, id, is_first = heapq.heappop(ready)
            yield id, is_first

    def _look_up(self, ids: Sequence[int], next_id: int) -> list[Row]:
        """Add what lookup proposes below these rows and below the added ones, the likeliest first."""
        added: list[Row] = []
        ready = [(-self.scores.get(id, 0.0), id) for id in ids] if self._lookup is not None else []
        heapq.heapify(ready)
        while ready and len(added) < LOOKUP_ROWS:
            negative_score, id = heapq.heappop(ready)
            row = self._tree[id]
            token, match = next(iter(self._matches(row).items()), (0, 0))
            if not match or row.is_committed or token in row.children:
                continue
            edge = Edge(None, match)
            score = -negative_score + self._log_chance(edge)
            if score >= LOOKUP_MIN_SCORE:
                added.append(self._add(Row(next_id + len(added), id, token), edge, score))
                heapq.heappush(ready, (-score, added[-1].id))
        return added

    def _matches(self, row: TreeRow) -> dict[int, int]:
        """What the text proposes after a row: token -> length of the match, the longest first."""
        if self._lookup is None or row.parent == NO_PARENT:
            return {}
        if not self._lookup.has(self._tree[row.parent].token, row.token):
            return {}
        path: list[int] = []
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
