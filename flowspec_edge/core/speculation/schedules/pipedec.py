"""PipeDec: one level of the tree per stage time, the widest that a level may be, features refreshed on acceptance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowspec_edge.core.speculation.schedules.base import Schedule

if TYPE_CHECKING:
    from flowspec_edge.core.speculation.generation import Generation

LEVEL_ROWS = 16


class Pipedec(Schedule):
    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._sent_in = 0  # the last turn in which a chunk was sent

    def choose_rows(self, generation: Generation, now: float) -> list[int]:
        if self.turn == self._sent_in:
            return []
        rows = self._level(generation)
        if rows:
            self._sent_in = self.turn
        return rows

    def choose_pass(self, generation: Generation, now: float) -> list[int] | None:
        drafting = generation.drafting
        rows = self._unexpanded(generation)
        rows += drafting.stale(LEVEL_ROWS - len(rows), generation.max_depth)
        return rows if rows or generation.num_unextended else None

    def next_turn(self, generation: Generation, has_credit: bool) -> int | None:
        """A turn begins when what the last one returned is verified and the next level is drafted."""
        following = self.turn + 1
        flights = generation.pipeline.flights
        if generation.is_verifying or any(flight.turn <= following - self.num_stages for flight in flights):
            return None
        if not self._level(generation) and (
            not flights or generation.is_computing or generation.num_unextended or self._unexpanded(generation)
        ):
            return None
        if self._sent_in < self.turn and self._level(generation) and (has_credit or not flights):
            return None  # this turn's chunk still waits for credit
        self.turn = following
        return self.turn

    @staticmethod
    def _unexpanded(generation: Generation) -> list[int]:
        frontier = generation.drafting.frontier(LEVEL_ROWS, generation.max_depth)
        return [id for id in frontier if id in generation.sent]

    @staticmethod
    def _level(generation: Generation) -> list[int]:
        """The root, or the likeliest rows of the level below the deepest one sent."""
        if generation.root not in generation.sent:
            return [generation.root]
        tree = generation.tree
        unsent = [id for id in generation.unsent() if tree[id].parent in generation.sent]
        deepest = max((tree[id].depth for id in generation.drafting.scores if id in generation.sent), default=0)
        deepest = max(deepest, tree[generation.root].depth)
        return [id for id in unsent if tree[id].depth == deepest + 1][:LEVEL_ROWS]
