"""Which boards have which layers a second time, and the ring that they make when a board is lost.

For each stage of a ring there is to be a *takeover*: the same boards in the same order without the lost one, or with an
idle board in its place, and a share of the layers for each. What a board serves in a takeover and does not serve now
stands by on it. Where shares move along the ring, boards exchange layers with their neighbours, so that the ring
afterwards is fast; that takes more memory than if the neighbours of the lost board had all of its layers.

Memory is given out in two rounds. The first one gives each stage the takeover that needs the fewest blocks; stages
whose layers would take the longest to be fetched come first. The second one spends what memory is left on faster rings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowspec_edge.core.planning.choices import Choices, fits_of
from flowspec_edge.core.planning.placement import (
    CUT,
    Device,
    Links,
    ModelNeeds,
    Plan,
    StagePlan,
    Standby,
    StandbyLayers,
)
from flowspec_edge.core.planning.planner import KEEP_SHARE, plan_of
from flowspec_edge.core.planning.ring_order import Numbers
from flowspec_edge.core.planning.ring_problem import EPSILON, FoundRing, fastest_ring, rate_of
from flowspec_edge.core.planning.throughput import Throughput

RESERVE_SHARE = 0.1
"""The share of a board's memory that standbys leave free: for further sessions, and for the peak of loading."""
PACES = (1.0, 1.15, 1.3, 1.6, np.inf)
"""Rings are tried whose slowest stage takes so many times the least that is possible, for a quicker trip."""


def plan_standbys(
    devices: Sequence[Device], links: Links, model: ModelNeeds, throughput: Throughput, ring: Sequence[StagePlan]
) -> tuple[Standby, ...]:
    """What is prepared for the loss of each stage of ``ring``, whose layers count as free on their ``devices``.

    Each stage gets a takeover that the others have room for. Where it has no precision, its device knows only one.
    """
    serving = {stage.node: stage for stage in ring}
    there = [_in_one_precision(device, serving.get(device.node), model) for device in devices]
    return _Search(Choices(there, links, model, throughput), ring).standbys()


def with_standbys(
    plan: Plan, devices: Sequence[Device], links: Links, model: ModelNeeds, throughput: Throughput
) -> Plan:
    """The plan with what is prepared for the loss of each of its stages."""
    ring = [replace(stage.stage_plan, precision=stage.precision) for stage in plan.stages]
    return replace(plan, standbys=plan_standbys(devices, links, model, throughput, ring))


def _in_one_precision(device: Device, stage: StagePlan | None, model: ModelNeeds) -> Device:
    """A stage has one for all of its layers. An idle device takes the quickest of those in which a block fits."""
    possible = [stage.precision] if stage is not None and stage.precision else list(device.layer)
    fitting = [fit.precision for fit in fits_of(device, model) if fit.precision in possible]
    precision = min(fitting or possible, key=lambda name: device.layer[name].at(1))
    return replace(device, layer={precision: device.layer[precision]})


@dataclass(frozen=True, slots=True)
class _Takeover:
    """The ring after a loss, and what its devices serve in it: ranges of blocks by device."""

    ring: FoundRing
    shares: dict[int, range]


class _Search:
    """Finds the takeovers of one ring. Blocks are numbered, and so are the devices of ``choices``."""

    def __init__(self, choices: Choices, ring: Sequence[StagePlan]) -> None:
        self._choices, self._model = choices, choices.model
        self._problem = choices.problem()
        self._num_blocks = len(self._model.blocks)
        numbers = {device.node: i for i, device in enumerate(choices.devices)}
        starts = {start: number for number, (start, _) in enumerate(self._model.blocks)}
        stops = {stop: number + 1 for number, (_, stop) in enumerate(self._model.blocks)}
        self._stages = ring
        self._order = [numbers[stage.node] for stage in ring]
        self._own: list[frozenset[int]] = [frozenset() for _ in choices.devices]
        for i, stage in zip(self._order, ring, strict=True):
            self._own[i] = frozenset(range(starts[stage.start], stops[stage.stop]))
        self._num_rows = fastest_ring(self._problem, self._order, [len(self._own[i]) for i in self._order]).num_rows
        self._precisions = [next(iter(device.layer)) for device in choices.devices]
        self._room = [self._num_held_at_most(i) for i in range(len(choices.devices))]
        self._takeovers: dict[int, _Takeover] = {}  # by the place of the lost stage in the ring

    def standbys(self) -> tuple[Standby, ...]:
        places = sorted(range(len(self._order)), key=self._urgency)
        self._cover(places)
        for place in places:
            self._quicken(place)
        self._cover(places)  # faster rings may need other boards' memory
        return tuple(self._standby(place) for place in range(len(self._order)))

    def _urgency(self, place: int) -> tuple[float, int]:
        """Sorts stages: those first whose layers would take the longest to be fetched. All come from the origin."""
        takeover = self._find(place, is_cheapest=True)
        if takeover is None:
            return np.inf, place
        links = self._choices.links
        fetches_ms = [
            self._held_bytes(i, len(self._missing(i, share)))
            * links.between(links.origin, self._choices.devices[i].node).ms_per_byte
            for i, share in takeover.shares.items()
        ]
        return -max(fetches_ms), place

    def _cover(self, places: Sequence[int]) -> None:
        for place in places:
            if place not in self._takeovers and (found := self._find(place, is_cheapest=True)) is not None:
                self._takeovers[place] = found

    def _quicken(self, place: int) -> None:
        now = self._takeovers.pop(place, None)
        if now is None:
            return
        found = self._find(place, is_cheapest=False)
        is_better = found is not None and rate_of(found.ring) > rate_of(now.ring) * (1 + KEEP_SHARE)
        self._takeovers[place] = found if found is not None and is_better else now

    # ---------------------------------------------------------------- one stage

    def _find(self, place: int, *, is_cheapest: bool) -> _Takeover | None:
        """A takeover in the memory that is left: the one of the fewest blocks, or the fastest."""
        found = [
            takeover
            for order in self._orders(place)
            for takeover in self._shares(order, is_cheapest=is_cheapest)
            if takeover.ring.trip_ms < CUT.latency_ms
        ]

        def key(takeover: _Takeover) -> tuple[float, float]:
            cost = sum(len(self._missing(i, share)) * self._weight(i) for i, share in takeover.shares.items())
            rate = -rate_of(takeover.ring)
            return (cost, rate) if is_cheapest else (rate, cost)

        return min(found, key=key, default=None)

    def _orders(self, place: int) -> Iterator[list[int]]:
        """The others in their order, with and without an idle board in the lost one's place; where there is not enough
        room for its layers on any one of these, with as many idle boards as may be, the roomiest first.
        """
        before, after = self._order[:place], self._order[place + 1 :]
        idle = [i for i, room in enumerate(self._room) if room and not self._own[i]]
        yield before + after
        for i in idle:
            yield [*before, i, *after]
        idle.sort(key=lambda i: -self._left(i))
        for count in range(2, len(idle) + 1):
            yield [*before, *idle[:count], *after]

    def _shares(self, order: Sequence[int], *, is_cheapest: bool) -> Iterator[_Takeover]:
        """Ways to share all blocks among these devices, in this order."""
        if not 0 < len(order) <= self._num_blocks:
            return
        missing = np.stack([self._missing_table(i) for i in order])
        times = np.stack([self._time_table(i, is_last=i == order[-1]) for i in order])
        times[missing > np.array([self._left(i) for i in order])[:, None, None]] = np.inf
        fair = missing * np.array([self._weight(i) for i in order])[:, None, None]
        beyond_ms = 1 + float(times[np.isfinite(times)].sum())  # more than any ring takes
        cost = fair * beyond_ms + times if is_cheapest else times + fair * EPSILON
        for limit in self._limits(times):
            cuts = _cheapest_cuts(np.where(times <= limit, cost, np.inf))
            if cuts is not None:
                yield self._takeover(order, cuts)

    def _limits(self, times: Numbers) -> list[float]:
        """Limits of a stage's time for the rings to try: multiples of the least possible one; none where no ring is."""
        if _cheapest_cuts(times) is None:
            return []
        all_ms = np.unique(times[np.isfinite(times)])
        low, high = 0, len(all_ms) - 1
        while low < high:
            middle = (low + high) // 2
            if _cheapest_cuts(np.where(times <= all_ms[middle], times, np.inf)) is None:
                low = middle + 1
            else:
                high = middle
        return [min(float(all_ms[low]) * pace, float(all_ms[-1])) * (1 + EPSILON) for pace in PACES]

    def _takeover(self, order: Sequence[int], cuts: Sequence[int]) -> _Takeover:
        shares = [range(start, stop) for start, stop in itertools.pairwise(cuts)]
        return _Takeover(
            fastest_ring(self._problem, order, list(map(len, shares))), dict(zip(order, shares, strict=True))
        )

    # ------------------------------------------------------------------- memory

    def _num_held_at_most(self, i: int) -> int:
        """How many blocks may stand by on a device beside its stage. An idle one is to have room for their caches."""
        own, model, precision = len(self._own[i]), self._model, self._precisions[i]
        device = self._choices.devices[i]
        limit = device.free_memory_bytes * (1 - RESERVE_SHARE)
        for count in range(self._num_blocks - own, 0, -1):
            needed = model.memory_bytes_on(device, precision, own or count)
            needed += self._held_bytes(i, count) if own else 0
            if needed <= limit:
                return count
        return 0

    def _held_bytes(self, i: int, count: int) -> int:
        return self._model.standby_bytes(self._precisions[i], count)

    def _held(self, i: int) -> frozenset[int]:
        """The blocks that stand by on a device for any stage."""
        shares = [takeover.shares.get(i, range(0)) for takeover in self._takeovers.values()]
        return frozenset().union(*shares) - self._own[i]

    def _missing(self, i: int, share: range) -> frozenset[int]:
        """The blocks that a device would have to hold in addition."""
        return frozenset(share) - self._own[i] - self._held(i)

    def _left(self, i: int) -> int:
        return self._room[i] - len(self._held(i))

    def _weight(self, i: int) -> float:
        """What a block costs on a device: of two the emptier one is to take it."""
        return 1 + (len(self._held(i)) / self._room[i] if self._room[i] else 1.0)

    def _missing_table(self, i: int) -> Numbers:
        """How many blocks of ``[start, stop)`` the device would have to hold in addition: [start, stop]."""
        here = self._own[i] | self._held(i)
        before = np.concatenate([[0.0], np.cumsum([number not in here for number in range(self._num_blocks)])])
        table: Numbers = before[None, :] - before[:, None]
        return table

    def _time_table(self, i: int, *, is_last: bool) -> Numbers:
        """The time of blocks ``[start, stop)`` on it, [start, stop]; infinite where they are none, or too many."""
        numbers = np.arange(self._num_blocks + 1)
        counts = numbers[None, :] - numbers[:, None]
        stage = np.where(counts > 0, self._problem.stage[self._num_rows][i, np.maximum(counts, 0)], np.inf)
        if is_last:
            stage[:, -1] += self._problem.last[self._num_rows][i]
        busy: Numbers = stage + self._problem.beside[i]
        return busy

    # ------------------------------------------------------------------ answers

    def _standby(self, place: int) -> Standby:
        stage, takeover = self._stages[place], self._takeovers.get(place)
        if takeover is None:
            return Standby(stage.node, stage.start, stage.stop)
        layers = [
            StandbyLayers(
                self._choices.devices[i].node,
                self._model.blocks[first][0],
                self._model.blocks[stop - 1][1],
                self._precisions[i],
                self._held_bytes(i, stop - first),
            )
            for i, share in takeover.shares.items()
            for first, stop in _runs(sorted(frozenset(share) - self._own[i]))
        ]
        return Standby(stage.node, stage.start, stage.stop, tuple(layers), plan_of(self._choices, takeover.ring))


def _cheapest_cuts(cost: Numbers) -> list[int] | None:
    """Where to cut a row of blocks into one share per device at the least cost, by ``cost`` [device, start, stop].

    The first cut is 0, and the last one the number of blocks. None where some share of each cut is impossible.
    """
    least = cost[0, 0]
    chosen = []
    for table in cost[1:]:
        ways = least[:, None] + table
        chosen.append(np.argmin(ways, axis=0))
        least = ways.min(axis=0)
    if not np.isfinite(least[-1]):
        return None
    cuts = [len(least) - 1]
    for starts in reversed(chosen):
        cuts.append(int(starts[cuts[-1]]))
    return [0, *reversed(cuts)]


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Consecutive numbers as ranges ``[start, stop)``."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield run[0], run[-1] + 1
