"""A prediction that was far off is shown with the part that was off."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest

from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.placement import Hop, Plan, PlannedHop, PlannedStage
from flowspec_edge.core.planning.prediction import hold_against, name_link
from flowspec_edge.core.rows import Passage
from flowspec_edge.core.speculation.pipeline import RingCosts
from tests.narrowing import present

WIRE = Hop.from_rate(1.8, 1000)


def make_plan() -> Plan:
    stages = [
        PlannedStage(
            node=node,
            start=4 * n,
            stop=4 * n + 4,
            memory_bytes=0,
            precision="int8",
            left_bytes=0,
            time=Line(40.0, 1.0),
        )
        for n, node in enumerate(("pi-hall", "pi-attic"))
    ]
    return Plan(
        stages=tuple(stages),
        num_rows=8,
        trip_ms=96 + 6 + 4,
        interval_ms=48.0,
        tokens_per_s=20.0,
        head_ms=4.0,
        hops=(
            PlannedHop("origin", "pi-hall", WIRE, 12),
            PlannedHop("pi-hall", "pi-attic", WIRE, 2000),
            PlannedHop("pi-attic", "origin", WIRE, 2000),
        ),
    )


def make_costs(stages_ms: tuple[float, float] = (40.0, 40.0), hops_ms: float = 6.0, head_ms: float = 4.0) -> RingCosts:
    """The costs that a ring has learned from chunks of 2 to 14 rows."""
    costs = RingCosts(2)
    for num_rows in (2, 8, 14):
        passages = [Passage(num_rows, 0.0, (fixed + num_rows) / 1000) for fixed in stages_ms]
        costs.add_trip(sum(passage.ran_s for passage in passages) + hops_ms / 1000, passages)
    costs.head.add(1, head_ms / 1000)
    return costs


def test_a_prediction_that_held_needs_no_cause() -> None:
    outcome = present(hold_against(make_plan(), make_costs(), 17.0, 100))
    assert outcome.difference == pytest.approx(-0.15)
    assert outcome.cause is None


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ({"stages_ms": (40.0, 90.0)}, "node pi-attic was slower than measured: 98 ms for 8 rows, 48 expected"),
        ({"hops_ms": 60.0}, "the network, all hops together, was slower than measured: 60 ms for 8 rows, 6 expected"),
        ({"head_ms": 30.0}, "the head at the origin was slower than measured: 30 ms"),
        ({}, "drafts brought fewer tokens than expected"),
    ],
)
def test_what_was_slower_is_named(costs: Mapping[str, Any], said: str) -> None:
    assert said in present(present(hold_against(make_plan(), make_costs(**costs), 10.0, 100)).cause)


def test_what_was_quicker_is_named_as_well() -> None:
    outcome = present(hold_against(make_plan(), make_costs(stages_ms=(5.0, 40.0)), 30.0, 100))
    assert "node pi-hall was quicker than measured" in present(outcome.cause)
    assert "drafts brought more tokens" in present(present(hold_against(make_plan(), make_costs(), 30.0, 100)).cause)


def test_of_a_slow_network_the_link_is_named_that_is_slow_now() -> None:
    plan = make_plan()
    outcome = present(hold_against(plan, make_costs(hops_ms=60.0), 10.0, 100))
    assert outcome.is_network and outcome.num_rows == pytest.approx(8, abs=0.1)
    wifi = Hop.from_rate(2.0, 5)
    now = {("origin", "pi-hall"): wifi, ("pi-attic", "pi-hall"): wifi, ("origin", "pi-attic"): WIRE}
    said = name_link(outcome, plan, now).cause
    assert said == "the link between pi-hall and pi-attic was slower than measured: 28 ms for 8 rows, 2 expected"
    said = present(name_link(outcome, plan, {("pi-attic", "pi-hall"): WIRE}).cause)
    assert said.startswith("the network, all hops together, was slower") and "by now each link is as it was" in said
    assert name_link(outcome, plan, {}).difference == outcome.difference == -0.5


def test_of_a_network_that_was_quicker_the_link_is_named_as_well() -> None:
    plan = make_plan()
    slow = dataclasses.replace(plan.hops[1], link=Hop.from_rate(60.0, 1000))
    plan = dataclasses.replace(plan, trip_ms=160.0, hops=(plan.hops[0], slow, plan.hops[2]))
    outcome = present(hold_against(plan, make_costs(), 30.0, 100))
    said = name_link(outcome, plan, {("pi-hall", "pi-attic"): WIRE, ("origin", "pi-attic"): WIRE}).cause
    assert said == "the link between pi-hall and pi-attic was quicker than measured: 2 ms for 8 rows, 60 expected"


def test_a_short_text_tells_nothing() -> None:
    assert hold_against(make_plan(), make_costs(), 10.0, 8) is None
    assert hold_against(make_plan(), RingCosts(2), 10.0, 100) is None
