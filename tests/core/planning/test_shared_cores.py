"""Nodes of one machine share its cores: each is counted with what it can have of them, never with all."""

from __future__ import annotations

import dataclasses

import pytest

from flowspec_edge.core.planning.planner import plan_ring
from flowspec_edge.core.planning.shared_cores import Cores, core_shares, crowding, groups_of
from flowspec_edge.core.planning.throughput import NO_DRAFTS, Throughput
from tests.core.planning.test_planner import FLOWSPEC, LAN, MIB, make_device, make_model, ranges
from tests.narrowing import present

TWO, FOUR = frozenset({0, 1}), frozenset({0, 1, 2, 3})


def test_shares_are_of_the_cores_that_the_nodes_of_a_machine_have_together() -> None:
    nodes = {
        "one": Cores("pc", TWO, 2),
        "other": Cores("pc", TWO, 1),
        "left": Cores("server", frozenset({0, 1}), 2),
        "right": Cores("server", frozenset({2, 3}), 2),
        "busy": Cores("desk", TWO, 5),
        "unknown": Cores(),
        "stranger": Cores(),
    }
    assert core_shares(nodes) == {
        **{"one": 1.0, "other": 0.5, "left": 0.5, "right": 0.5, "busy": 1.0, "unknown": 1.0, "stranger": 1.0}
    }
    assert crowding(nodes) == {
        **{"one": 1.5, "other": 1.5, "left": 1.0, "right": 1.0, "busy": 1.0, "unknown": 1.0, "stranger": 1.0}
    }
    assert groups_of(node.machine for node in nodes.values()) == ((0, 1), (2, 3))


def test_nodes_of_one_machine_bring_no_more_than_one_of_them() -> None:
    """Each has all cores while the others wait, so a ring of them is no quicker than one."""
    apart = [make_device(name) for name in "abcd"]
    plan = plan_ring([dataclasses.replace(device, machine="pc") for device in apart], LAN, make_model(), FLOWSPEC)
    assert ranges(plan) == {"a": (0, 16)}
    assert plan.tokens_per_s == present(plan.alone).tokens_per_s
    assert [out.node for out in plan.left_out] == ["b", "c", "d"]
    assert all("without; a has its cores" in out.reason for out in plan.left_out)
    assert present(plan.one_more).tokens_per_s > plan.tokens_per_s, "one more is another machine"
    assert plan_ring(apart, LAN, make_model(), FLOWSPEC).tokens_per_s > 1.5 * plan.tokens_per_s


def test_where_only_all_of_them_have_room_their_work_is_added_up() -> None:
    room = [make_device(name, free=700 * MIB, machine="pc") for name in "abcd"]
    plan = plan_ring(room, LAN, make_model(), FLOWSPEC)
    assert plan.sharing == (("a", "b", "c", "d"),)
    assert plan.interval_ms == pytest.approx(sum(stage.time.at(plan.num_rows) for stage in plan.stages))
    apart = plan_ring([dataclasses.replace(device, machine="") for device in room], LAN, make_model(), FLOWSPEC)
    assert apart.sharing == () and apart.interval_ms < plan.interval_ms / 2
    assert plan.tokens_per_s < apart.tokens_per_s


def test_nodes_with_cores_of_their_own_on_one_machine_are_as_good_as_boards() -> None:
    pinned = [make_device(name, machine="server", core_share=0.25) for name in "abcd"]
    plan = plan_ring(pinned, LAN, make_model(), FLOWSPEC)
    apart = plan_ring([make_device(name) for name in "abcd"], LAN, make_model(), FLOWSPEC)
    assert (ranges(plan), plan.tokens_per_s) == (ranges(apart), apart.tokens_per_s)


def test_a_chunk_alone_in_the_ring_waits_for_no_cores() -> None:
    alone = Throughput("autoregressive", NO_DRAFTS)
    room = [make_device(name, free=1000 * MIB, machine="pc") for name in "ab"]
    apart = [dataclasses.replace(device, machine="") for device in room]
    plans = [plan_ring(devices, LAN, make_model(), alone) for devices in (room, apart)]
    assert plans[0].tokens_per_s == plans[1].tokens_per_s


def test_the_machine_of_the_origin_has_its_work_once_beside_all_stages() -> None:
    room = [make_device(name, free=1000 * MIB, machine="pc", beside_ms=9.0) for name in "ab"]
    plan = plan_ring(room, LAN, make_model(), FLOWSPEC)
    assert plan.interval_ms == pytest.approx(9.0 + sum(stage.time.at(plan.num_rows) for stage in plan.stages))


def test_a_board_beside_a_crowded_machine_takes_its_share() -> None:
    devices = [make_device(name, machine="pc") for name in "ab"] + [make_device("c")]
    plan = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    assert ranges(plan) == {"a": (0, 8), "c": (8, 16)}
