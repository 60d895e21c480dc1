"""A prompt is through the ring as soon as its slowest part allows, on every testbed."""

import pytest

from benchmarks.first_token import measure
from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.bench.testbed import load_testbed

UNEVEN = {"mixed"}
"""The slowest board alone takes longer for the prompt than an equal share of all the work."""


@pytest.mark.parametrize("name", known_testbeds())
def test_the_first_token_of_a_long_prompt_comes_as_soon_as_the_slowest_part_allows(name: str) -> None:
    """And the drafter has read nearly all of the prompt by then: the second token waits for a trip alone."""
    found = measure(load_testbed(name), 2000)
    assert found.over_slowest <= 1.05
    assert found.over_work <= 1.15 or name in UNEVEN
    assert found.second_s <= 1.2 * found.trip_s


def test_a_short_prompt_is_cut_where_rows_cost_much() -> None:
    assert measure(load_testbed("pi5x4-3b-int4"), 80).rows == 10
    assert measure(load_testbed("jetson4-7b-fp16-1gbit"), 80).rows == 80
