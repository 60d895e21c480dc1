"""The problem that a search for the best ring solves, and the ring that it finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowspec_edge.core.planning.ring_order import Numbers

Rate = Callable[[int, Any, Any, Any], Any]
"""Tokens/s of a ring by its chunk size, its trip and interval in ms, and its number of stages, as numbers or arrays.

The rate falls where trip or interval grow. It is 0 where a ring of that many stages does not use that chunk size.
"""

TOLERANCE_MS = 1e-9
"""The most that rounding adds to a sum of times."""
EPSILON = 1e-9
"""Two rates with a smaller relative difference count as equal."""


@dataclass(frozen=True, slots=True, eq=False)
class RingProblem:
    """Times in milliseconds. Devices are numbered, and the last row and column of a matrix stands for the origin.

    Attributes:
        stage: ``stage[n][i, k]`` is a forward of ``n`` rows over ``k`` blocks on device ``i``; infinite where they do
            not fit.
        last: ``last[n][i]`` is added where device ``i`` is the last stage.
        beside: other work of each device's processor in each interval.
        latency: a chunk of ``n`` rows from ``i`` to ``j`` takes ``latency[i, j] + n * row[i, j]``.
        row: a chunk of ``n`` rows occupies the link for ``n * row[i, j]``.
        head: the origin's own work on each chunk.
        rate: the tokens/s that follow from these times.
        crowds: for each machine on which several devices run, their shares of its cores: a stage that takes ``t`` keeps
            the machine busy for its share of ``t``, and in each interval the machine has to do all of that, and what
            its devices have ``beside``.
    """

    stage: dict[int, Numbers]
    last: dict[int, Numbers]
    beside: Numbers
    latency: Numbers
    row: Numbers
    head: float
    rate: Rate
    crowds: tuple[Mapping[int, float], ...] = ()

    @property
    def num_devices(self) -> int:
        return len(self.beside)

    @property
    def num_blocks(self) -> int:
        return int(next(iter(self.stage.values())).shape[1]) - 1


@dataclass(frozen=True, slots=True)
class FoundRing:
    """A ring: its devices in order, the number of blocks of each, and what it brings with chunks of ``num_rows``."""

    order: tuple[int, ...]
    num_blocks: tuple[int, ...]
    num_rows: int
    trip_ms: float
    interval_ms: float
    tokens_per_s: float


def measure_ring(problem: RingProblem, order: Sequence[int], num_blocks: Sequence[int], num_rows: int) -> FoundRing:
    """Compute the times and the tokens/s of a given ring."""
    times = [float(problem.stage[num_rows][i, k]) for i, k in zip(order, num_blocks, strict=True)]
    times[-1] += float(problem.last[num_rows][order[-1]])
    path = list(itertools.pairwise([-1, *order, -1]))
    wires = [float(problem.row[a, b]) * num_rows for a, b in path]
    trip = sum(times) + sum(wires) + sum(float(problem.latency[a, b]) for a, b in path) + problem.head
    busy = [time + float(problem.beside[i]) for i, time in zip(order, times, strict=True)]
    busy += [_crowd_ms(problem, crowd, dict(zip(order, times, strict=True))) for crowd in problem.crowds]
    interval = max(*busy, problem.head, *wires)
    rate = float(problem.rate(num_rows, trip, interval, len(order)))
    return FoundRing(tuple(order), tuple(num_blocks), num_rows, trip, interval, rate)


def fastest_ring(problem: RingProblem, order: Sequence[int], num_blocks: Sequence[int]) -> FoundRing:
    """The given ring with the chunks that bring the most."""
    return max((measure_ring(problem, order, num_blocks, size) for size in problem.stage), key=rate_of)


def _crowd_ms(problem: RingProblem, crowd: Mapping[int, float], times: Mapping[int, float]) -> float:
    """How long a machine is busy with a chunk, whose stages take these ``times`` on its devices."""
    own = sum(share * times.get(i, 0.0) for i, share in crowd.items())
    return own + max(float(problem.beside[i]) for i in crowd) if own else 0.0


def rate_of(found: FoundRing | None) -> float:
    return 0.0 if found is None else found.tokens_per_s
