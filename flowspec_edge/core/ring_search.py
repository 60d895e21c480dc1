"""The best ring of some devices: which of them, in which order, with how many layer blocks each. Exact.

Three nested programs. For a subset of devices, a chunk size and a limit on the interval, each device can run so many blocks,
and the cheapest way to place all of them is a small dynamic program (`_placed`). The cheapest order of a subset is another one
(core/ring_order.py). And limits and subsets are searched best first: what they can bring at most is computed for all subsets
at once, ranges of limits are halved, and whatever cannot beat the best ring found is dropped.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowspec_edge.core.ring_order import Integers, Numbers, Paths, read_order, shortest_paths
from flowspec_edge.core.ring_problem import EPSILON, TOLERANCE_MS, FoundRing, RingProblem, measure_ring, rate_of

NUM_WIRE_CLASSES = 4
"""Shortest paths are known for so many classes of links: where a slow wire would set the pace, quicker ones are taken."""


class RingSearch:
    """Searches for the best ring, with a device or without; what is known of subsets is kept from one search to the next."""

    def __init__(self, problem: RingProblem) -> None:
        self.problem = problem
        rows = np.unique(problem.row[np.isfinite(problem.row)])
        self._row_limits = np.unique(rows[np.linspace(0, len(rows) - 1, NUM_WIRE_CLASSES).round().astype(int)])
        self.latency_paths, self.row_paths = Paths(problem.latency), Paths(problem.row)
        own = [*problem.stage.values(), *(last[:, None] for last in problem.last.values()), problem.beside[:, None]]
        self._own = np.concatenate(own, axis=1)
        self._sizes = {num_rows: _Size(self, num_rows) for num_rows in problem.stage}

    def best(self, found: FoundRing | None = None) -> FoundRing | None:
        """The best ring; ``found`` where none is better than that, and None where the blocks do not fit."""
        subsets = self._subsets()
        if not len(subsets):
            return found
        inside = (subsets[None, :] >> np.arange(self.problem.num_devices)[:, None] & 1).astype(np.float64)
        sums = self.latency_paths.sum_ms(inside), self.row_paths.sum_ms(inside)
        bounds = [(size.bound(subsets, inside, sums), size) for size in self._sizes.values()]
        bounds.sort(key=lambda pair: -float(pair[0].rate.max()))
        bound, size = bounds[0]
        found = size.better(int(subsets[np.argmax(bound.rate)]), found)  # something to compare with
        for bound, size in bounds:
            found = size.search(bound, found)
        return found

    def best_of(self, devices: Collection[int], num_rows: int | None = None) -> FoundRing | None:
        """The best ring of exactly these devices, with chunks of ``num_rows`` if that is given; None where the blocks do not
        fit, or are fewer than the devices.
        """
        found = None
        for size in self._sizes.values() if num_rows is None else [self._sizes[num_rows]]:
            found = size.better(sum(1 << i for i in devices), found)
        return found

    def wire_classes(self, row_ms: Numbers) -> Integers:
        """Numbers of the narrowest classes that hold all links that take at most so long for a row."""
        found: Integers = np.searchsorted(self._row_limits, row_ms - TOLERANCE_MS)
        return np.minimum(found, len(self._row_limits) - 1)

    def within(self, hop: Numbers, wire_class: int) -> Paths:
        """Shortest ways over links of that class."""
        return Paths(np.where(self.problem.row <= self._row_limits[wire_class] + TOLERANCE_MS, hop, np.inf))

    def _subsets(self) -> Integers:
        """Subsets that can hold all blocks, without those in which a better device could take a worse one's place."""
        problem = self.problem
        subsets = np.arange(1, 2**problem.num_devices, dtype=np.int64)
        capacity = np.isfinite(next(iter(problem.stage.values()))[:, 1:]).sum(axis=1)
        for j in range(problem.num_devices):
            if not capacity[j]:
                subsets = subsets[(subsets >> j & 1) == 0]
            else:
                better = sum(1 << i for i in range(problem.num_devices) if i != j and self._is_better(i, j))
                subsets = subsets[((subsets >> j & 1) == 0) | ((subsets & better) == better)]
        held = sum(((subsets >> i & 1) * capacity[i] for i in range(problem.num_devices)), np.zeros_like(subsets))
        count = sum((subsets >> i & 1 for i in range(problem.num_devices)), np.zeros_like(subsets))
        return subsets[(held >= problem.num_blocks) & (count <= problem.num_blocks)]

    def are_equal(self, i: int, j: int) -> bool:
        """Whether two devices could change places in any ring."""
        return self._is_no_worse(i, j) and self._is_no_worse(j, i)

    def _is_better(self, i: int, j: int) -> bool:
        """Of two equal devices the first is the better one."""
        return self._is_no_worse(i, j) and (i < j or not self._is_no_worse(j, i))

    def _is_no_worse(self, i: int, j: int) -> bool:
        """Whether ``i`` in the place of ``j`` makes no ring worse."""
        problem = self.problem
        others = [k for k in range(problem.num_devices + 1) if k not in (i, j)]
        pairs = [(self._own[i], self._own[j])]
        for matrix in (problem.latency, problem.row):
            pairs += [(matrix[others, i], matrix[others, j]), (matrix[i, others], matrix[j, others])]
        return all(bool(np.all(a <= b)) for a, b in pairs)


@dataclass(slots=True, eq=False)
class _Bound:
    """Of each subset at most the rate, at least the interval, and the forwards of one block per device."""

    subsets: Integers
    inside: Numbers  # [devices, subsets], 0 or 1
    count: Numbers
    once: Numbers
    path: Numbers
    interval: Numbers
    rate: Numbers

    def take(self, places: Any) -> _Bound:
        return _Bound(
            self.subsets[places],
            self.inside[:, places],
            *(values[places] for values in (self.count, self.once, self.path, self.interval, self.rate)),
        )


class _Size:
    """The search among rings with chunks of one size."""

    def __init__(self, search: RingSearch, num_rows: int) -> None:
        problem = self._problem = search.problem
        self._search, self._num_rows = search, num_rows
        self._stage, self._last = problem.stage[num_rows], problem.last[num_rows]
        self._hop, self._wire = problem.latency + num_rows * problem.row, num_rows * problem.row
        fits = np.isfinite(self._stage[:, 2:])
        steps = np.subtract(self._stage[:, 2:], self._stage[:, 1:-1], out=np.full(fits.shape, np.inf), where=fits)
        slope = steps.min(axis=1, initial=np.inf)  # a block more costs at least this
        self._first = np.where(np.isfinite(self._stage[:, 1]), self._stage[:, 1], 0.0)  # 0: in no subset
        self._slope = np.where(np.isfinite(slope), slope, np.maximum(self._first, 1.0))
        self._by_slope = np.argsort(self._slope, kind="stable")
        self._widest_wire = float(self._wire[np.isfinite(self._wire)].max(initial=0.0))
        self._is_simple = search.latency_paths.is_flat or search.row_paths.is_flat  # one table serves all sizes
        self._paths_within: dict[int, Paths] = {}  # by class of links
        self._known_paths: dict[tuple[int, int], tuple[list[int], Numbers, Numbers]] = {}

    # ------------------------------------------------------------------ bounds for all subsets at once

    def bound(self, subsets: Integers, inside: Numbers, paths: tuple[Numbers, Numbers]) -> _Bound:
        """A first one: layers shared without rounding, or all on the quickest device, whichever helps."""
        problem = self._problem
        base = self._first - self._slope + problem.beside
        sums = np.stack([np.ones(len(base)), self._first, base / self._slope, 1 / self._slope]) @ inside
        count, once, offset, speed = sums
        least = np.where(inside > 0, self._slope[:, None], np.inf).min(axis=0)
        alone = (inside * (self._first + problem.beside)[:, None]).max(axis=0)
        path = paths[0] + self._num_rows * paths[1]
        interval = np.maximum(np.maximum((problem.num_blocks + offset) / speed, alone), problem.head)
        trip = once + (problem.num_blocks - count) * least + path + problem.head
        rate = problem.rate(self._num_rows, trip, interval, count)
        return _Bound(subsets, inside, count, once, path, interval, np.asarray(rate, np.float64))

    def search(self, bound: _Bound, found: FoundRing | None) -> FoundRing | None:
        """Best first through ranges of the interval; in a range that is one value, subsets are looked at one by one."""
        bound = bound.take(bound.rate > rate_of(found) * (1 + EPSILON))
        if not len(bound.subsets):
            return found
        limits = self._limits(range(self._problem.num_devices), float(bound.interval.min()))
        numbers = itertools.count()
        ranges = [(-float(bound.rate.max()), next(numbers), 0, len(limits), bound)]
        looked_at: set[int] = set()
        while ranges and -ranges[0][0] > rate_of(found) * (1 + EPSILON):
            _, _, low, high, inner = heapq.heappop(ranges)
            if high - low == 1:
                found = self._look(inner, float(limits[low]), looked_at, found)
                continue
            middle = (low + high) // 2
            for start, stop in ((low, middle), (middle, high)):
                part = self._narrowed(inner, float(limits[start]), float(limits[stop - 1]), rate_of(found))
                if len(part.subsets):
                    heapq.heappush(ranges, (-float(part.rate.max()), next(numbers), start, stop, part))
        return found

    def _narrowed(self, bound: _Bound, low: float, high: float, rate: float) -> _Bound:
        """What subsets can bring with an interval in this range: those that may beat ``rate``."""
        part = bound.take((bound.interval <= high + TOLERANCE_MS) & (bound.rate > rate * (1 + EPSILON)))
        part.path = np.maximum(part.path, self._least_path_ms(part.subsets, part.inside, None, high))
        trip = part.once + self._least_ms(part, high) + part.path + self._problem.head
        better = self._problem.rate(self._num_rows, trip, np.maximum(part.interval, low), part.count)
        part.rate = np.minimum(part.rate, better)
        return part.take(part.rate > rate * (1 + EPSILON))

    def _look(self, bound: _Bound, limit: float, looked_at: set[int], found: FoundRing | None) -> FoundRing | None:
        """At each subset, the most promising first; who is last is taken into account before."""
        problem = self._problem
        rate = np.zeros(len(bound.subsets))
        for last in range(problem.num_devices):
            there = np.flatnonzero(bound.inside[last])
            if len(there):
                part = bound.take(there)
                path = self._least_path_ms(part.subsets, part.inside, last, limit)
                trip = part.once + self._least_ms(part, limit, last) + self._last[last] + path + problem.head
                here = problem.rate(self._num_rows, trip, np.maximum(part.interval, limit), part.count)
                rate[there] = np.maximum(rate[there], here)
        for at in np.argsort(-rate, kind="stable"):
            if rate[at] <= rate_of(found) * (1 + EPSILON):
                break
            subset = int(bound.subsets[at])
            if subset not in looked_at:
                looked_at.add(subset)
                found = self.better(subset, found)
        return found

    def _least_path_ms(self, subsets: Integers, inside: Numbers, last: int | None, limit: float) -> Numbers:
        """At least so many ms for all hops over links that take no longer than about ``limit``."""
        latency, row = self._search.latency_paths, self._search.row_paths
        if self._is_simple:
            return latency.least_ms(subsets, inside, last) + self._num_rows * row.least_ms(subsets, inside, last)
        wire_class = int(self._search.wire_classes(np.array(limit / self._num_rows)))
        if wire_class not in self._paths_within:
            self._paths_within[wire_class] = self._search.within(self._hop, wire_class)
        return self._paths_within[wire_class].least_ms(subsets, inside, last)

    def _least_ms(self, bound: _Bound, limit: float, last: int | None = None) -> Numbers:
        """At least so many ms for the blocks beyond each device's first, none busy for longer than ``limit``."""
        problem = self._problem
        left = problem.num_blocks - bound.count
        total = np.zeros(len(left))
        for i in self._by_slope:
            fits = int(self._num_fitting(int(i), i == last, np.array(limit)))
            if not fits:
                total[bound.inside[i] > 0] = np.inf
            elif fits > 1:
                take = np.minimum(left, (fits - 1) * bound.inside[i])
                left = left - take
                total += take * self._slope[i]
        total[left > 0] = np.inf
        return total

    # ------------------------------------------------------------------ one subset, exactly

    def better(self, subset: int, found: FoundRing | None) -> FoundRing | None:
        """The best ring of exactly these devices, if it beats ``found``."""
        members = [i for i in range(self._problem.num_devices) if subset >> i & 1]
        limits = self._limits(members, 0.0)
        inside = np.array([[subset >> i & 1] for i in range(self._problem.num_devices)], np.float64)
        for last in reversed(members):  # of equal devices the last one is last
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
        """Every interval, from ``lowest`` on, that a ring of these devices can have."""
        problem = self._problem
        ends = [*members, problem.num_devices]
        busy = self._stage[members, 1:] + problem.beside[members, None]
        values = (busy, busy + self._last[members, None], self._wire[np.ix_(ends, ends)], np.array([problem.head]))
        every: Numbers = np.unique(np.concatenate([value.ravel() for value in values]))
        possible: Numbers = every[np.isfinite(every) & (every >= max(lowest, problem.head) - TOLERANCE_MS)]
        return possible

    def _least_paths_ms(self, subset: int, inside: Numbers, last: int, limits: Numbers) -> Numbers:
        """At least so many ms for the hops of one subset, for several limits."""
        if self._is_simple:
            return np.full(len(limits), self._least_path_ms(np.array([subset]), inside, last, np.inf)[0])
        classes = self._search.wire_classes(limits / self._num_rows)
        out = np.zeros(len(limits))
        for wire_class in np.unique(classes):
            there = np.flatnonzero(classes == wire_class)
            members, hop, paths = self._paths(subset, float(limits[there[-1]]))
            at = members.index(last)
            out[there] = paths[-1, at] + hop[at, -1]
        return out

    def _relaxed_ms(self, members: list[int], last: int, limits: Numbers) -> Numbers:
        """The forwards of a trip at least, no stage busy for longer than each of the limits; exact where costs are lines."""
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
        """How many blocks device ``i`` runs within each of the limits."""
        beside = self._problem.beside[i] + (self._last[i] if is_last else 0.0)
        fitting: Integers = np.searchsorted(self._stage[i, 1:], limits - beside + TOLERANCE_MS, side="right")
        return fitting

    def _ring(self, subset: int, members: list[int], last: int, limit: float) -> FoundRing | None:
        """The cheapest ring with that last stage and interval."""
        num_blocks = self._placed(members, last, limit)
        order = self._order(subset, last, limit)
        if num_blocks is None or order is None:
            return None
        return measure_ring(self._problem, order, [num_blocks[i] for i in order], self._num_rows)

    def _placed(self, members: list[int], last: int, limit: float) -> dict[int, int] | None:
        """How many blocks each device takes so that their forwards take the least time together."""
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
        """The shortest way from the origin through these devices to ``last`` and back; None where links are too slow."""
        if self._search.row_paths.is_flat and limit >= self._widest_wire:  # the latency alone decides
            return self._search.latency_paths.order(subset, last)
        wire_class = int(self._search.wire_classes(np.array(limit / self._num_rows)))
        if wire_class in self._paths_within:
            order = self._paths_within[wire_class].order(subset, last)
            if order is None or all(
                self._wire[a, b] <= limit + TOLERANCE_MS for a, b in itertools.pairwise([-1, *order, -1])
            ):
                return order
        members, hop, paths = self._paths(subset, limit)
        at = members.index(last)
        if not np.isfinite(paths[-1, at] + hop[at, -1]):
            return None
        return [members[at] for at in read_order(paths, hop, at, len(paths) - 1)]

    def _paths(self, subset: int, limit: float) -> tuple[list[int], Numbers, Numbers]:
        """The devices of a subset, the hops between them over links quick enough for ``limit``, and the shortest paths."""
        members = [i for i in range(self._problem.num_devices) if subset >> i & 1]
        ends = np.ix_([*members, -1], [*members, -1])
        is_quick = self._wire[ends] <= limit + TOLERANCE_MS
        key = (subset, int(is_quick.sum()))  # with a higher limit, links only ever join
        if key not in self._known_paths:
            hop = np.where(is_quick, self._hop[ends], np.inf)
            self._known_paths[key] = (members, hop, shortest_paths(hop))
        return self._known_paths[key]
