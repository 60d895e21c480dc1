"""``flowspec`` without one of its mechanisms, to see what each is worth."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule
from flowspec_edge.core.speculation.schedules.flowspec import Flowspec

CHUNK_ROWS = 16
"""The most rows of a chunk where costs do not decide how many."""
TREE_PASSES = 6
"""Passes of the drafter that make a whole tree."""


class WithoutScoreOrder(Flowspec):
    """Rows leave in the order in which they were drafted."""

    def _candidates(self, view: GenerationView) -> Iterable[tuple[int, float]]:
        return sorted(super()._candidates(view))


class WithoutTree(Flowspec):
    """A chain: of each row's children only the likeliest one leaves."""

    def _candidates(self, view: GenerationView) -> Iterable[tuple[int, float]]:
        tree, scores = view.tree, view.drafting.scores
        chosen = {view.root, *view.sent}
        for id, score in super()._candidates(view):
            parent = tree[id].parent
            if parent in chosen and id == max(tree[parent].children.values(), key=scores.__getitem__):
                chosen.add(id)
                yield id, score


class WithoutChunkControl(Flowspec):
    """Chunks of a fixed size, whatever a row costs."""

    def _worth_of_rows(self, view: GenerationView) -> tuple[int, float, float, float]:
        return CHUNK_ROWS, 0.0, 0.0, 0.0


class WithoutJustInTime(Flowspec):
    """Chunks leave as soon as there is credit."""

    def _leaves_at(self, view: GenerationView, rows: list[int], entry: float, now: float) -> float:
        return now


class WithoutCalibration(Flowspec):
    """The draft's own probability is taken for the chance of acceptance. Lookup has none, so it is off too."""

    is_calibrated: ClassVar[bool] = False
    uses_lookup: ClassVar[bool] = False


class WithoutLookup(Flowspec):
    """Nothing is drafted from the text itself."""

    uses_lookup: ClassVar[bool] = False


class WithoutCoupling(Flowspec):
    """Drafts know nothing of the noise that the target will be sampled with; at temperature 0 there is none."""

    is_coupled: ClassVar[bool] = False


class WithoutCancelling(Flowspec):
    """A forward over rows that have died runs to its end."""

    cancels: ClassVar[bool] = False


class _CountsPasses(Flowspec):
    """Knows when the tree below a new root is drafted: after TREE_PASSES, or when the drafter finds no more to run."""

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._num_passes = 0  # since the root was last drafted anew

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        rows = super().choose_pass(view, now)
        self._num_passes += rows is not None
        return rows

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        super().take_verified(view, num_tokens, now)
        if view.root not in view.sent:
            self._num_passes = 0

    def _is_tree_drafted(self, view: GenerationView, now: float) -> bool:
        if self._num_passes < TREE_PASSES and not view.is_computing:
            return super().choose_pass(view, now) is None
        return self._num_passes >= TREE_PASSES


class WithoutExpansion(_CountsPasses):
    """Nothing is drafted below a tree that is under way."""

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        return None if self._num_passes >= TREE_PASSES else super().choose_pass(view, now)


class WithoutImmediateRoot(_CountsPasses):
    """A new root waits for its tree."""

    def _leaves_at(self, view: GenerationView, rows: list[int], entry: float, now: float) -> float:
        if rows[0] == view.root and not self._is_tree_drafted(view, now):
            return math.inf
        return super()._leaves_at(view, rows, entry, now)


class WithoutIncrementalDrafting(_CountsPasses):
    """Children leave when the whole tree is drafted."""

    def _rows_worth_sending(self, view: GenerationView) -> tuple[list[int], float]:
        rows, entry = super()._rows_worth_sending(view)
        return (rows[:1] if rows and rows[0] == view.root else rows), entry

    def _leaves_at(self, view: GenerationView, rows: list[int], entry: float, now: float) -> float:
        if rows[0] != view.root and not self._is_tree_drafted(view, now):
            return math.inf
        return super()._leaves_at(view, rows, entry, now)


ABLATIONS: dict[str, type[Schedule]] = {
    "flowspec-without-score-order": WithoutScoreOrder,
    "flowspec-without-expansion": WithoutExpansion,
    "flowspec-without-immediate-root": WithoutImmediateRoot,
    "flowspec-without-incremental-drafting": WithoutIncrementalDrafting,
    "flowspec-without-just-in-time": WithoutJustInTime,
    "flowspec-without-chunk-control": WithoutChunkControl,
    "flowspec-without-calibration": WithoutCalibration,
    "flowspec-without-coupling": WithoutCoupling,
    "flowspec-without-cancelling": WithoutCancelling,
    "flowspec-without-lookup": WithoutLookup,
    "flowspec-without-tree": WithoutTree,
}
