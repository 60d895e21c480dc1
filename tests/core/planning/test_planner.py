"""Plans: who serves what, who is left out and why, what stays where it is."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.losses import way_between
from flowspec_edge.core.planning.placement import (
    LAYER_BYTES,
    Device,
    Hop,
    Links,
    LoadedLayers,
    ModelNeeds,
    Plan,
    StagePlan,
)
from flowspec_edge.core.planning.planner import MAX_DEVICES, plan_ring, plan_shares
from flowspec_edge.core.planning.throughput import TYPICAL_DRAFTS, Throughput
from flowspec_edge.core.planning.working_memory import kv_cache_bytes, stage_work_bytes
from flowspec_edge.errors import NotMeasuredError, PlacementError
from flowspec_edge.manifest import load_manifest
from tests.narrowing import present

MIB = 2**20
FLOWSPEC = Throughput("flowspec", TYPICAL_DRAFTS)
LAN = Links(origin="origin", usual=Hop.from_rate(1.0, 1000))


def make_model(
    num_layers: int = 16,
    *,
    layers_per_block: int = 1,
    block_bytes: Mapping[str, int] | None = None,
    head_ms: float = 5.0,
) -> ModelNeeds:
    starts = range(0, num_layers, layers_per_block)
    return ModelNeeds(
        blocks=tuple((start, min(start + layers_per_block, num_layers)) for start in starts),
        block_bytes=block_bytes or {"int8": 100 * MIB},
        kv_bytes=10 * MIB,
        row_bytes=8192,
        head_ms=head_ms,
    )


def make_device(node: str, layer_ms: float = 5.0, *, row_ms: float = 0.05, free: int = 10**12, **fields: Any) -> Device:
    layer = {"int8": Line(layer_ms, row_ms)}
    return Device(**{"node": node, "free_memory_bytes": free, "layer": layer, **fields})


def ranges(plan: Plan) -> dict[str, tuple[int, int]]:
    return {stage.node: (stage.start, stage.stop) for stage in plan.stages}


def test_equal_boards_share_equally() -> None:
    plan = plan_ring([make_device(name) for name in "abcd"], LAN, make_model(20), FLOWSPEC)
    assert ranges(plan) == {"a": (0, 5), "b": (5, 10), "c": (10, 15), "d": (15, 20)}
    assert plan.left_out == ()
    assert [(hop.start, hop.end) for hop in plan.hops] == list(itertools.pairwise(["origin", *"abcd", "origin"]))
    took_ms = sum(stage.time.at(plan.num_rows) for stage in plan.stages) + plan.head_ms
    assert took_ms + sum(hop.ms(plan.num_rows) for hop in plan.hops) == pytest.approx(plan.trip_ms)
    assert plan.stages[0].time == Line(25.0, 0.25)
    trip_s = sum((*plan.times.stages, *plan.times.hops), Line()).at(plan.num_rows)
    assert 1000 * trip_s == pytest.approx(plan.trip_ms - plan.head_ms - plan.hops[0].ms(plan.num_rows))
    assert plan.stages[0].memory_bytes == int(500 * MIB * 1.05) + 50 * MIB + 60 * MIB
    assert present(plan.alone).tokens_per_s < plan.tokens_per_s < present(plan.one_more).tokens_per_s


def test_equal_shares_bring_what_the_same_plan_would() -> None:
    known = [make_device(name) for name in "abcd"], LAN, make_model(20), FLOWSPEC
    plan = plan_ring(*known)
    shares = [stage.stage_plan for stage in plan.stages]
    assert plan_shares(shares, *known) == dataclasses.replace(plan, alone=None, one_more=None)


def test_of_equal_shares_the_slowest_board_is_expected_to_hold_up_the_others() -> None:
    """Whichever order the nodes are known in; a node that serves nothing counts for nothing."""
    model = make_model(20)
    devices = [make_device("idle", 1.0), make_device("slow", 20.0), *(make_device(name) for name in "abc")]
    shares = [StagePlan(name, 5 * place, 5 * place + 5, 0) for place, name in enumerate(["a", "slow", "b", "c"])]
    plan = plan_shares(shares, devices, LAN, model, FLOWSPEC)
    assert ranges(plan) == {"a": (0, 5), "slow": (5, 10), "b": (10, 15), "c": (15, 20)}
    assert plan.interval_ms == pytest.approx(5 * Line(20.0, 0.05).at(plan.num_rows))
    assert plan.tokens_per_s < plan_ring(devices[1:], LAN, model, FLOWSPEC).tokens_per_s


def test_of_shares_that_do_not_fit_or_that_nobody_knows_nothing_is_expected() -> None:
    shares = [StagePlan("a", 0, 10, 0), StagePlan("b", 10, 20, 0)]
    with pytest.raises(NotMeasuredError, match="nothing is known of b"):
        plan_shares(shares, [make_device("a")], LAN, make_model(20), FLOWSPEC)
    small = make_device("b", free=make_model(20).memory_bytes("int8", 9))
    with pytest.raises(PlacementError, match="the model needs"):
        plan_shares(shares, [make_device("a"), small], LAN, make_model(20), FLOWSPEC)


def test_a_slower_board_serves_less() -> None:
    """No two quick boards have memory for the whole model, so the slow one is needed."""
    room = make_model().memory_bytes("int8", 7)
    devices = [make_device("slow", 10.0, row_ms=0.5), *(make_device(n, row_ms=0.25, free=room) for n in "ab")]
    plan = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    served = {node: stop - start for node, (start, stop) in ranges(plan).items()}
    assert served == {"a": 7, "b": 7, "slow": 2}
    assert present(plan.alone).node == "slow"


def test_a_board_with_caches_in_float16_has_room_for_longer_contexts() -> None:
    """16 caches of 10 MiB are 160 MiB; in half of it, one of them is in float32 as well."""
    model = make_model()
    needed = model.memory_bytes("int8", 16, has_half_cache=True)
    assert model.memory_bytes("int8", 16) - needed == 70 * MIB
    plan = plan_ring([make_device("half", free=needed, has_half_cache=True)], LAN, model, FLOWSPEC)
    assert plan.stages[0].memory_bytes == needed and plan.stages[0].left_bytes == 0
    with pytest.raises(PlacementError):
        plan_ring([make_device("whole", free=needed)], LAN, model, FLOWSPEC)


def test_an_origin_that_serves_needs_memory_for_head_and_drafter_too() -> None:
    model = make_model()
    needed = model.memory_bytes("int8", 16) + 30 * MIB
    plan = plan_ring([make_device("origin", free=needed, beside_bytes=30 * MIB)], LAN, model, FLOWSPEC)
    assert (plan.stages[0].memory_bytes, plan.stages[0].left_bytes) == (needed, 0)
    tight = [make_device("origin", free=needed - 1, beside_bytes=30 * MIB), make_device("pi", 50.0)]
    start, stop = ranges(plan_ring(tight, LAN, model, FLOWSPEC))["origin"]
    assert stop - start == 15
    without_room = make_device("origin", free=model.memory_bytes("int8", 1), beside_bytes=30 * MIB)
    (out,) = plan_ring([without_room, make_device("pi")], LAN, model, FLOWSPEC).left_out
    assert out.reason == "175 MiB free; a stage of the fewest layers needs 205 MiB"


def test_a_board_that_would_slow_the_ring_is_left_out_by_name() -> None:
    devices = [make_device("pi-a"), make_device("pi-b"), make_device("pi-zero", 400.0)]
    plan = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    assert sorted(ranges(plan)) == ["pi-a", "pi-b"]
    (out,) = plan.left_out
    assert out.node == "pi-zero"
    assert "would slow the ring" in out.reason and f"{plan.tokens_per_s:.2f} without" in out.reason


def cut(*ways: tuple[str, str]) -> Links:
    return dataclasses.replace(LAN, cut=frozenset(way_between(*way) for way in ways))


def test_a_ring_goes_around_ways_that_are_cut() -> None:
    devices = [make_device(name) for name in "abcd"]
    for ways in (("a", "b"),), (("a", "b"), ("c", "d"), ("b", "origin")), (("c", "b"), ("origin", "a"), ("d", "a")):
        plan = plan_ring(devices, cut(*ways), make_model(20), FLOWSPEC)
        assert sorted(ranges(plan)) == list("abcd") and plan.left_out == ()
        assert not {way_between(hop.start, hop.end) for hop in plan.hops} & {way_between(*way) for way in ways}


def test_a_board_that_none_could_be_the_neighbour_of_is_left_out() -> None:
    plan = plan_ring([make_device(name) for name in "abc"], cut(("a", "b"), ("a", "c")), make_model(), FLOWSPEC)
    assert ranges(plan).keys() == {"b", "c"}
    assert [(out.node, out.reason) for out in plan.left_out] == [
        ("a", "cannot reach the nodes that would be its neighbours")
    ]


def test_what_only_fits_into_a_ring_with_a_cut_way_does_not_fit() -> None:
    devices = [make_device(name, free=make_model().memory_bytes("int8", 8)) for name in "ab"]
    assert len(plan_ring(devices, LAN, make_model(), FLOWSPEC).stages) == 2
    with pytest.raises(PlacementError, match="a and b cannot reach each other"):
        plan_ring(devices, cut(("a", "b")), make_model(), FLOWSPEC)


def test_a_board_twice_as_fast_alone_as_the_ring_is_used_alone() -> None:
    slow = [make_device(f"pi-{number}", 20.0, row_ms=2.0) for number in range(4)]
    ring = plan_ring(slow, LAN, make_model(), FLOWSPEC)
    for layer_ms in itertools.count(10.0, -0.5):  # as fast as it takes
        alone = plan_ring([make_device("jetson", layer_ms)], LAN, make_model(), FLOWSPEC)
        if alone.tokens_per_s >= 2 * ring.tokens_per_s:
            break
    plan = plan_ring([*slow, make_device("jetson", layer_ms)], LAN, make_model(), FLOWSPEC)
    assert ranges(plan) == {"jetson": (0, 16)}
    assert present(plan.alone).node == "jetson" and present(plan.alone).tokens_per_s == plan.tokens_per_s
    assert [out.node for out in plan.left_out] == [device.node for device in slow]


def test_a_board_without_room_for_a_layer_says_how_much_it_lacks() -> None:
    plan = plan_ring([make_device("big"), make_device("tiny", free=100 * MIB)], LAN, make_model(), FLOWSPEC)
    (out,) = plan.left_out
    assert out.node == "tiny" and "100 MiB free; a stage of the fewest layers needs 175 MiB" in out.reason


def test_more_boards_than_layers() -> None:
    plan = plan_ring([make_device(n, 50.0) for n in "abc"], LAN, make_model(2), FLOWSPEC)
    assert len(plan.stages) == 2
    assert "2 blocks of layers" in plan.left_out[0].reason


def test_a_model_that_does_not_fit_is_an_error_with_a_remedy() -> None:
    with pytest.raises(PlacementError, match=r"a 300 MiB, b 300 MiB free: add a node"):
        plan_ring([make_device(n, free=300 * MIB) for n in "ab"], LAN, make_model(), FLOWSPEC)
    with pytest.raises(PlacementError, match="add a node"):
        plan_ring([make_device("a", free=MIB)], LAN, make_model(), FLOWSPEC)
    with pytest.raises(PlacementError, match="flowspec node"):
        plan_ring([], LAN, make_model(), FLOWSPEC)


def test_each_board_takes_the_precision_that_suits_its_part() -> None:
    """The quick precision while there is room, the small one where there is not."""
    model = make_model(block_bytes={"fp32": 400 * MIB, "int4": 60 * MIB})
    layer = {"fp32": Line(5.0, 0.05), "int4": Line(8.0, 0.4)}
    wide, narrow = make_device("wide", layer=layer), make_device("narrow", free=800 * MIB, layer=layer)
    assert [stage.precision for stage in plan_ring([wide], LAN, model, FLOWSPEC).stages] == ["fp32"]
    tight = make_device("tight", free=model.memory_bytes("int4", 16), layer=layer)
    assert [stage.precision for stage in plan_ring([tight], LAN, model, FLOWSPEC).stages] == ["int4"]
    plan = plan_ring(
        [dataclasses.replace(wide, free_memory_bytes=model.memory_bytes("fp32", 14)), narrow], LAN, model, FLOWSPEC
    )
    assert all(stage.left_bytes >= 0 for stage in plan.stages)
    assert sum(stage.stop - stage.start for stage in plan.stages) == 16


def test_the_last_stages_extra_work_is_counted() -> None:
    devices = [make_device(n, last=Line(15.0)) for n in "ab"]
    plan = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    assert ranges(plan) == {"a": (0, 9), "b": (9, 16)}
    assert plan.stages[-1].time.fixed == pytest.approx(7 * 5.0 + 15.0)


def test_the_origin_may_serve_and_what_else_it_does_is_counted() -> None:
    devices = [make_device("origin", beside_ms=15.0), make_device("pi")]
    plan = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    served = {node: stop - start for node, (start, stop) in ranges(plan).items()}
    assert served == {"origin": 7, "pi": 9}


def test_the_ring_goes_the_short_way_around() -> None:
    far = Hop.from_rate(20.0, 1000)
    names = ["hall-1", "attic-1", "hall-2", "attic-2"]
    measured = {(a, b): far for a, b in itertools.permutations(names, 2) if a.split("-")[0] != b.split("-")[0]}
    measured |= {("origin", "attic-1"): far, ("origin", "attic-2"): far}
    links = dataclasses.replace(LAN, measured=measured)
    plan = plan_ring([make_device(name, 50.0) for name in names], links, make_model(), FLOWSPEC)
    rooms = [stage.node.split("-")[0] for stage in plan.stages]
    assert len(plan.stages) == 4
    assert sum(a != b for a, b in itertools.pairwise(["hall", *rooms, "hall"])) == 2


def test_a_slow_wire_between_two_boards_is_avoided() -> None:
    slow = Hop.from_rate(1.0, 1)
    devices = [make_device(name, 50.0) for name in "abc"]
    plan = plan_ring(devices, dataclasses.replace(LAN, measured={("a", "b"): slow}), make_model(), FLOWSPEC)
    order = [stage.node for stage in plan.stages]
    assert ("a", "b") not in itertools.pairwise(order) and ("b", "a") not in itertools.pairwise(order)
    assert len(order) == 3


def test_blocks_of_several_layers_are_not_cut() -> None:
    plan = plan_ring([make_device(n) for n in "abc"], LAN, make_model(16, layers_per_block=5), FLOWSPEC)
    assert all(stage.start % 5 == 0 for stage in plan.stages)
    assert plan.stages[-1].stop == 16


def loaded(plan: Plan) -> dict[str, LoadedLayers]:
    return {stage.node: LoadedLayers(stage.start, stage.stop, stage.precision) for stage in plan.stages}


def test_what_is_loaded_stays_while_nothing_is_clearly_better() -> None:
    devices = [make_device(n) for n in "abcd"]
    first = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    turned = {stage.node: stage for stage in first.stages}
    held = [
        dataclasses.replace(
            make_device(n, 5.0 * factor), loaded=LoadedLayers(turned[n].start, turned[n].stop, turned[n].precision)
        )
        for n, factor in (("d", 1.004), ("c", 0.995), ("b", 1.0), ("a", 1.002))
    ]
    plan = plan_ring(held, LAN, make_model(), FLOWSPEC)
    assert plan.is_kept and ranges(plan) == ranges(first)


def test_what_is_loaded_goes_where_something_is_clearly_better() -> None:
    first = plan_ring([make_device(n) for n in "abcd"], LAN, make_model(), FLOWSPEC)
    devices = [make_device(n, loaded=loaded(first)[n], slowdown=3.0 if n == "b" else 1.0) for n in "abcd"]
    plan = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    assert not plan.is_kept
    served = {stage.node: stage.stop - stage.start for stage in plan.stages}
    assert served.get("b", 0) < 4


def test_of_equal_plans_the_one_that_moves_fewest_layers() -> None:
    """Node ``c`` was lost and ``e`` has come. The others keep their places, in whatever order they are found."""
    first = plan_ring([make_device(n) for n in "abcd"], LAN, make_model(), FLOWSPEC)
    held = loaded(first)
    for order in itertools.permutations("abde"):
        plan = plan_ring([make_device(n, loaded=held.get(n)) for n in order], LAN, make_model(), FLOWSPEC)
        assert ranges(plan) == {"a": (0, 4), "b": (4, 8), "e": (8, 12), "d": (12, 16)}


def test_loaded_layers_of_another_model_or_precision_are_no_ring() -> None:
    held = {"a": LoadedLayers(0, 8, "fp32"), "b": LoadedLayers(8, 16, "fp32")}
    plan = plan_ring([make_device(n, loaded=held[n]) for n in "ab"], LAN, make_model(), FLOWSPEC)
    assert not plan.is_kept
    plan = plan_ring([make_device(n, loaded=LoadedLayers(0, 99, "int8")) for n in "ab"], LAN, make_model(), FLOWSPEC)
    assert not plan.is_kept and len(plan.stages) == 2


def test_beyond_sixteen_the_slowest_are_left_out_by_name() -> None:
    devices = [make_device(f"pi-{n:02}", 5.0 + n) for n in range(MAX_DEVICES + 2)]
    plan = plan_ring(devices, LAN, make_model(), FLOWSPEC)
    reasons = {out.node: out.reason for out in plan.left_out}
    assert "only the 16 quickest" in reasons["pi-16"] and "only the 16 quickest" in reasons["pi-17"]


@pytest.mark.parametrize("schedule", ["autoregressive", "chunked", "pipedec", "lockstep"])
def test_the_plan_follows_the_schedule(schedule: str) -> None:
    """Without drafts the quickest board alone is best; draft trees bring more where a pipeline is filled."""
    devices = [make_device("quick", 4.0), *(make_device(n, 5.0) for n in "abc")]
    plan = plan_ring(devices, LAN, make_model(32), Throughput(schedule, TYPICAL_DRAFTS, 5.0))
    assert (len(plan.stages) == 1) == (schedule == "autoregressive")
    assert all("would slow the ring" in out.reason for out in plan.left_out)


def test_the_needs_of_a_bundle() -> None:
    manifest = load_manifest(DEMO_BUNDLE)
    geometry = manifest.geometry
    needs = ModelNeeds.from_manifest(manifest, num_tokens=1000, head_ms=1.0)
    assert needs.blocks == tuple((i, i + 1) for i in range(8))
    assert needs.block_bytes == {"int8": 2951168 + LAYER_BYTES}
    assert needs.kv_bytes == kv_cache_bytes(geometry, 1, 1024), "caches grow by 128 slots"
    more = ModelNeeds.from_manifest(manifest, num_tokens=4096, head_ms=1.0)
    grown = [stage_work_bytes(geometry, "int8", num_slots) for num_slots in (1024, 4096)]
    assert more.memory_bytes("int8", 3) - needs.memory_bytes("int8", 3) == 9 * needs.kv_bytes + grown[1] - grown[0]
