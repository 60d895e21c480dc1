"""What is shown of a service: figures of a plan and of a ring that a test makes up, and fetches as they go on."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.placement import Hop, Plan, PlannedHop, PlannedStage, StagePlan
from flowspec_edge.core.rows import Passage
from flowspec_edge.core.speculation.pipeline import RingCosts
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.origin.ring import Ring, RingStage
from flowspec_edge.origin.status import StageWork
from flowspec_edge.origin.view import Fetches, FetchView, HopView, RingView

STAGE = PlannedStage(
    node="attic", start=0, stop=4, memory_bytes=5, precision="int8", left_bytes=6, time=Line(10.0, 2.0)
)
PLAN = Plan(
    stages=(STAGE,),
    num_rows=8,
    trip_ms=40.0,
    interval_ms=20.0,
    tokens_per_s=50.0,
    head_ms=3.0,
    hops=(
        PlannedHop("origin", "attic", Hop.from_rate(2.0, 100.0), 1000),
        PlannedHop("attic", "origin", Hop(2.0), 1000),
    ),
)


def ring_of(plan: Plan | None, costs: RingCosts) -> Ring:
    stage = RingStage(
        STAGE.stage_plan,
        Announcement(node="attic", host="10.0.0.7", port=7361, cluster="flowspec", version="1"),
        12,
        34,
        56,
        "int8 on x86_64, avx2",
    )
    found: Any = SimpleNamespace(
        plan=plan,
        costs=costs,
        stages=[stage],
        status=[SimpleNamespace(work=StageWork(num_rows=7))],
        num_bytes=(1, 2),
    )
    return cast(Ring, found)


def test_a_planned_ring_is_shown_with_its_links_and_what_is_expected_with_drafts_and_without() -> None:
    view = RingView.of(ring_of(PLAN, RingCosts(1)))
    assert view.hops == [HopView("origin", "attic", 2.0, 100.0), HopView("attic", "origin", 2.0, None)]
    assert view.rates.planned == 50.0
    single_ms = 10 + 2 + (2 + 1000 * 8 / 100_000) + 2 + 3  # stage, hops of a single row, head
    assert view.rates.planned_without_drafts == pytest.approx(1000 / single_ms)
    assert (view.rates.without_drafts, view.hop_ms) == (None, None), "nothing has come back yet"
    (stage,) = view.stages
    assert (stage.node, stage.address, stage.start, stage.stop) == ("attic", "10.0.0.7:7361", 0, 4)
    assert (stage.load_ms, stage.fetched_bytes, stage.held_bytes, stage.work.num_rows) == (12, 34, 56, 7)


def test_without_a_plan_it_is_shown_with_what_its_parts_take() -> None:
    costs = RingCosts(1)
    for _ in range(3):
        costs.add_trip(0.5, [Passage(1, 0.1, 0.2)])  # 0.2 s are left for two hops
        costs.head.add(1, 0.1)
    view = RingView.of(ring_of(None, costs))
    assert view.hops == [] and (view.rates.planned, view.rates.planned_without_drafts) == (None, None)
    assert view.rates.without_drafts == pytest.approx(1 / (0.2 + 0.2 + 0.1), rel=1e-3)
    assert view.hop_ms == pytest.approx(1000 * costs.hop_s(1))


def test_fetches_are_shown_until_they_are_whole_and_told_on() -> None:
    told: list[tuple[str, int, int]] = []
    fetches = Fetches(lambda plan, num_bytes, total_bytes: told.append((plan.node, num_bytes, total_bytes)))
    attic, hall = StagePlan("attic", 0, 2, 9), StagePlan("hall", 2, 4, 9)
    for plan, num_bytes in ((attic, 1), (hall, 2), (attic, 5)):
        fetches.note(plan, num_bytes, 10)
    assert fetches.under_way == [FetchView("attic", 5, 10), FetchView("hall", 2, 10)]
    fetches.note(attic, 10, 10)
    assert fetches.under_way == [FetchView("hall", 2, 10)]
    assert told[-1] == ("attic", 10, 10) and len(told) == 4
