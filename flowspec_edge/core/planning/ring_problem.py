"""What a search for the best ring is given, and what it finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flowspec_edge.core.planning.ring_order import Numbers

Rate = Callable[[int, Any, Any, Any], Any]
"""Tokens/s of a ring from its chunk size, its trip and interval in ms, and its number of stages (numbers or arrays); falls
where either time grows, and is 0 where there are no such chunks."""

TOLERANCE_MS = 1e-9
"""What rounding may add to a sum of times."""
EPSILON = 1e-9
"""Relative difference below which two rates are one."""


@dataclass(frozen=True, slots=True, eq=False)
class RingProblem:
    """Milliseconds; devices are numbered, and the last row and column of a matrix is the origin.

    ``stage[n][i, k]`` is a forward of ``n`` rows over ``k`` blocks on device ``i``, infinite where they do not fit;
    ``last[n][i]`` comes on top where it is the last stage; ``beside[i]`` is what the device's processor does besides in each
    interval. A chunk of ``n`` rows from ``i`` to ``j`` takes ``latency[i, j] + n * row[i, j]`` and occupies the link for
    ``n * row[i, j]``. ``head`` is the origin's own work on each chunk.
    """

    stage: dict[int, Numbers]
    last: dict[int, Numbers]
    beside: Numbers
    latency: Numbers
    row: Numbers
    head: float
    rate: Rate

    @property
    def num_devices(self) -> int:
        return len(self.beside)

    @property
    def num_blocks(self) -> int:
        return int(next(iter(self.stage.values())).shape[1]) - 1


@dataclass(frozen=True, slots=True)
class FoundRing:
    """Devices in ring order with the blocks of each, and what it brings with chunks of ``num_rows``."""

    order: tuple[int, ...]
    num_blocks: tuple[int, ...]
    num_rows: int
    trip_ms: float
    interval_ms: float
    tokens_per_s: float


def measure_ring(problem: RingProblem, order: Sequence[int], num_blocks: Sequence[int], num_rows: int) -> FoundRing:
    """What a given ring costs and brings."""
    times = [float(problem.stage[num_rows][i, k]) for i, k in zip(order, num_blocks, strict=True)]
    times[-1] += float(problem.last[num_rows][order[-1]])
    path = list(itertools.pairwise([-1, *order, -1]))
    wires = [float(problem.row[a, b]) * num_rows for a, b in path]
    trip = sum(times) + sum(wires) + sum(float(problem.latency[a, b]) for a, b in path) + problem.head
    busy = [time + float(problem.beside[i]) for i, time in zip(order, times, strict=True)]
    interval = max(*busy, problem.head, *wires)
    rate = float(problem.rate(num_rows, trip, interval, len(order)))
    return FoundRing(tuple(order), tuple(num_blocks), num_rows, trip, interval, rate)


def rate_of(found: FoundRing | None) -> float:
    return 0.0 if found is None else found.tokens_per_s
