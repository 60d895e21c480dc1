"""PipeDec: in each turn one level of the tree leaves. Rows whose parent has better features now are run again."""

from __future__ import annotations

from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule

LEVEL_ROWS = 16
"""Rows of a level at most: its likeliest ones."""


class Pipedec(Schedule):
    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._sent_in = 0  # the last turn in which a chunk was sent

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        return [] if self.turn == self._sent_in else self._level(view)

    def take_sent(self) -> None:
        self._sent_in = self.turn

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        drafting = view.drafting
        rows = self._unexpanded(view)
        rows += drafting.stale(LEVEL_ROWS - len(rows), view.max_depth)
        return rows if rows or view.num_unextended else None

    def next_turn(self, view: GenerationView, has_credit: bool) -> int | None:
        """A turn begins when what the last one returned is verified and the next level is drafted."""
        following = self.turn + 1
        flights = view.pipeline.flights
        if view.is_verifying or any(flight.turn <= following - self.num_stages for flight in flights):
            return None
        if not self._level(view) and (
            not flights or view.is_computing or view.num_unextended or self._unexpanded(view)
        ):
            return None
        if self._sent_in < self.turn and self._level(view) and (has_credit or not flights):
            return None  # this turn's chunk still waits for credit
        self.turn = following
        return self.turn

    @staticmethod
    def _unexpanded(view: GenerationView) -> list[int]:
        frontier = view.drafting.frontier(LEVEL_ROWS, view.max_depth)
        return [id for id in frontier if id in view.sent]

    @staticmethod
    def _level(view: GenerationView) -> list[int]:
        """The root, or the likeliest rows of the level below the deepest one sent."""
        if view.root not in view.sent:
            return [view.root]
        tree = view.tree
        unsent = [id for id, _ in view.unsent() if tree[id].parent in view.sent]
        deepest = max((tree[id].depth for id in view.drafting.scores if id in view.sent), default=0)
        deepest = max(deepest, tree[view.root].depth)
        return [id for id in unsent if tree[id].depth == deepest + 1][:LEVEL_ROWS]
