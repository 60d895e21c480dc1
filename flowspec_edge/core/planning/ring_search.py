"""Searches for the best ring: which devices, in which order, with how many blocks of layers each. The result is exact,
unless several of its devices share the cores of one machine: then it is the best of the rings that would be the best
ones within some limit on the interval if each device had cores of its own.

Three programs are nested. Given a subset of devices, a chunk size and a limit on the interval, each device can run a
certain number of blocks, and a small dynamic program finds the cheapest way to place them all
(core/planning/subset_rings.py). Another one finds the cheapest order of a subset (core/planning/ring_order.py). Around
them, limits and subsets are searched best first: upper bounds are computed for all subsets at once, ranges of limits
are halved, and whatever cannot beat the best ring found so far is dropped.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowspec_edge.core.planning.ring_order import Integers, Numbers, over_subsets
from flowspec_edge.core.planning.ring_problem import EPSILON, TOLERANCE_MS, FoundRing, RingProblem, rate_of
from flowspec_edge.core.planning.subset_rings import SubsetRings, Ways


class RingSearch:
    """A search for the best ring.

    What it has computed for subsets is kept for further searches, such as one without a certain device.
    """

    def __init__(self, problem: RingProblem) -> None:
        self.problem = problem
        self._ways = Ways(problem)
        own = [*problem.stage.values(), *(last[:, None] for last in problem.last.values()), problem.beside[:, None]]
        self._own = np.concatenate(own, axis=1)
        self._sizes = {num_rows: _Size(problem, self._ways, num_rows) for num_rows in problem.stage}

    def best(self, found: FoundRing | None = None) -> FoundRing | None:
        """The best ring; ``found`` where no ring is better than that; None where the blocks do not fit."""
        subsets = self._subsets()
        if not len(subsets):
            return found
        inside = (subsets[None, :] >> np.arange(self.problem.num_devices)[:, None] & 1).astype(np.float64)
        sums = self._ways.latency.sum_ms(inside), self._ways.row.sum_ms(inside)
        bounds = [(size.bound(subsets, inside, sums), size) for size in self._sizes.values()]
        bounds.sort(key=lambda pair: -float(pair[0].rate.max()))
        bound, size = bounds[0]
        found = size.better(int(subsets[np.argmax(bound.rate)]), found)  # a first ring to compare others with
        for bound, size in bounds:
            found = size.search(bound, found)
        return found

    def best_of(self, devices: Collection[int], num_rows: int | None = None) -> FoundRing | None:
        """The best ring of exactly these devices, with chunks of ``num_rows`` if that is given.

        Returns None where the blocks do not fit, or are fewer than the devices.
        """
        found = None
        for size in self._sizes.values() if num_rows is None else [self._sizes[num_rows]]:
            found = size.better(sum(1 << i for i in devices), found)
        return found

    def _subsets(self) -> Integers:
        """The subsets that can hold all blocks, except those in which a better device could replace a worse one."""
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
        """Whether two devices could change places in every ring without making a difference."""
        return self._is_no_worse(i, j) and self._is_no_worse(j, i)

    def _is_better(self, i: int, j: int) -> bool:
        """Whether ``i`` is the better device. Of two equal devices the first one counts as better."""
        return self._is_no_worse(i, j) and (i < j or not self._is_no_worse(j, i))

    def _is_no_worse(self, i: int, j: int) -> bool:
        """Whether no ring gets worse when ``i`` takes the place of ``j``."""
        problem = self.problem
        if not self._crowds_no_more(i, j):
            return False
        others = [k for k in range(problem.num_devices + 1) if k not in (i, j)]
        pairs = [(self._own[i], self._own[j])]
        for matrix in (problem.latency, problem.row):
            pairs += [(matrix[others, i], matrix[others, j]), (matrix[i, others], matrix[j, others])]
        return all(bool(np.all(a <= b)) for a, b in pairs)

    def _crowds_no_more(self, i: int, j: int) -> bool:
        """Whether no machine is busier when ``i`` takes the place of ``j``."""
        crowd = next((crowd for crowd in self.problem.crowds if i in crowd), None)
        return crowd is None or (j in crowd and crowd[i] <= crowd[j])


@dataclass(slots=True, eq=False)
class _Bound:
    """What is known of each subset of devices before its rings are searched; all arrays are [subsets].

    ``rate`` is an upper bound in tokens/s. ``interval`` and ``path``, all hops of a trip, are lower bounds in ms.
    ``count`` is the number of devices, and ``once`` the time of one block on each of them.
    """

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


class _Size(SubsetRings):
    """The search for the best ring with chunks of one size."""

    def bound(self, subsets: Integers, inside: Numbers, paths: tuple[Numbers, Numbers]) -> _Bound:
        """First bounds of each subset: of the interval as if blocks could be cut into any shares, and of the trip as if
        the quickest device had all blocks but one of each other device.
        """
        problem = self._problem
        base = self._first - self._slope + problem.beside
        each = (np.ones(len(base)), self._first, base / self._slope, 1 / self._slope)
        count, once, offset, speed = (over_subsets(values, np.add, 0.0)[subsets] for values in each)
        least = over_subsets(self._slope, np.minimum, np.inf)[subsets]
        alone = over_subsets(self._first + problem.beside, np.maximum, 0.0)[subsets]
        path = paths[0] + self._num_rows * paths[1]
        interval = np.maximum(np.maximum((problem.num_blocks + offset) / speed, alone), problem.head)
        trip = once + (problem.num_blocks - count) * least + path + problem.head
        rate = problem.rate(self._num_rows, trip, interval, count)
        return _Bound(subsets, inside, count, once, path, interval, np.asarray(rate, np.float64))

    def search(self, bound: _Bound, found: FoundRing | None) -> FoundRing | None:
        """Search ranges of the interval, best first. In a range of a single value, subsets are examined one by one."""
        bound = bound.take(bound.rate > rate_of(found) * (1 + EPSILON))
        if not len(bound.subsets):
            return found
        limits = self._limits(range(self._problem.num_devices), float(bound.interval.min()))
        numbers = itertools.count()
        ranges = [(-float(bound.rate.max()), next(numbers), 0, len(limits), bound)]
        examined: set[int] = set()
        while ranges and -ranges[0][0] > rate_of(found) * (1 + EPSILON):
            _, _, low, high, inner = heapq.heappop(ranges)
            if high - low == 1:
                found = self._examine(inner, float(limits[low]), examined, found)
                continue
            middle = (low + high) // 2
            for start, stop in ((low, middle), (middle, high)):
                part = self._narrowed(inner, float(limits[start]), float(limits[stop - 1]), rate_of(found))
                if len(part.subsets):
                    heapq.heappush(ranges, (-float(part.rate.max()), next(numbers), start, stop, part))
        return found

    def _narrowed(self, bound: _Bound, low: float, high: float, rate: float) -> _Bound:
        """The subsets that may beat ``rate`` with an interval in this range, with tighter bounds."""
        part = bound.take((bound.interval <= high + TOLERANCE_MS) & (bound.rate > rate * (1 + EPSILON)))
        part.path = np.maximum(part.path, self._least_path_ms(part.subsets, part.inside, None, high))
        trip = part.once + self._least_ms(part, high) + part.path + self._problem.head
        better = self._problem.rate(self._num_rows, trip, np.maximum(part.interval, low), part.count)
        part.rate = np.minimum(part.rate, better)
        return part.take(part.rate > rate * (1 + EPSILON))

    def _examine(self, bound: _Bound, limit: float, examined: set[int], found: FoundRing | None) -> FoundRing | None:
        """Examine each subset, the most promising first.

        The bounds by which they are ordered take the last device into account.
        """
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
            if subset not in examined:
                examined.add(subset)
                found = self.better(subset, found)
        return found

    def _least_ms(self, bound: _Bound, limit: float, last: int | None = None) -> Numbers:
        """A lower bound in ms for the blocks beyond each device's first, if none is busy for longer than ``limit``."""
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
