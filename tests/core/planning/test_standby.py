"""Standbys: who would take over whose layers, and that nobody holds more than there is room for."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.planning import standby as module
from flowspec_edge.core.planning.placement import Device, Hop, Links, ModelNeeds, Plan, StagePlan, Standby
from flowspec_edge.core.planning.planner import plan_ring
from flowspec_edge.core.planning.standby import RESERVE_SHARE, plan_standbys
from flowspec_edge.core.planning.throughput import NO_DRAFTS, Throughput
from flowspec_edge.errors import PlacementError
from tests.core.planning.test_planner import FLOWSPEC, LAN, MIB, make_device, make_model, ranges
from tests.narrowing import present


def stages_of(plan: Plan) -> list[StagePlan]:
    return [dataclasses.replace(stage.stage_plan, precision=stage.precision) for stage in plan.stages]


def standbys_of(
    devices: Sequence[Device], model: ModelNeeds, links: Links = LAN, ring: Sequence[StagePlan] | None = None
) -> dict[str, Standby]:
    """By the node that is lost."""
    ring = ring or stages_of(plan_ring(devices, links, model, FLOWSPEC))
    return {standby.node: standby for standby in plan_standbys(devices, links, model, FLOWSPEC, ring)}


def held(standby: Standby) -> dict[str, tuple[int, int]]:
    return {layers.node: (layers.start, layers.stop) for layers in standby.layers}


def ring_of(**layers: tuple[int, int]) -> list[StagePlan]:
    return [StagePlan(node, start, stop, 0, "int8") for node, (start, stop) in layers.items()]


RING = ring_of(a=(0, 4), b=(4, 8), c=(8, 12))


def room_for(model: ModelNeeds, num_own: int, num_standby: int) -> int:
    """The memory in which so many blocks may stand by, and not one more."""
    needed = model.memory_bytes("int8", num_own) + model.standby_bytes("int8", num_standby)
    return int(needed / (1 - RESERVE_SHARE)) + 1


def test_neighbours_share_the_layers_of_a_lost_board() -> None:
    model = make_model(12)
    found = standbys_of([make_device(name) for name in "abc"], model, ring=RING)
    assert held(found["b"]) == {"a": (4, 6), "c": (6, 8)}
    assert ranges(present(found["b"].plan)) == {"a": (0, 6), "c": (6, 12)}
    assert (found["b"].start, found["b"].stop) == (4, 8)


def test_shares_move_along_the_ring_where_memory_allows_for_the_ring_is_faster_then() -> None:
    model = make_model(12)
    found = standbys_of([make_device(name) for name in "abc"], model, ring=RING)
    assert held(found["a"]) == {"b": (0, 4), "c": (6, 8)}
    assert ranges(present(found["a"].plan)) == {"b": (0, 6), "c": (6, 12)}
    tight = [make_device("a"), make_device("b", free=room_for(model, 4, 4)), make_device("c", free=0)]
    tight[2] = make_device("c", free=room_for(model, 4, 0))
    found = standbys_of(tight, model, ring=RING)
    assert held(found["a"]) == {"b": (0, 4)}, "c has no room for b's last layers"
    assert ranges(present(found["a"].plan)) == {"b": (0, 8), "c": (8, 12)}


def test_an_idle_board_takes_the_place_of_the_lost_one_where_that_is_faster() -> None:
    model = make_model(12)
    found = standbys_of([*(make_device(name) for name in "abc"), make_device("idle")], model, ring=RING)
    for standby in found.values():
        assert held(standby) == {"idle": (standby.start, standby.stop)}
    slow = standbys_of([*(make_device(name) for name in "abc"), make_device("idle", 80.0)], model, ring=RING)
    assert held(slow["b"]) == {"a": (4, 6), "c": (6, 8)}


def test_idle_boards_together_where_none_has_room_for_all() -> None:
    model = make_model(12)
    full = room_for(model, 4, 0)
    free = int(model.memory_bytes("int8", 2) / (1 - RESERVE_SHARE)) + 1
    devices = [*(make_device(name, free=full) for name in "abc"), *(make_device(name, free=free) for name in "xy")]
    found = standbys_of(devices, model, ring=RING)
    assert sorted(held(found["a"]).values()) == [(0, 2), (2, 4)]
    assert [standby.node for standby in found.values() if standby.plan] == ["a"], "they have no room for more"


def test_where_there_is_no_room_nobody_stands_by() -> None:
    model = make_model(12)
    full = [make_device(name, free=room_for(model, 4, 0)) for name in "abc"]
    for standby in standbys_of(full, model, ring=RING).values():
        assert standby.layers == () and standby.plan is None
    assert standbys_of([make_device("a")], model, ring=ring_of(a=(0, 12)))["a"].plan is None


def test_with_room_for_one_stage_the_one_that_is_fetched_the_slowest_gets_it() -> None:
    """All of the fourth board's memory is behind Wi-Fi for the bytes of a large stage."""
    model = make_model(12)
    ring = ring_of(a=(0, 3), b=(3, 9), c=(9, 12))
    devices = [*(make_device(name, free=room_for(model, 6, 0)) for name in "abc"), make_device("idle", free=0)]
    devices[0], devices[2] = (make_device(name, free=room_for(model, 3, 0)) for name in "ac")
    devices[3] = make_device("idle", free=int(model.memory_bytes("int8", 6) / (1 - RESERVE_SHARE)) + 1)
    links = dataclasses.replace(LAN, usual=Hop.from_rate(1.0, 20))
    found = standbys_of(devices, model, links, ring)
    assert held(found["b"]) == {"idle": (3, 9)}
    assert found["a"].plan is None and found["c"].plan is None


def test_what_an_origin_needs_for_head_and_drafter_is_no_room_for_layers() -> None:
    model = make_model(12)
    devices = [make_device(name, free=room_for(model, 4, 2)) for name in "abc"]
    assert held(standbys_of(devices, model, ring=RING)["b"]) == {"a": (4, 6), "c": (6, 8)}
    devices[0] = dataclasses.replace(devices[0], beside_bytes=MIB)
    assert standbys_of(devices, model, ring=RING)["b"].plan is None


def test_of_two_boards_the_emptier_one_takes_layers() -> None:
    model, ring = make_model(16), ring_of(a=(0, 4), b=(4, 8), c=(8, 12), d=(12, 16))
    devices = [make_device(name, free=room_for(model, 4, 0)) for name in "abcd"]
    idle = [make_device(name, free=int(model.memory_bytes("int8", 12) / (1 - RESERVE_SHARE)) + 1) for name in "xy"]
    found = standbys_of([*devices, *idle], model, ring=ring)
    assert [list(held(found[name])) for name in "abcd"] == [["x"], ["y"], ["x"], ["y"]]


def test_memory_that_a_faster_ring_does_not_need_any_more_is_given_to_another_stage() -> None:
    """Only b and z have room, and y comes first, on z. Then a is cheaper on b, which leaves no room for c, but faster
    on z.
    """
    model, ring = make_model(21), ring_of(c=(0, 4), b=(4, 8), a=(8, 12), z=(12, 16), y=(16, 21))
    room = {"b": (4, 4), "z": (4, 9), "y": (5, 0)}
    devices = [make_device(name, free=room_for(model, *room.get(name, (4, 0)))) for name in "cba"]
    devices += [make_device(name, 1.0, row_ms=0.01, free=room_for(model, *room[name])) for name in "zy"]
    links = dataclasses.replace(LAN, measured={("origin", "z"): Hop.from_rate(1.0, 20)})
    found = standbys_of(devices, model, links, ring)
    assert held(found["y"]) == {"z": (16, 21)} and held(found["a"]) == {"z": (8, 12)}
    assert held(found["c"]) == {"b": (0, 4), "z": (9, 12)}, "z has those anyway"


def test_what_stands_by_is_in_the_precision_of_the_stage_that_takes_it_over() -> None:
    model = make_model(12, block_bytes={"int8": 100 * MIB, "int4": 50 * MIB})
    layer = {name: make_device("").layer["int8"].scaled(factor) for name, factor in (("int8", 1.0), ("int4", 0.9))}
    devices = [make_device(name, layer=layer) for name in "abc"]
    ring = [dataclasses.replace(stage, precision="int4" if stage.node == "a" else "int8") for stage in RING]
    found = standbys_of(devices, model, ring=ring)
    assert {(layers.node, layers.precision) for standby in found.values() for layers in standby.layers} >= {
        ("a", "int4"),
        ("c", "int8"),
    }
    for stage in present(found["b"].plan).stages:
        assert stage.precision == ("int4" if stage.node == "a" else "int8")


# ----------------------------------------------------------------------------- rules

MODEL = make_model(9, block_bytes={"int8": 40 * MIB})
DEVICES = st.lists(
    st.tuples(st.integers(100, 1200), st.sampled_from([2.0, 5.0, 5.0, 12.0, 40.0])), min_size=1, max_size=5
).map(
    lambda found: [
        make_device(name, layer_ms, free=free * MIB) for name, (free, layer_ms) in zip("abcde", found, strict=False)
    ]
)
RATES = st.sampled_from([20, 100, 1000])


@settings(deadline=None, max_examples=60)
@given(DEVICES, st.dictionaries(st.sampled_from("abcde"), RATES))
def test_nobody_holds_more_than_is_free_and_whoever_can_be_stood_by_for_is(
    devices: list[Device], rates: dict[str, int]
) -> None:
    links = dataclasses.replace(
        LAN, measured={("origin", node): Hop.from_rate(2.0, rate) for node, rate in rates.items()}
    )
    try:
        ring = stages_of(plan_ring(devices, links, MODEL, FLOWSPEC))
    except PlacementError:
        return
    found = plan_standbys(devices, links, MODEL, FLOWSPEC, ring)
    assert found == plan_standbys(devices, links, MODEL, FLOWSPEC, ring), "the same each time"
    assert [(s.node, s.start, s.stop) for s in found] == [(s.node, s.start, s.stop) for s in ring]
    own = {stage.node: set(range(stage.start, stage.stop)) for stage in ring}
    standing = defaultdict[str, set[int]](set)
    for standby in found:
        check_standby(standby, own, {device.node: device for device in devices})
        for layers in standby.layers:
            standing[layers.node] |= set(range(layers.start, layers.stop))
    for device in devices:
        num_own, num_held = len(own.get(device.node, ())), len(standing[device.node])
        if num_held:
            needed = MODEL.memory_bytes("int8", num_own or num_held)
            needed += MODEL.standby_bytes("int8", num_held) if num_own else 0
            assert needed <= device.free_memory_bytes * (1 - RESERVE_SHARE)
    for standby in found:
        if standby.plan is None:
            assert not is_room(standby, ring, devices, standing)


def check_standby(standby: Standby, own: dict[str, set[int]], devices: dict[str, Device]) -> None:
    """The layers that stand by, with each board's own, are just those of the ring afterwards."""
    if standby.plan is None:
        assert standby.layers == ()
        return
    placed = [(stage.start, stage.stop) for stage in standby.plan.stages]
    assert placed[0][0] == 0 and placed[-1][1] == len(MODEL.blocks)
    assert all(one[1] == other[0] for one, other in itertools.pairwise(placed))
    beside = defaultdict[str, set[int]](set)
    for layers in standby.layers:
        assert layers.memory_bytes == MODEL.standby_bytes("int8", layers.stop - layers.start)
        beside[layers.node] |= set(range(layers.start, layers.stop))
    for stage in standby.plan.stages:
        assert stage.node != standby.node
        assert stage.memory_bytes <= devices[stage.node].free_memory_bytes
        assert beside[stage.node] == set(range(stage.start, stage.stop)) - own.get(stage.node, set())
    assert beside.keys() <= {stage.node for stage in standby.plan.stages}


def is_room(
    standby: Standby, ring: Sequence[StagePlan], devices: Sequence[Device], standing: dict[str, set[int]]
) -> bool:
    """Whether one of its neighbours alone, or an idle board, could still take its layers."""
    lost = set(range(standby.start, standby.stop))
    place = [stage.node for stage in ring].index(standby.node)
    beside = {stage.node for stage in ring[max(place - 1, 0) : place + 2]} - {standby.node}
    own = {stage.node: stage.stop - stage.start for stage in ring}
    for device in devices:
        if device.node not in beside and device.node in own:
            continue
        num_own, num_held = own.get(device.node, 0), len(standing[device.node] | lost)
        later = MODEL.memory_bytes("int8", num_own + len(lost))
        needed = MODEL.memory_bytes("int8", num_own or num_held)
        needed += MODEL.standby_bytes("int8", num_held) if num_own else 0
        if needed <= device.free_memory_bytes * (1 - RESERVE_SHARE) and later <= device.free_memory_bytes:
            return True
    return False


def test_a_large_ring_takes_no_longer_than_a_quiet_moment() -> None:
    devices = [make_device(f"pi-{number}", 5.0 + number % 3) for number in range(7)]
    devices.append(make_device("idle", 90.0))
    model, cuts = make_model(40), [round(40 * number / 7) for number in range(8)]
    ring = [
        StagePlan(device.node, start, stop, 0, "int8")
        for device, (start, stop) in zip(devices, itertools.pairwise(cuts), strict=False)
    ]
    assert all(standby.plan for standby in plan_standbys(devices, LAN, model, FLOWSPEC, ring))


def test_where_the_trip_counts_alone_a_quick_board_takes_more_than_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [make_device("a"), make_device("b", 2.0), make_device("c"), make_device("d")]
    ring, model = ring_of(a=(0, 3), b=(3, 6), c=(6, 9), d=(9, 12)), make_model(12)

    def after_a() -> Plan:
        return present(plan_standbys(devices, LAN, model, Throughput("autoregressive", NO_DRAFTS), ring)[0].plan)

    assert ranges(after_a()) == {"b": (0, 10), "c": (10, 11), "d": (11, 12)}
    monkeypatch.setattr(module, "PACES", (1.0,))
    assert after_a().interval_ms < 20.0
