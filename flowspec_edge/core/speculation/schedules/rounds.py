"""Schedules that draft a whole tree before its root may leave: chunked, pruned, and FlowSpec as published.

A round begins with a new root: a tree is drafted, sorted by score and cut into chunks. It ends when the target's token
is not in the tree.
"""

from __future__ import annotations

import itertools
from collections import deque

from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule

TREE_ROWS = 80
"""Rows of a round's tree, the root included (FlowSpec, section 4.1)."""
TREE_PASSES = 6
"""Passes of the drafter for a round's tree: one per level."""
EXPANSION_ROWS = 64
"""Rows of the tree that is drafted anew after tokens were accepted (FlowSpec, section 3)."""
FRONTIER_PASSES = 2
"""Passes over the last frontier after a turn in which nothing was accepted (FlowSpec, section 3)."""


class Pruned(Schedule):
    """Chunks leave in score order, and each that comes back prunes the others. Nothing is drafted in the meantime."""

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._chunks: deque[list[int]] | None = None  # of this round, not sent yet; None while the tree is drafted
        # Numbers of passes: rows that ran up to the first one are to be run again; this tree has the passes since the
        # second one.
        self._drafted_since = self._counted_since = 0

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        if self._chunks is None and not self._plan(view):
            return []
        return self._chunks[0] if self._chunks else []

    def take_sent(self) -> None:
        if self._chunks:
            self._chunks.popleft()

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        return None if self._chunks is not None else self._grow(view, TREE_PASSES)

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        self._counted_since = view.drafting.num_passes
        if not self._holds_root(view):
            self._chunks = None
            self._drafted_since = view.drafting.num_passes
        elif self._chunks:
            living = [[id for id in chunk if self._is_open(view, id)] for chunk in self._chunks]
            self._chunks = deque(chunk for chunk in living if chunk)

    def _holds_root(self, view: GenerationView) -> bool:
        """Whether the root is a row of this round's tree."""
        waiting = self._chunks or ()
        return view.root in view.sent or any(view.root in chunk for chunk in waiting)

    def _grow(self, view: GenerationView, num_passes: int) -> list[int] | None:
        drafting = view.drafting
        if drafting.num_passes - self._counted_since >= num_passes:
            return None
        rows = drafting.frontier(drafting.shape.width, view.max_depth, self._drafted_since)
        return rows if rows or view.num_unextended else None

    def _plan(self, view: GenerationView) -> bool:
        """Cut the tree into chunks, one more than there are stages, once it is drafted."""
        if view.root in view.sent or view.is_computing or self.choose_pass(view, 0) is not None:
            return False
        rows = [view.root, *itertools.islice(view.unsent(), TREE_ROWS - 1)]
        size = -(-len(rows) // (self.num_stages + 1))
        self._chunks = deque(rows[start : start + size] for start in range(0, len(rows), size))
        return True

    @staticmethod
    def _is_open(view: GenerationView, id: int) -> bool:
        return id == view.root or id in view.drafting.scores


class Chunked(Pruned):
    """Pipeline parallelism over chunks of a tree that is verified when all of it has come back (Chunk-PP)."""

    def may_verify(self, view: GenerationView) -> bool:
        return not self._chunks and not view.pipeline.flights

    def _holds_root(self, view: GenerationView) -> bool:
        return False


class Lockstep(Pruned):
    """FlowSpec as published: in every turn each stage runs one chunk, and waits for the origin before the next."""

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._sent_in = 0  # the last turn in which a chunk was sent
        self._num_passes = 0  # that this turn's expansion may take
        self._was_accepted = False

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        if self.turn == self._sent_in:
            return []
        rows = super().choose_rows(view, now)
        if not rows and self._chunks is not None and view.root in view.sent:
            rows = self._expansion(view)
        return rows

    def take_sent(self) -> None:
        super().take_sent()
        self._sent_in = self.turn

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        return self._grow(view, TREE_PASSES if self._chunks is None else self._num_passes)

    def next_turn(self, view: GenerationView, has_credit: bool) -> int | None:
        """A turn begins when all that the last one returned is verified and the drafter has done its work for it."""
        if view.is_computing or self.choose_pass(view, 0) is not None:
            return None
        if self._chunks is None and not self._plan(view):
            return None
        following = self.turn + 1
        if any(flight.turn <= following - self.num_stages for flight in view.pipeline.flights):
            return None
        if self._sent_in < self.turn:
            if not view.pipeline.flights:
                return None
            if has_credit and (self._chunks or self._expansion(view)):
                return None  # this turn's chunk is about to leave
        self.turn = following
        self._counted_since = view.drafting.num_passes
        if self._was_accepted:
            self._drafted_since = view.drafting.num_passes
        self._num_passes = TREE_PASSES if self._was_accepted else FRONTIER_PASSES
        self._was_accepted = False
        return self.turn

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        super().take_verified(view, num_tokens, now)
        self._was_accepted = True

    def _expansion(self, view: GenerationView) -> list[int]:
        scores = view.drafting.scores
        best = set(sorted(scores, key=lambda id: -scores[id])[:EXPANSION_ROWS])
        rows: list[int] = []
        ready = {view.root, *view.sent}
        for id in view.unsent():
            if id in best and view.tree[id].parent in ready:  # a score may be older than its parent's
                rows.append(id)
                ready.add(id)
        return rows
