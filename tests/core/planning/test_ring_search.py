"""The search finds what trying every ring finds."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.planning.ring_problem import RingProblem, measure_ring
from flowspec_edge.core.planning.ring_search import RingSearch
from flowspec_edge.core.planning.throughput import TYPICAL_DRAFTS, Throughput
from tests.core.planning.rings import every_ring

times = st.floats(0.5, 30).map(lambda ms: round(ms, 2))
small = st.one_of(st.just(0.0), st.floats(0.01, 8).map(lambda ms: round(ms, 2)))


@st.composite
def problems(draw: st.DrawFn) -> RingProblem:
    """Up to four devices and six blocks, two chunk sizes, any costs, memory limits and precisions."""
    num_devices, num_blocks = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    sizes = (1, 8)
    stage = {size: np.full((num_devices, num_blocks + 1), np.inf) for size in sizes}
    for device in range(num_devices):
        overhead = draw(small)
        for block_ms, row_ms, room in draw(
            st.lists(st.tuples(times, small, st.integers(0, num_blocks)), min_size=1, max_size=2)
        ):
            for size, blocks in itertools.product(sizes, range(1, room + 1)):
                before = stage[size][device, blocks]
                stage[size][device, blocks] = min(before, overhead + blocks * (block_ms + size * row_ms))
    for table in stage.values():
        table[:, 0] = 0.0

    def matrix(values: st.SearchStrategy[Any]) -> np.ndarray:
        is_uniform = draw(st.booleans())
        value = draw(values)
        ends = num_devices + 1
        found = [[value if is_uniform else draw(values) for _ in range(ends)] for _ in range(ends)]
        array = np.array(found, np.float64)
        np.fill_diagonal(array, np.inf)
        return array

    def per_device() -> np.ndarray:
        return np.array([draw(small) for _ in range(num_devices)])

    throughput = Throughput(draw(st.sampled_from(["flowspec", "autoregressive", "chunked"])), TYPICAL_DRAFTS, 5.0)
    return RingProblem(
        stage=stage,
        last={size: per_device() for size in sizes},
        beside=per_device(),
        latency=matrix(small),
        row=matrix(small),
        head=draw(small),
        rate=throughput.tokens_per_s,
    )


@settings(max_examples=100, deadline=None)
@given(problems())
def test_no_ring_is_better_than_the_one_found(problem: RingProblem) -> None:
    best = max((ring.tokens_per_s for ring in every_ring(problem)), default=None)
    found = RingSearch(problem).best()
    if best is None:
        assert found is None
        return
    assert found is not None and found.tokens_per_s == pytest.approx(best, rel=1e-7)
    assert measure_ring(problem, found.order, found.num_blocks, found.num_rows) == found
    assert sum(found.num_blocks) == problem.num_blocks and len(set(found.order)) == len(found.order)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_the_best_ring_of_given_devices(problem: RingProblem) -> None:
    devices = set(range(problem.num_devices))
    best = max((ring.tokens_per_s for ring in every_ring(problem) if set(ring.order) == devices), default=None)
    found = RingSearch(problem).best_of(devices)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.tokens_per_s == pytest.approx(best, rel=1e-7) and set(found.order) == devices


@settings(max_examples=20, deadline=None)
@given(problems(), st.sets(st.integers(0, 3), min_size=2), st.sampled_from([0.25, 0.5, 1.0]))
def test_rings_on_shared_cores_are_no_worse_than_those_with_one_device_of_a_machine(
    problem: RingProblem, members: set[int], share: float
) -> None:
    crowd = {i: share for i in members if i < problem.num_devices}
    beside = np.where(np.isin(np.arange(problem.num_devices), list(crowd)), 1.0, problem.beside)
    crowded = dataclasses.replace(problem, beside=beside, crowds=(crowd,))
    rings = list(every_ring(crowded))
    found = RingSearch(crowded).best()
    assert (found is None) == (not rings)
    if found is not None:
        assert measure_ring(crowded, found.order, found.num_blocks, found.num_rows) == found
        rates = [ring.tokens_per_s for ring in rings if len(crowd.keys() & set(ring.order)) < 2]
        assert max(rates, default=0.0) <= found.tokens_per_s * (1 + 1e-7)
        assert found.tokens_per_s <= max(ring.tokens_per_s for ring in rings) * (1 + 1e-7)
