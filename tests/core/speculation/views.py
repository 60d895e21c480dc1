"""A ``GenerationView`` made by hand, of which nothing can be changed: whoever tries meets an error."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flowspec_edge.core.line import Line

ROOT = 0
FAR = 1000
"""A depth that nothing reaches."""


@dataclass(frozen=True)
class RowStub:
    parent: int
    depth: int
    children: Mapping[int, int]


@dataclass(frozen=True)
class FitStub:
    line: Line = Line()


@dataclass(frozen=True)
class CostsStub:
    """One stage of ``stage`` seconds."""

    is_measured: bool = True
    head: FitStub = FitStub()
    draft: FitStub = FitStub(Line(0.010, 0.001))
    stage: Line = Line(0.100)
    seconds_per_row: float = 0.0
    plain_token_s: float = 0.2

    @property
    def row_s(self) -> float:
        return self.stage.per_row

    @property
    def single_row_s(self) -> float:
        return self.stage.at(1)

    def interval_s(self, num_rows: float, /) -> float:
        return self.stage.at(num_rows)


@dataclass(frozen=True)
class FlightStub:
    turn: int = 0
    living: frozenset[int] = frozenset()
    sent_at: float = 0.0


@dataclass(frozen=True)
class PipelineStub:
    costs: CostsStub = CostsStub()
    flights: tuple[FlightStub, ...] = ()
    leaves_at: float = 0.0
    back_at: float | None = None
    num_delayed: float = 0
    blocks_for_s: float = 0.0

    @property
    def plain_token_s(self) -> float:
        return self.costs.plain_token_s

    def send_at(self, num_rows: int, /) -> float:
        return self.leaves_at

    def returns_at(self) -> float | None:
        return self.back_at

    def blocked_s(self, num_rows: int, leaves_at: float, known_at: float, /) -> float:
        return self.blocks_for_s


@dataclass(frozen=True)
class ShapeStub:
    width: int = 10


@dataclass(frozen=True)
class DraftingStub:
    """``ran``: per row, the number of the pass that ran it last."""

    tree: Mapping[int, RowStub]
    scores: Mapping[int, float]
    ran: Mapping[int, int]
    num_passes: int
    shape: ShapeStub = ShapeStub()

    def __len__(self) -> int:
        return len(self.scores)

    def frontier(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        return [id for id in self._below_what_ran(max_depth, since) if self.ran.get(id, 0) <= since][:width]

    def stale(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        below = self._below_what_ran(max_depth, since)
        return [id for id in below if since < self.ran.get(id, 0) < self.ran[self.tree[id].parent]][:width]

    def next_pass(self, width: int, max_depth: int, min_score: float) -> list[int]:
        return [id for id in self.frontier(FAR, max_depth) if self.scores[id] >= min_score][:width]

    def best_rows(self, most: int, since: int = 0) -> list[int]:
        return self._below_what_ran(FAR + 1, since)[:most]

    def _below_what_ran(self, max_depth: int, since: int) -> list[int]:
        best = sorted(self.scores, key=lambda id: (-self.scores[id], id))
        tree, ran = self.tree, self.ran
        return [id for id in best if ran.get(tree[id].parent, 0) > since and tree[id].depth < max_depth]


@dataclass(frozen=True)
class View:
    """See ``make_view``."""

    tree: Mapping[int, RowStub]
    drafting: DraftingStub
    pipeline: PipelineStub = PipelineStub()
    root: int = ROOT
    sent: frozenset[int] = frozenset()
    max_depth: int = FAR
    num_unextended: int = 0
    is_computing: bool = False
    is_verifying: bool = False

    @property
    def num_living_sent(self) -> int:
        return len(self.sent & self.drafting.scores.keys())

    def unsent(self, min_score: float = float("-inf"), /) -> Iterator[tuple[int, float]]:
        ready = {self.root, *self.sent}
        waiting = {id for id, score in self.drafting.scores.items() if id not in self.sent and score >= min_score}
        while free := [id for id in waiting if self.tree[id].parent in ready and self.tree[id].depth <= self.max_depth]:
            best = min(free, key=lambda id: (-self.drafting.scores[id], id))
            waiting.remove(best)
            ready.add(best)
            yield best, self.drafting.scores[best]


def make_view(
    drafted: Mapping[int, tuple[int, float]] | None = None,
    *,
    root: int = ROOT,
    ran: Mapping[int, int] | None = None,
    num_passes: int = 0,
    width: int = 10,
    pipeline: PipelineStub | None = None,
    **changes: Any,
) -> View:
    """A root at depth 0 and, by draft id, the parent and the chance of each drafted row. A row's token is its id."""
    drafted = drafted or {}
    depths = {root: 0}
    for id, (parent, _) in drafted.items():
        depths[id] = depths[parent] + 1
    tree = {
        id: RowStub(
            parent=drafted[id][0] if id in drafted else -1,
            depth=depth,
            children=MappingProxyType({child: child for child, (parent, _) in drafted.items() if parent == id}),
        )
        for id, depth in depths.items()
    }
    drafting = DraftingStub(
        MappingProxyType(tree),
        MappingProxyType({id: math.log(chance) for id, (_, chance) in drafted.items()}),
        MappingProxyType(dict(ran or {})),
        num_passes,
        ShapeStub(width),
    )
    return View(MappingProxyType(tree), drafting, pipeline or PipelineStub(), root, **changes)


def changed(view: View, **changes: Any) -> View:
    """The same view a moment later."""
    return dataclasses.replace(view, **changes)
