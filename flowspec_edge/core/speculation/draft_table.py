"""The drafted part of a tree as columns of one table, so that all of it is scored or searched in one step.

A tree has up to some 400 drafts, and most of what is asked concerns all of them: which are likeliest, which are not
sent, which the drafter could run. numpy answers that in microseconds, about as quickly for 400 drafts as for 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.speculation.acceptance import Ints, Reals
from flowspec_edge.core.speculation.lookup import pair_of
from flowspec_edge.core.speculation.tree import Tree

ROOM = 512
"""Rows for which a table has room to begin with: for MAX_TREE_ROWS, and for those of a last pass."""

NUM_INTS, NUM_REALS = 8, 3
"""Columns of whole numbers, and of others."""

Many = Ints | NDArray[np.floating[Any]] | Sequence[int] | Sequence[float] | int | float
"""Values of a column, or one for all rows."""


class LikelyDrafts(NamedTuple):
    """Drafted rows as columns of one length, parents before children; ``chances`` are those of the whole path."""

    ids: list[int]
    parents: list[int]
    tokens: list[int]
    positions: list[int]
    is_sent: list[bool]
    chances: list[float]


class DraftTable:
    """The root, at place 0, and all rows drafted below it, in the order of their draft ids: parents before children.

    It is empty until a root is set. The root's score is 0, and it is its own parent.
    """

    ids: Ints
    parents: Ints
    """Each row's parent, by its place in the table."""
    tokens: Ints
    pairs: Ints
    """Each row's parent's token and its own, as lookup has them."""
    depths: Ints
    matches: Ints
    """How many tokens before the row match an earlier place of the text after which its token came; 0 for none."""
    ran: Ints
    """The number of the pass that ran the row last, from 1; 0 for none."""
    sent: Ints
    """1 where the row has left the origin, 0 where it has not."""
    log_probs: Reals
    """The draft's own log-probabilities; NaN where no pass has run the parent."""
    log_chances: Reals
    """The logs of the chances that the target takes each row, given that it has taken the parent."""
    scores: Reals
    """The logs of the chances that the text goes on from the root through each row."""

    def __init__(self) -> None:
        self._ints = np.zeros((NUM_INTS, ROOM), np.int64)
        self._reals = np.zeros((NUM_REALS, ROOM))
        self._show(0)

    def __len__(self) -> int:
        """The number of drafts, without the root."""
        return max(len(self.ids) - 1, 0)

    def places(self, ids: Sequence[int]) -> Ints:
        """The place of each of these rows; -1 where it is not in the table."""
        wanted = np.array(ids, np.int64)
        places = self.ids.searchsorted(wanted)  # they ascend
        places[self.ids.take(places, mode="clip") != wanted] = -1
        return places

    def children_of(self, places: Ints) -> tuple[Ints, Ints]:
        """The places of all children of these rows, and for each which of the ``places`` is its parent's."""
        numbers = np.zeros(len(self.ids), np.int64)
        numbers[places] = np.arange(1, len(places) + 1)
        numbers = numbers[self.parents]
        numbers[0] = 0
        children = numbers.nonzero()[0]
        return children, numbers[children] - 1

    def best(self, is_chosen: NDArray[np.bool_]) -> Ints:
        """The places of the drafts that are chosen, of all rows, best first and parents before children."""
        is_chosen[:1] = False  # never the root
        places = is_chosen.nonzero()[0]
        return places[(-self.scores[places]).argsort(kind="stable")]

    def likeliest(self, num_rows: int) -> LikelyDrafts:
        """Of the drafts those that have left and then the likeliest, at most ``num_rows``."""
        order = np.lexsort((-self.scores[1:], -self.sent[1:]))[:num_rows] + 1  # stable, and parents have lower places
        return LikelyDrafts(
            self.ids[order].tolist(),
            self.ids[self.parents[order]].tolist(),
            self.tokens[order].tolist(),
            self.depths[order].tolist(),
            self.sent[order].astype(np.bool_).tolist(),
            np.exp(self.scores[order]).round(4).tolist(),
        )

    def append(
        self,
        first_id: int,
        *,
        parents: Many,
        tokens: Ints | Sequence[int],
        depths: Many,
        matches: Many,
        log_probs: Many,
        log_chances: Many,
        scores: Many,
    ) -> None:
        """Take in rows with draft ids from ``first_id`` on, which are higher than all that are here. Their parents are
        here or before them.
        """
        first, last = len(self.ids), len(self.ids) + len(tokens)
        if last > self._ints.shape[1]:
            self._ints = np.concatenate([self._ints, np.zeros((NUM_INTS, last), np.int64)], axis=1)
            self._reals = np.concatenate([self._reals, np.zeros((NUM_REALS, last))], axis=1)
        self._show(last)
        new = slice(first, last)
        self.ids[new] = np.arange(first_id, first_id + len(tokens))
        self.parents[new], self.tokens[new], self.depths[new], self.matches[new] = parents, tokens, depths, matches
        self.pairs[new] = pair_of(self.tokens[self.parents[new]], self.tokens[new])
        self.ran[new] = self.sent[new] = 0
        self.log_probs[new], self.log_chances[new], self.scores[new] = log_probs, log_chances, scores

    def move_root(self, root: int, token: int, depth: int) -> None:
        """Keep the row ``root`` and what is below it. ``token`` and ``depth`` are needed where it was not drafted."""
        (place,) = self.places([root]) if len(self.ids) else (-1,)
        if place < 0:
            self._show(0)
            self.append(
                root,
                parents=0,
                tokens=[token],
                depths=depth,
                matches=0,
                log_probs=np.nan,
                log_chances=0.0,
                scores=0.0,
            )
            return
        is_kept = np.zeros(len(self.ids), np.bool_)
        is_kept[place] = True
        above = self.parents
        while True:  # each round doubles the part of the path that is searched for the root
            is_kept |= is_kept[above]
            if not np.count_nonzero(above):
                break
            above = above[above]
        kept = is_kept.nonzero()[0]
        self._ints[:, : len(kept)] = self._ints.take(kept, axis=1)
        self._reals[:, : len(kept)] = self._reals.take(kept, axis=1)
        self._show(len(kept))
        self.parents[:] = (is_kept.cumsum() - 1)[self.parents]
        self.parents[0] = 0

    def score(self) -> None:
        """Set all scores: of each row the sum of the log-chances on its path below the root."""
        self.log_chances[:1] = 0.0
        sums, above = self.log_chances, self.parents
        num_levels = int(np.maximum.reduce(self.depths) - self.depths[0]) if len(self) else 0
        for _ in range(num_levels.bit_length()):  # each round doubles the part of the path that is summed
            sums = sums + sums[above]
            above = above[above]
        self.scores[:] = sums

    def check(self, tree: Tree) -> None:
        """Assert the invariants: the table has what lives below the root, and each row has its parent's place."""
        if not len(self.ids):
            return
        ids = self.ids.tolist()
        assert ids == sorted([ids[0], *(row.id for row in tree.descendants(ids[0]))])
        columns = zip(ids, self.parents.tolist(), self.tokens.tolist(), self.depths.tolist(), strict=True)
        for id, place, token, depth in list(columns)[1:]:
            row = tree[id]
            assert (row.parent, row.token, row.depth) == (ids[place], token, depth)
        assert np.allclose(self.scores[1:], (self.scores[self.parents] + self.log_chances)[1:])
        assert (self.scores <= self.scores[self.parents]).all(), "a row counts as likelier than its parent"

    def _show(self, num_rows: int) -> None:
        ints, reals = self._ints[:, :num_rows], self._reals[:, :num_rows]
        self.ids, self.parents, self.tokens, self.pairs, self.depths, self.matches, self.ran, self.sent = ints
        self.log_probs, self.log_chances, self.scores = reals
