"""What users see of who stands by for whom."""

import json

import pytest

from flowspec_edge.cli.main import main
from flowspec_edge.cli.show_plan import format_outcome, format_plan, plan_report
from flowspec_edge.core.planning.placement import Plan
from flowspec_edge.core.planning.planner import plan_ring
from flowspec_edge.core.planning.standby import with_standbys
from tests.core.planning.test_planner import FLOWSPEC, LAN, MIB, make_device, make_model
from tests.narrowing import present

NAMES = ("pi5-attic-3f09a1", "pi5-cellar-77d0e2", "pi5-hall-04bb9c")


def plan_of(free_bytes: int = 8192 * MIB) -> Plan:
    known = [make_device(name, free=free_bytes) for name in NAMES], LAN, make_model(12), FLOWSPEC
    return with_standbys(plan_ring(*known), *known)


def test_a_table_says_who_stands_by_within_eighty_columns() -> None:
    plan = plan_of()
    lines = format_plan(plan).splitlines()
    at = lines.index(next(line for line in lines if line.startswith("IF LOST")))
    then = [f"{present(standby.plan).tokens_per_s:.2f} tok/s" for standby in plan.standbys]
    assert lines[at:] == [
        "IF LOST                          THEN  STANDS BY",
        f"pi5-attic-3f09a1          {then[0]}  pi5-cellar-77d0e2 [0, 4), 420 MiB",
        "                                       pi5-hall-04bb9c [6, 8), 210 MiB",
        f"pi5-cellar-77d0e2         {then[1]}  pi5-attic-3f09a1 [4, 6), 210 MiB",
        "                                       pi5-hall-04bb9c [6, 8), 210 MiB",
        f"pi5-hall-04bb9c           {then[2]}  pi5-attic-3f09a1 [4, 6), 210 MiB",
        "                                       pi5-cellar-77d0e2 [8, 12), 420 MiB",
    ]
    assert max(map(len, lines)) <= 80
    (prediction,) = [number for number, line in enumerate(lines) if line.startswith("predicted: ")]
    assert "is back from its trip" in lines[prediction + 1] and "can leave every" in lines[prediction + 2]
    assert lines[prediction + 3] == "  a tree of 64 drafts is expected to bring 4.2 tokens"
    assert plan_report(plan)["tokens_per_tree"] == 4.15


def test_nodes_that_share_cores_are_named() -> None:
    shared = [make_device(name, free=700 * MIB, machine="boot") for name in NAMES]
    plan = plan_ring(shared, LAN, make_model(12), FLOWSPEC)
    told = f"{', '.join(NAMES)} share the cores of one machine, which count once"
    assert told in format_plan(plan).splitlines()
    assert plan_report(plan)["sharing"] == [list(NAMES)]


@pytest.mark.parametrize(
    ("difference", "cause", "said"),
    [
        (-0.72, "pi5 was hot", "72% fewer came: pi5 was hot"),
        (0.25, None, "25% more came"),
        (-0.004, None, "as many came"),
    ],
)
def test_what_came_is_held_against_what_was_predicted(difference: float, cause: str | None, said: str) -> None:
    report = {"predicted_tokens_per_s": 224.0, "difference": difference, "cause": cause}
    assert format_outcome(report) == f"the plan predicted 224.0 tokens/s, and {said}"


def test_where_there_is_no_room_it_says_so() -> None:
    plan = plan_of(700 * MIB)
    assert format_plan(plan).count("none of the others has room") == 3
    assert [standby["tokens_per_s"] for standby in plan_report(plan)["standbys"]] == [None] * 3


def test_the_report_has_all_of_it() -> None:
    plan = plan_of()
    first = plan_report(plan)["standbys"][0]
    assert (first["if_lost"], first["start"], first["stop"]) == ("pi5-attic-3f09a1", 0, 4)
    assert first["layers"][0] == {
        "node": "pi5-cellar-77d0e2",
        "start": 0,
        "stop": 4,
        "precision": "int8",
        "memory_bytes": 420 * MIB,
    }


def test_a_testbed_is_planned_with_standbys_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--testbed", "jetson4-7b-fp16-1gbit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["standbys"] == []
    assert main(["plan", "--testbed", "jetson4-7b-fp16-1gbit", "--standby"]) == 0
    assert capsys.readouterr().out.count("tok/s") == 4
