"""Schedules that draft a whole tree before its root may leave: chunked, pruned, and FlowSpec as published.

A round begins with a new root: a tree is drafted level by level, sorted by score and cut into chunks. It ends when the
target's token is not in the tree. The numbers are those of the published code.
"""

from __future__ import annotations

import itertools
from collections import deque

from flowspec_edge.core.limits import MAX_LIVING_ROWS
from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule

TREE_ROWS = 81
"""Rows of a round's tree: 80 drafts (FlowSpec, section 4.1) and the root."""
TREE_PASSES = 7
"""Passes of the drafter for a tree, one per level: the published depth of 6 does not count the root's own pass."""
EXPANSION_ROWS = 64
"""Rows below the root of the tree that is drafted anew after tokens were accepted (FlowSpec, section 3)."""
FRONTIER_ROWS = 48
"""Rows by which the tree grows in a turn after one in which nothing was accepted (FlowSpec, section 3)."""
FRONTIER_PASSES = 2
"""Passes of the drafter below the tree's last level in such a turn."""


class Rounds(Schedule):
    """The tree of a round: it is drafted, planned, and leaves in chunks."""

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._chunks: deque[list[int]] | None = None  # planned and not sent yet; None while a round's tree is drafted
        # Numbers of passes: those after the first one draft this tree, and the second one is its last.
        self._drafted_since, self._drafted_until = 0, TREE_PASSES

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        if self._chunks is None and not self._plan(view):
            return []
        return self._chunks[0] if self._chunks else []

    def take_sent(self) -> None:
        if self._chunks:
            self._chunks.popleft()

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        return None if self._chunks is not None else self._next_level(view)

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        self._chunks = None
        self._draft_anew(view)

    def _draft_anew(self, view: GenerationView) -> None:
        self._drafted_since = view.drafting.num_passes
        self._drafted_until = self._drafted_since + TREE_PASSES

    def _next_level(self, view: GenerationView) -> list[int] | None:
        """The likeliest rows of the level that the last pass has drafted; first of all the root alone."""
        drafting = view.drafting
        if drafting.num_passes >= self._drafted_until:
            return None
        rows: list[int] = []
        if drafting.num_passes > self._drafted_since:
            rows = drafting.frontier(drafting.shape.width, view.max_depth, drafting.num_passes - 1)
        return rows if rows or view.num_unextended else None

    def _plan(self, view: GenerationView) -> bool:
        """Cut the tree into chunks of about the same size, one more than there are stages, once it is drafted."""
        if view.root in view.sent or view.is_computing or self._next_level(view) is not None:
            return False
        rows = [view.root, *self._unsent(view, TREE_ROWS - 1)]
        num_chunks = self.num_stages + 1
        ends = [len(rows) * number // num_chunks for number in range(num_chunks + 1)]
        chunks = [rows[start:end] for start, end in itertools.pairwise(ends)]
        self._chunks = deque(chunk for chunk in chunks if chunk)
        return True

    def _unsent(self, view: GenerationView, num_rows: int) -> list[int]:
        """What is neither sent nor planned of the tree's ``num_rows`` likeliest rows."""
        tree = set(view.drafting.best_rows(num_rows, self._drafted_since))
        tree.difference_update(*(self._chunks or ()))
        return [id for id, _ in view.unsent() if id in tree]


class Chunked(Rounds):
    """Pipeline parallelism over chunks of a tree that is verified when all of it has come back (Chunk-PP)."""

    def may_verify(self, view: GenerationView) -> bool:
        return not self._chunks and not view.pipeline.flights


class Pruned(Rounds):
    """In every turn each stage runs one chunk. Each chunk that comes back prunes the others before the next turn."""

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._sent_in = 0  # the last turn in which a chunk was sent

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        return [] if self.turn == self._sent_in else super().choose_rows(view, now)

    def take_sent(self) -> None:
        super().take_sent()
        self._sent_in = self.turn

    def next_turn(self, view: GenerationView, has_credit: bool) -> int | None:
        """A turn begins when all that the last one returned is verified."""
        if self._chunks is None and not self._plan(view):
            return None
        following, flights = self.turn + 1, view.pipeline.flights
        if view.is_verifying or any(flight.turn <= following - self.num_stages for flight in flights):
            return None
        may_leave = has_credit or not view.pipeline.num_delayed
        if self._sent_in < self.turn and (not flights or (may_leave and self._chunks)):
            return None  # this turn's chunk is about to leave
        self.turn = following
        return self.turn

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        living = {view.root, *view.drafting.scores}
        waiting = [[id for id in chunk if id in living] for chunk in self._chunks or ()]
        if view.root in view.sent or any(view.root in chunk for chunk in waiting):
            self._chunks = deque(chunk for chunk in waiting if chunk)
        else:
            super().take_verified(view, num_tokens, now)


class Lockstep(Pruned):
    """FlowSpec as published: while the stages run, the tree is drafted anew or grows, and its new rows leave next."""

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._num_rows = 0  # of the expanded tree below its root; 0 until the round's first chunk has come back
        self._was_accepted = False
        self._is_expanding = False

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        return self._next_level(view)

    def next_turn(self, view: GenerationView, has_credit: bool) -> int | None:
        """A turn begins when all that the last one returned is verified and the drafter has done its work for it."""
        if self._is_expanding and not self._line_up(view):
            return None
        turn = super().next_turn(view, has_credit)
        if turn is not None:
            self._expand(view)
        return turn

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        super().take_verified(view, num_tokens, now)
        self._was_accepted = self._chunks is not None
        if not self._was_accepted:
            self._num_rows, self._is_expanding = 0, False

    def _expand(self, view: GenerationView) -> None:
        """Begin this turn's expansion, where a chunk of the round has come back."""
        if self._was_accepted:
            self._draft_anew(view)
            self._num_rows = EXPANSION_ROWS
        elif self._num_rows:
            self._drafted_until = view.drafting.num_passes + FRONTIER_PASSES
            self._num_rows += FRONTIER_ROWS
        self._was_accepted, self._is_expanding = False, self._num_rows > 0

    def _line_up(self, view: GenerationView) -> bool:
        """Plan the expansion's new rows as one chunk, once they are drafted."""
        assert self._chunks is not None, "only a round's tree is expanded"
        is_drafted = view.drafting.num_passes >= self._drafted_until
        if not is_drafted and (view.is_computing or self._next_level(view) is not None):
            return False
        self._is_expanding = False
        room = MAX_LIVING_ROWS - view.num_living_sent - sum(map(len, self._chunks))
        if rows := self._unsent(view, self._num_rows)[: max(room, 0)]:
            self._chunks.append(rows)
        return True
