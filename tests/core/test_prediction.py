"""A prediction that was far off is shown with the part that was off."""

import pytest

from flowspec_edge.core.events import Passage
from flowspec_edge.core.pipeline import RingCosts
from flowspec_edge.core.placement import Plan, PlannedStage, TimeLine
from flowspec_edge.core.prediction import hold_against


def make_plan():
    stages = [
        PlannedStage(
            node=node,
            start=4 * n,
            stop=4 * n + 4,
            memory_bytes=0,
            precision="int8",
            left_bytes=0,
            time=TimeLine(40.0, 1.0),
        )
        for n, node in enumerate(("pi-hall", "pi-attic"))
    ]
    return Plan(stages=tuple(stages), num_rows=8, trip_ms=96 + 6 + 4, interval_ms=48.0, tokens_per_s=20.0, head_ms=4.0)


def make_costs(stages_ms=(40.0, 40.0), hops_ms=6.0, head_ms=4.0):
    """What a ring has shown with chunks of 2 to 14 rows."""
    costs = RingCosts(2)
    for num_rows in (2, 8, 14):
        passages = [Passage(num_rows, 0.0, (fixed + num_rows) / 1000) for fixed in stages_ms]
        costs.add_trip(sum(passage.ran_s for passage in passages) + hops_ms / 1000, passages)
    costs.head.add(1, head_ms / 1000)
    return costs


def test_a_prediction_that_held_needs_no_cause():
    outcome = hold_against(make_plan(), make_costs(), 17.0, 100)
    assert (outcome.difference, outcome.cause) == (pytest.approx(-0.15), None)


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ({"stages_ms": (40.0, 90.0)}, "node pi-attic was slower than measured: 98 ms for 8 rows, 48 expected"),
        ({"hops_ms": 60.0}, "the network, all hops together, was slower than measured: 60 ms for 8 rows, 6 expected"),
        ({"head_ms": 30.0}, "the head at the origin was slower than measured: 30 ms"),
        ({}, "drafts brought fewer tokens than expected"),
    ],
)
def test_what_was_slower_is_named(costs, said):
    assert said in hold_against(make_plan(), make_costs(**costs), 10.0, 100).cause


def test_what_was_quicker_is_named_as_well():
    outcome = hold_against(make_plan(), make_costs(stages_ms=(5.0, 40.0)), 30.0, 100)
    assert "node pi-hall was quicker than measured" in outcome.cause
    assert "drafts brought more tokens" in hold_against(make_plan(), make_costs(), 30.0, 100).cause


def test_a_short_text_tells_nothing():
    assert hold_against(make_plan(), make_costs(), 10.0, 8) is None
    assert hold_against(make_plan(), RingCosts(2), 10.0, 100) is None
