"""The bound of a ring: the most tokens/s that it could reach with a drafter, by Little's law over the draft rows under
way.

A token comes back one trip after its row left. So during one trip a ring gives at most the tokens of a draft tree of as
many rows as are under way, which makes ``tau(rows under way) / trip`` tokens/s. ``tau(n)`` is the acceptance length of
the drafter's best tree of ``n`` rows, root and bonus token included (``tokens_of_best_rows`` in
core/planning/throughput.py). It is counted here on the target's own text, with as much time for drafting as it takes.
``trip`` is the time of one trip without waiting, head included, for chunks of the run's mean size.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

from flowspec_edge.bench.tape import Tape
from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import Row
from flowspec_edge.core.speculation.verify import Sampler
from flowspec_edge.engine.drafters.drafter import Drafter

SESSION = 1
ROOTS_STRIDE = 2
"""Every second root is enough for the table of a testbed: that is about a thousand trees."""
PASS_ROWS = 24
MAX_PASSES = 10
"""Levels of a tree at most. MIN_SCORE ends most trees earlier."""
MIN_SCORE = math.log(0.001)
"""A row less likely than this is left out, since it does not change tau."""


def accepted_places(
    tape: Tape, drafter: Drafter, roots: Sequence[int], sampler: Sampler | None = None
) -> list[tuple[int, ...]]:
    """For every second root: the rows of its draft tree that follow the text, by their places in the order of scores.

    ``roots`` are positions in the text. Places count from 1; the root's own place is 0. With the text's ``sampler``,
    scores include the noise with which it draws.
    """
    tokens = tape.tokens
    drafter.open(SESSION, len(tokens) + MAX_PASSES * PASS_ROWS)
    places: list[tuple[int, ...]] = []
    num_extended = 0
    dropped: tuple[int, ...] = ()
    next_id = len(tokens)  # rows of the text have their position as draft id; no id of a drafted row is used twice
    for root in roots[::ROOTS_STRIDE]:
        verified = range(num_extended + 1, root + 1)
        tree = _Tree(tape, root, next_id, sampler)
        rows = [Row(i, i - 1, tokens[i]) for i in verified]
        hidden = tape.hidden[[i - 1 for i in verified]]
        parents: Sequence[int] = [root]
        for _ in range(MAX_PASSES):
            positions = np.array([tree.depth(row.id) - 1 for row in rows], np.int64)
            tree.add(parents, drafter.run(ev.RunDraft(SESSION, tuple(rows), positions, hidden, dropped)))
            dropped = ()
            rows = tree.frontier()
            if not rows:
                break
            parents = [row.id for row in rows]
            hidden = np.zeros((0, 0), np.float32)
        path = tree.accepted()
        if root + len(path) + 1 < len(tokens):  # otherwise the text ends before the tree does
            places.append(path)
        next_id, dropped, num_extended = tree.next_id, tree.expanded, root
    drafter.close(SESSION)
    return places


class _Tree:
    """One draft tree below a root of the text."""

    def __init__(self, tape: Tape, root: int, first_id: int, sampler: Sampler | None) -> None:
        self._sampler = sampler
        self._tokens = tape.tokens
        self._root = root
        self.next_id = first_id
        self._rows: dict[int, tuple[int, int, float, int]] = {}  # parent, token, score, depth
        self._unexpanded: list[tuple[float, int]] = []
        self.expanded: tuple[int, ...] = ()

    def depth(self, id: int) -> int:
        return self._rows[id][3] if id in self._rows else id

    def add(self, parents: Sequence[int], drafted: ev.DraftFinished) -> None:
        tokens, log_probs = drafted.tokens, drafted.log_probs
        depths = [self.depth(parent) + 1 for parent in parents]
        if self._sampler is not None:
            log_probs = self._sampler.foresee(tokens, log_probs, depths)
        for index, (parent, depth) in enumerate(zip(parents, depths, strict=True)):
            base = self._rows[parent][2] if parent in self._rows else 0.0
            for token, log_prob in zip(tokens[index].tolist(), log_probs[index].tolist(), strict=True):
                score = base + log_prob
                if score >= MIN_SCORE:
                    self._rows[self.next_id] = (parent, token, score, depth)
                    heapq.heappush(self._unexpanded, (-score, self.next_id))
                    self.next_id += 1

    def frontier(self) -> list[Row]:
        """The likeliest rows that have no children yet. They count as expanded from now on."""
        best = [heapq.heappop(self._unexpanded)[1] for _ in range(min(PASS_ROWS, len(self._unexpanded)))]
        self.expanded += tuple(best)
        return [Row(id, self._rows[id][0], self._rows[id][1]) for id in best]

    def accepted(self) -> tuple[int, ...]:
        """The places, in the order of scores, of the rows that follow the text."""
        order = sorted(self._rows, key=lambda id: (-self._rows[id][2], id))
        place = {id: number for number, id in enumerate(order, 1)}
        children = {(parent, token): id for id, (parent, token, _, _) in self._rows.items()}
        path = []
        at: int | None = self._root
        for token in self._tokens[self._root + 1 :]:
            at = children.get((at, token)) if at is not None else None
            if at is None:
                break
            path.append(place[at])
        return tuple(path)
