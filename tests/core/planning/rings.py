"""All rings of a problem, to compare a search with: every choice of devices, order, shares and chunk size."""

import itertools
from collections.abc import Iterator

import numpy as np

from flowspec_edge.core.planning.ring_problem import FoundRing, RingProblem, measure_ring


def every_ring(problem: RingProblem) -> Iterator[FoundRing]:
    for size, num_stages in itertools.product(problem.stage, range(1, problem.num_devices + 1)):
        for cuts in itertools.combinations(range(1, problem.num_blocks), num_stages - 1):
            counts = [stop - start for start, stop in itertools.pairwise((0, *cuts, problem.num_blocks))]
            for order in itertools.permutations(range(problem.num_devices), num_stages):
                if all(np.isfinite(problem.stage[size][i, k]) for i, k in zip(order, counts, strict=True)):
                    yield measure_ring(problem, order, counts, size)
