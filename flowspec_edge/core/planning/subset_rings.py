"""Finds the best ring of given devices, for chunks of one size: how many blocks each takes, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from flowspec_edge.core.planning.ring_order import Integers, Numbers, Paths, read_order, shortest_paths
from flowspec_edge.core.planning.ring_problem import (
    EPSILON,
    TOLERANCE_MS,
    FoundRing,
    RingProblem,
    measure_ring,
    rate_of,
)

NUM_WIRE_CLASSES = 4
"""Links are sorted into so many classes by speed, each with shortest paths of its own over links at least as quick.

Paths over quicker links are used where a slow link would set the pace.
"""


class Ways:
    """The shortest ways around the ring, by latency and by the time of a row, over all links or over quick ones."""

    def __init__(self, problem: RingProblem) -> None:
        self._problem = problem
        rows = np.unique(problem.row[np.isfinite(problem.row)])
        self._row_limits = np.unique(rows[np.linspace(0, len(rows) - 1, NUM_WIRE_CLASSES).round().astype(int)])
        self.latency, self.row = Paths(problem.latency), Paths(problem.row)

    def wire_classes(self, row_ms: Numbers) -> Integers:
        """The number of the narrowest class that holds all links that take at most ``row_ms`` for a row."""
        found: Integers = np.searchsorted(self._row_limits, row_ms - TOLERANCE_MS)
        return np.minimum(found, len(self._row_limits) - 1)

    def within(self, hop: Numbers, wire_class: int) -> Paths:
        """The shortest ways over the links of one class."""
        return Paths(np.where(self._problem.row <= self._row_limits[wire_class] + TOLERANCE_MS, hop, np.inf))


class SubsetRings:
    """All rings with chunks of one size."""

    def __init__(self, problem: RingProblem, ways: Ways, num_rows: int) -> None:
        self._problem, self._ways, self._num_rows = problem, ways, num_rows
        self._stage, self._last = problem.stage[num_rows], problem.last[num_rows]
        self._hop, self._wire = problem.latency + num_rows * problem.row, num_rows * problem.row
        fits = np.isfinite(self._stage[:, 2:])
        steps = np.subtract(self._stage[:, 2:], self._stage[:, 1:-1], out=np.full(fits.shape, np.inf), where=fits)
        slope = steps.min(axis=1, initial=np.inf)  # one more block costs at least this
        # 0 for devices that are in no subset.
        self._first = np.where(np.isfinite(self._stage[:, 1]), self._stage[:, 1], 0.0)
        self._slope = np.where(np.isfinite(slope), slope, np.maximum(self._first, 1.0))
        self._by_slope = np.argsort(self._slope, kind="stable")
        self._widest_wire = float(self._wire[np.isfinite(self._wire)].max(initial=0.0))
        self._is_simple = ways.latency.is_flat or ways.row.is_flat  # one table serves all sizes
        self._paths_within: dict[int, Paths] = {}  # by class of links
        self._known_paths: dict[tuple[int, int], tuple[list[int], Numbers, Numbers]] = {}

    def _least_path_ms(self, subsets: Integers, inside: Numbers, last: int | None, limit: float) -> Numbers:
        """A lower bound in ms of all hops over links that take no longer than about ``limit``."""
        latency, row = self._ways.latency, self._ways.row
        if self._is_simple:
            return latency.least_ms(subsets, inside, last) + self._num_rows * row.least_ms(subsets, inside, last)
        wire_class = int(self._ways.wire_classes(np.array(limit / self._num_rows)))
        if wire_class not in self._paths_within:
            self._paths_within[wire_class] = self._ways.within(self._hop, wire_class)
        return self._paths_within[wire_class].least_ms(subsets, inside, last)

    def better(self, subset: int, found: FoundRing | None) -> FoundRing | None:
        """The best ring of exactly these devices, if it beats ``found``."""
        members = [i for i in range(self._problem.num_devices) if subset >> i & 1]
        limits = self._limits(members, 0.0)
        inside = np.array([[subset >> i & 1] for i in range(self._problem.num_devices)], np.float64)
        for last in reversed(members):  # of equal devices, the last one becomes the last stage
            path = self._least_paths_ms(subset, inside, last, limits)
            trips = self._relaxed_ms(members, last, limits) + path + self._problem.head
            rates = self._problem.rate(self._num_rows, trips, limits, len(members))
            for at in np.argsort(-rates, kind="stable"):
                if not rates[at] > rate_of(found) * (1 + EPSILON):
                    break
                ring = self._ring(subset, members, last, float(limits[at]))
                if ring is not None and ring.tokens_per_s > rate_of(found) * (1 + EPSILON):
                    found = ring
        return found

    def _limits(self, members: Sequence[int], lowest: float) -> Numbers:
        """Every interval from ``lowest`` on that a ring of these devices can have."""
        problem = self._problem
        ends = [*members, problem.num_devices]
        busy = self._stage[members, 1:] + problem.beside[members, None]
        values = (busy, busy + self._last[members, None], self._wire[np.ix_(ends, ends)], np.array([problem.head]))
        every: Numbers = np.unique(np.concatenate([value.ravel() for value in values]))
        possible: Numbers = every[np.isfinite(every) & (every >= max(lowest, problem.head) - TOLERANCE_MS)]
        return possible

    def _least_paths_ms(self, subset: int, inside: Numbers, last: int, limits: Numbers) -> Numbers:
        """A lower bound in ms of the hops of one subset, for each of several limits."""
        if self._is_simple:
            return np.full(len(limits), self._least_path_ms(np.array([subset]), inside, last, np.inf)[0])
        classes = self._ways.wire_classes(limits / self._num_rows)
        out = np.zeros(len(limits))
        for wire_class in np.unique(classes):
            there = np.flatnonzero(classes == wire_class)
            members, hop, paths = self._paths(subset, float(limits[there[-1]]))
            at = members.index(last)
            out[there] = paths[at, -1] + hop[at, -1]
        return out

    def _relaxed_ms(self, members: list[int], last: int, limits: Numbers) -> Numbers:
        """A lower bound in ms of a trip's forwards, for each limit on how long a stage is busy.

        It is exact where costs are linear.
        """
        left = np.full(len(limits), self._problem.num_blocks - len(members))
        total: Numbers = np.full(len(limits), float(self._last[last]))
        for i in sorted(members, key=lambda i: float(self._slope[i])):
            fits = self._num_fitting(i, i == last, limits)
            take = np.clip(fits - 1, 0, left)
            left -= take
            total += np.where(fits > 0, self._stage[i, 1] + take * self._slope[i], np.inf)
        total[left > 0] = np.inf
        return total

    def _num_fitting(self, i: int, is_last: bool, limits: Numbers) -> Integers:
        """The number of blocks that device ``i`` runs within each of the limits."""
        beside = self._problem.beside[i] + (self._last[i] if is_last else 0.0)
        fitting: Integers = np.searchsorted(self._stage[i, 1:], limits - beside + TOLERANCE_MS, side="right")
        return fitting

    def _ring(self, subset: int, members: list[int], last: int, limit: float) -> FoundRing | None:
        """The cheapest ring with this last stage and this limit on the interval."""
        num_blocks = self._placed(members, last, limit)
        order = self._order(subset, last, limit)
        if num_blocks is None or order is None:
            return None
        return measure_ring(self._problem, order, [num_blocks[i] for i in order], self._num_rows)

    def _placed(self, members: list[int], last: int, limit: float) -> dict[int, int] | None:
        """The number of blocks of each device with which all forwards together take the least time."""
        best = np.full(self._problem.num_blocks + 1, np.inf)
        best[0] = 0.0
        takes: list[Integers] = []
        for i in members:
            after = np.full_like(best, np.inf)
            take = np.zeros(len(best), np.int64)
            for k in range(1, int(self._num_fitting(i, i == last, np.array(limit))) + 1):
                total = best[:-k] + self._stage[i, k]
                is_less = total < after[k:]
                after[k:][is_less] = total[is_less]
                take[k:][is_less] = k
            best = after
            takes.append(take)
        if not np.isfinite(best[-1]):
            return None
        left = self._problem.num_blocks
        placed = {}
        for i, take in zip(reversed(members), reversed(takes), strict=True):
            placed[i] = int(take[left])
            left -= placed[i]
        return placed

    def _order(self, subset: int, last: int, limit: float) -> list[int] | None:
        """The shortest way from the origin through a subset to ``last`` and back; None where its links are too slow."""
        if self._ways.row.is_flat and limit >= self._widest_wire:  # the latency alone decides
            return self._ways.latency.order(subset, last)
        wire_class = int(self._ways.wire_classes(np.array(limit / self._num_rows)))
        if wire_class in self._paths_within:
            order = self._paths_within[wire_class].order(subset, last)
            if order is None or all(
                self._wire[a, b] <= limit + TOLERANCE_MS for a, b in itertools.pairwise([-1, *order, -1])
            ):
                return order
        members, hop, paths = self._paths(subset, limit)
        at = members.index(last)
        if not np.isfinite(paths[at, -1] + hop[at, -1]):
            return None
        return [members[at] for at in read_order(paths, hop, at, paths.shape[1] - 1)]

    def _paths(self, subset: int, limit: float) -> tuple[list[int], Numbers, Numbers]:
        """The devices of a subset, the hops between them over links that are quick enough for ``limit``, and the
        shortest paths.
        """
        members = [i for i in range(self._problem.num_devices) if subset >> i & 1]
        ends = np.ix_([*members, -1], [*members, -1])
        is_quick = self._wire[ends] <= limit + TOLERANCE_MS
        key = (subset, int(is_quick.sum()))  # with a higher limit, links are only added
        if key not in self._known_paths:
            hop = np.where(is_quick, self._hop[ends], np.inf)
            self._known_paths[key] = (members, hop, shortest_paths(hop))
        return self._known_paths[key]
