"""Who loses packets: counts in, the likeliest part out. And what a ring brings with the loss."""

import dataclasses
import statistics
from collections.abc import Sequence

import pytest

from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.losses import way_between
from flowspec_edge.core.planning.packet_loss import MAX_SHARE, REPEAT_MS, Lossy, PacketLoss, slowed
from flowspec_edge.core.planning.placement import Plan, PlannedStage
from tests.core.planning.packets import EVERY_S, PACKETS_PER_S, PacketFlow, of_node, of_way


@pytest.mark.parametrize(
    ("share", "busy", "usual_s", "worst_s", "least"),
    [
        (0.05, 1.0, 1.1, 1.9, 57),
        (0.05, 0.3, 1.3, 2.1, 48),
        (0.1, 1.0, 0.9, 1.3, 57),
        (0.2, 1.0, 0.9, 1.0, 57),
        (0.3, 1.0, 0.9, 0.9, 57),
    ],
)
def test_a_node_behind_a_bad_link_is_named_within_two_seconds(
    share: float, busy: float, usual_s: float, worst_s: float, least: int
) -> None:
    """However little is sent besides the probes. Seldom one of its ways is named first: where its other links had no
    loss yet that would have brought probes.
    """
    times, parts = [], []
    for seed in range(60):
        at_s, found = next(PacketFlow(of_node("hall", share), seed, busy).name_lossy(10.0))
        assert found.part == "hall" or "hall" in found.part
        assert share / 2 < found.share < share * 2 + 0.05
        times.append(at_s)
        parts.append(found.part)
    assert statistics.median(times) <= usual_s and max(times) <= worst_s
    assert parts.count("hall") >= least


@pytest.mark.parametrize(("share", "probes_per_s"), [(0.0, 0), (0.01, 15), (0.02, 45)])
def test_a_usable_wifi_is_not_named_in_five_minutes_and_costs_few_probes(share: float, probes_per_s: int) -> None:
    flow = PacketFlow(of_node("hall", share), 1)
    assert list(flow.name_lossy(300.0)) == []
    num_ends = sum("hall" in way for way in PACKETS_PER_S)
    assert flow.num_probes <= 300 * probes_per_s * num_ends
    assert list(PacketFlow(lambda near, far: share / 2, 2).name_lossy(300.0)) == [], "all on one"


def test_one_way_that_is_bad_is_told_from_a_node_of_which_all_are() -> None:
    way = way_between("attic", "hall")
    for seed in range(20):
        assert next(PacketFlow(of_way(way, 0.15), seed).name_lossy(5.0))[1].part == way


def test_the_origins_own_link_is_told_from_those_of_its_stages() -> None:
    for seed in range(20):
        assert next(PacketFlow(of_node("desk", 0.15), seed).name_lossy(5.0))[1].part == "desk"


def test_of_a_node_with_one_way_to_the_origin_it_is_the_node_that_is_named() -> None:
    flow = PacketFlow(of_node("hall", 0.2), 1, per_s={"desk->hall": 200, "hall->desk": 200})
    assert next(flow.name_lossy(5.0))[1].part == "hall"


def named(core: PacketLoss, counts: Sequence[tuple[int, int]]) -> list[int]:
    """On which of these counts of one way a part is named."""
    return [
        at for at, (sent, lost) in enumerate(counts) if core.count("desk", "hall", sent, lost, at * EVERY_S) is not None
    ]


def test_a_part_is_named_once_and_again_where_it_had_been_sound_meanwhile() -> None:
    first, second = named(PacketLoss("desk"), [(100, 20)] * 20 + [(100, 0)] * 100 + [(100, 20)] * 9)
    assert first == 3 and second == 123, "four counts are the least"


def test_a_queue_that_overflows_now_and_then_is_no_bad_link() -> None:
    """A slow wire full of data: a hundred packets are dropped at once, a few per cent of all, and then none."""
    assert named(PacketLoss("desk"), [(2000, 100), *[(300, 0)] * 9] * 100) == []


def test_a_radio_that_hears_nothing_for_a_moment_is_no_bad_link() -> None:
    """Half a second without, on all ways of a node: what was sent then is sent again and again."""
    core = PacketLoss("desk")
    for at, share in enumerate([*[0] * 5, 3, 3, 2, *[0] * 20] * 20):
        for near, far in (
            ("desk", "hall"),
            ("attic", "hall"),
            ("hall", "attic"),
            ("hall", "cellar"),
            ("cellar", "hall"),
        ):
            num_sent = 5 if share else 30
            assert core.count(near, far, num_sent, share, at * EVERY_S) is None


def test_a_few_repetitions_on_a_quiet_link_are_none_either() -> None:
    """A peer of which nothing is heard any more is another case: it is asked whether it is there."""
    core = PacketLoss("desk")
    for at_s in (0.2, 0.4, 0.8, 1.6):
        assert core.count("desk", "hall", 1, 1, at_s) is None
        assert core.count("attic", "hall", 1, 1, at_s) is None


def test_nothing_is_lost_between_a_node_and_itself_nor_where_nothing_was_sent() -> None:
    """An origin that serves a stage sends to itself. A peer may claim anything."""
    core = PacketLoss("desk")
    for at in range(100):
        assert core.count("desk", "desk", 100, 50, at * EVERY_S) is None
        assert core.count("desk", "hall", 0, 50, at * EVERY_S) is None
    assert core.count("desk", "hall", 1, 2**32 - 1, 100.0) is None


def plan_of(*nodes: str) -> Plan:
    stages = [
        PlannedStage(
            node=node, start=n, stop=n + 1, memory_bytes=0, precision="int8", left_bytes=0, time=Line(40.0, 1.0)
        )
        for n, node in enumerate(nodes)
    ]
    return Plan(stages=tuple(stages), num_rows=8, trip_ms=100.0, interval_ms=40.0, tokens_per_s=20.0)


def test_a_ring_is_slower_by_what_its_chunks_wait_where_packets_are_lost() -> None:
    plan = plan_of("attic", "hall")
    wait_ms = REPEAT_MS * 0.1 / 0.8
    assert slowed(plan, Lossy("hall", 0.1), "desk") == pytest.approx(20.0 * 100.0 / (100.0 + 2 * wait_ms))
    one_way = Lossy(way_between("hall", "desk"), 0.1)
    assert slowed(plan, one_way, "desk") == pytest.approx(20.0 * 100.0 / (100.0 + wait_ms))
    assert slowed(plan, Lossy("cellar", 0.3), "desk") == 20.0
    worst = slowed(plan, Lossy("hall", 1.0), "desk")
    assert 0 < worst == slowed(plan, Lossy("hall", MAX_SHARE), "desk") < 1.5


def test_the_fewer_its_trips_the_less_a_ring_is_slowed() -> None:
    plan = plan_of("attic", "hall")
    slow = dataclasses.replace(plan, trip_ms=1000.0, tokens_per_s=2.0)
    lossy = Lossy("attic", 0.05)
    assert slowed(slow, lossy, "desk") / 2.0 > slowed(plan, lossy, "desk") / 20.0 > 0.8
