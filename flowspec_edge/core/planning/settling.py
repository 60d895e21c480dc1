"""Takes loaded layers into account: which ring they make, and which of several equal rings moves the fewest of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from flowspec_edge.core.planning.choices import Choices
from flowspec_edge.core.planning.placement import LoadedLayers
from flowspec_edge.core.planning.ring_order import Numbers, read_order, shortest_paths
from flowspec_edge.core.planning.ring_problem import EPSILON, FoundRing, fastest_ring, measure_ring, rate_of
from flowspec_edge.core.planning.ring_search import RingSearch

MOVE_SHARE = 0.001
"""The share by which a trip may be longer if all layers stay where they are."""


class Loaded:
    """The layers that the devices of a search have loaded."""

    def __init__(self, choices: Choices, search: RingSearch) -> None:
        self._choices, self._search, self._problem = choices, search, search.problem

    @property
    def is_empty(self) -> bool:
        return not any(device.loaded for device in self._choices.devices)

    def ring(self) -> FoundRing | None:
        """The ring that the loaded layers make; None where they make none that could be chosen now."""
        starts = {start: number for number, (start, _) in enumerate(self._choices.model.blocks)}
        stops = {stop: number + 1 for number, (_, stop) in enumerate(self._choices.model.blocks)}
        stages = [
            (device.loaded.start, i, device.loaded)
            for i, device in enumerate(self._choices.devices)
            if device.loaded is not None and device.loaded.start in starts and device.loaded.stop in stops
        ]
        stages.sort(key=lambda stage: stage[0])
        order, counts, placed = [], [], 0
        for start, i, loaded in stages:
            first, count = starts[start], stops[loaded.stop] - starts[start]
            fits = {fit.precision: fit.num_blocks for fit in self._choices.fits[i]}
            if first == placed and count <= fits.get(loaded.precision, 0):
                order.append(i)
                counts.append(count)
                placed += count
        if placed != len(self._choices.model.blocks) or not self._is_loaded_in_best_precision(order, counts):
            return None
        return fastest_ring(self._problem, order, counts)

    def _is_loaded_in_best_precision(self, order: list[int], counts: list[int]) -> bool:
        for i, count in zip(order, counts, strict=True):
            loaded = self._choices.devices[i].loaded
            assert loaded is not None, "only loaded devices make a loaded ring"
            if all(self._choices.precision(i, count, size) != loaded.precision for size in self._problem.stage):
                return False
        return True

    def settled(self, ring: FoundRing) -> FoundRing:
        """The given ring or an equal one, whichever moves the fewest layers."""
        if self.is_empty:
            return ring
        counts = self._exchanged(ring)
        members = list(counts)
        problem, size = self._problem, ring.num_rows
        hop = problem.latency + size * problem.row
        wires = size * problem.row
        ends = np.ix_([*members, -1], [*members, -1])
        hop = np.where(wires[ends] <= ring.interval_ms * (1 + EPSILON), hop[ends], np.inf)
        joining = self._moving_ms(counts, ring.trip_ms * MOVE_SHARE / len(self._choices.model.blocks))
        paths = shortest_paths(hop, joining)
        busy = np.array([problem.stage[size][i, k] + problem.beside[i] for i, k in counts.items()])
        last = problem.last[size][members]
        ways = paths[:, -1] + hop[:-1, -1] + np.where(busy + last <= ring.interval_ms * (1 + EPSILON), last, np.inf)
        if not np.isfinite(ways).any():
            return ring
        order = [members[at] for at in read_order(paths, hop, int(np.argmin(ways)), paths.shape[1] - 1)]
        other = measure_ring(problem, order, [counts[i] for i in order], size)
        return other if rate_of(other) >= rate_of(ring) * (1 - 2 * MOVE_SHARE) else ring

    def _exchanged(self, ring: FoundRing) -> dict[int, int]:
        """Blocks by device, with equal devices exchanged: of these the one with most loaded layers serves most."""
        counts = dict(zip(ring.order, ring.num_blocks, strict=True))
        for group in self._equal_devices():
            takes = sorted((counts.pop(i, 0) for i in group), reverse=True)
            by_loaded = sorted(group, key=lambda i: -self._num_loaded(i))
            counts |= {i: take for i, take in zip(by_loaded, takes, strict=True) if take}
        return counts

    def _equal_devices(self) -> list[list[int]]:
        groups: list[list[int]] = []
        for i in range(len(self._choices.devices)):
            for group in groups:
                if self._search.are_equal(group[0], i):
                    group.append(i)
                    break
            else:
                groups.append([i])
        return [group for group in groups if len(group) > 1]

    def _num_loaded(self, i: int) -> int:
        loaded = self._choices.devices[i].loaded
        return loaded.stop - loaded.start if loaded is not None else 0

    def _moving_ms(self, counts: Mapping[int, int], block_ms: float) -> Numbers:
        """The cost in ms, [subsets, devices], of the blocks that a device loads if it follows those of a subset."""
        members = list(counts)
        subsets = np.arange(2 ** len(members))
        first = sum(((subsets >> at & 1) * counts[i] for at, i in enumerate(members)), np.zeros_like(subsets))
        out = np.zeros((len(subsets), len(members)))
        starts = np.array([start for start, _ in self._choices.model.blocks] + [self._choices.model.blocks[-1][1]])
        for at, i in enumerate(members):
            loaded = self._choices.devices[i].loaded or LoadedLayers(0, 0, "")
            low = np.maximum(starts[np.minimum(first, len(starts) - 1)], loaded.start)
            high = np.minimum(starts[np.minimum(first + counts[i], len(starts) - 1)], loaded.stop)
            stay = np.maximum(high - low, 0) / self._choices.model.layers_per_block
            out[:, at] = block_ms * (counts[i] - stay)
        return out
