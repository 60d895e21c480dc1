"""Which nodes and ways are planned without, and when they are used again: events in, actions compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.planning import losses as ls
from flowspec_edge.core.planning.losses import (
    FAILED_S,
    FORGET_S,
    GREET_S,
    MAX_DOUBT_S,
    REPEAT_S,
    TRY_S,
    Losses,
    PacketsLost,
    Part,
    PartAnswered,
    PartSilent,
    PartsLost,
    StageFailed,
    TimePassed,
    TryPart,
    UsePart,
    way_between,
)

HALL = frozenset({"hall"})


def test_a_lost_node_is_greeted_at_once_and_again_until_it_answers() -> None:
    lost = Losses()
    assert lost.handle(PartsLost(frozenset({"hall", "attic"})), 10.0) == [TryPart("attic"), TryPart("hall")]
    assert lost.nodes == {"attic", "hall"}
    assert lost.handle(PartSilent("hall"), 11.5) == []
    assert lost.next_deadline() == 11.5 + GREET_S
    assert lost.handle(TimePassed(), 11.5 + GREET_S) == [TryPart("hall")]
    assert lost.handle(PartAnswered("hall"), 13.0) == [UsePart("hall")]
    assert lost.nodes == {"attic"}
    lost.check()


def test_a_node_that_is_lost_again_while_it_is_greeted_is_not_greeted_twice() -> None:
    lost = Losses()
    lost.handle(PartsLost(HALL), 0.0)
    assert lost.handle(PartsLost(HALL), 1.0) == []
    assert lost.handle(TimePassed(), 1.0 + FORGET_S - 0.1) == []
    assert lost.handle(TimePassed(), 1.0 + FORGET_S) == [UsePart("hall")]
    assert lost.handle(PartSilent("hall"), 40.0) == [] and lost.handle(PartAnswered("hall"), 40.0) == []
    assert lost.next_deadline() is None


def test_a_stage_that_fails_twice_soon_costs_its_node_some_seconds() -> None:
    lost = Losses()
    assert lost.handle(StageFailed("hall"), 0.0) == [] and not lost.nodes
    assert lost.handle(StageFailed("hall"), REPEAT_S + 1) == [] and not lost.nodes, "that was long ago"
    assert lost.handle(StageFailed("hall"), REPEAT_S + 2) == []
    assert lost.nodes == HALL and lost.next_deadline() == REPEAT_S + 2 + FAILED_S
    assert lost.handle(TimePassed(), REPEAT_S + 2 + FAILED_S) == [UsePart("hall")]


def test_a_cut_way_is_tried_after_a_while_and_used_again_when_it_works() -> None:
    way = way_between("hall", "attic")
    assert way == way_between("attic", "hall")
    lost = Losses()
    assert lost.handle(PartsLost(frozenset({way})), 5.0) == [], "it was cut a moment ago"
    assert lost.ways == {way} and not lost.nodes and lost.next_deadline() == 5.0 + TRY_S
    assert lost.handle(TimePassed(), 5.0 + TRY_S) == [TryPart(way)]
    assert lost.handle(PartSilent(way), 20.0) == [] and lost.next_deadline() == 20.0 + TRY_S
    assert lost.handle(TimePassed(), 20.0 + TRY_S) == [TryPart(way)]
    assert lost.handle(PartAnswered(way), 30.5) == [UsePart(way)] and not lost.ways


@pytest.mark.parametrize("part", ["hall", way_between("attic", "hall")])
def test_a_part_that_comes_and_goes_is_doubted_twice_as_long_each_time(part: Part) -> None:
    lost, now = Losses(), 0.0
    doubts = []
    for _ in range(8):
        lost.handle(PartsLost(frozenset({part})), now)
        now += TRY_S
        lost.handle(TimePassed(), now)
        actions, answered_at = lost.handle(PartAnswered(part), now), now
        while actions != [UsePart(part)]:
            assert lost.doubted == {part} == {*lost.nodes, *lost.ways}
            now = lost.next_deadline() or 0.0
            actions = lost.handle(TimePassed(), now)
        doubts.append(now - answered_at)
        assert not lost.doubted and not lost.nodes and not lost.ways
        now += REPEAT_S
    assert doubts == [0.0, FAILED_S, 2 * FAILED_S, 4 * FAILED_S, 8 * FAILED_S, 16 * FAILED_S, *[MAX_DOUBT_S] * 2]
    lost.handle(PartsLost(frozenset({part})), now + 1)
    lost.handle(TimePassed(), now + 1 + TRY_S)
    assert lost.handle(PartAnswered(part), now + 1 + TRY_S) == [UsePart(part)], "the last loss was long before"


def test_a_doubted_node_that_was_used_all_the_same_and_is_lost_is_doubted_longer() -> None:
    lost = Losses()
    lost.handle(StageFailed("hall"), 0.0)
    lost.handle(StageFailed("hall"), 1.0)
    assert lost.doubted == HALL
    assert lost.handle(PartsLost(HALL), 2.0) == [TryPart("hall")] and not lost.doubted
    assert lost.handle(PartAnswered("hall"), 3.0) == [] and lost.doubted == HALL
    assert lost.next_deadline() == 3.0 + 2 * FAILED_S


def test_a_node_of_which_two_ways_are_cut_is_doubted_itself() -> None:
    """Its own link loses packets, and a ring over its other ways would be lost as well."""
    lost = Losses()
    lost.handle(PartsLost(frozenset({way_between("hall", "attic")})), 0.0)
    assert not lost.nodes
    lost.handle(PartsLost(frozenset({way_between("hall", "cellar")})), 3.0)
    assert lost.nodes == lost.doubted == HALL
    assert lost.handle(TimePassed(), 3.0 + FAILED_S) == [UsePart("hall")]
    lost.handle(PartsLost(frozenset({way_between("hall", "origin")})), 9.0)
    assert lost.nodes == HALL, "again"
    assert UsePart("hall") not in lost.handle(TimePassed(), 9.0 + 2 * FAILED_S - 0.1)
    assert UsePart("hall") in lost.handle(TimePassed(), 9.0 + 2 * FAILED_S)


def test_the_origin_of_which_two_ways_are_cut_is_not_doubted() -> None:
    lost = Losses("desk")
    ways = [way_between("desk", board) for board in ("attic", "cellar")]
    lost.handle(PartsLost(frozenset(ways)), 0.0)
    assert lost.ways == set(ways) and not lost.nodes


@pytest.mark.parametrize("part", ["hall", way_between("attic", "hall")])
def test_a_part_that_loses_packets_is_doubted_and_longer_where_it_still_does_when_used_again(part: Part) -> None:
    lost = Losses()
    assert lost.handle(PacketsLost(part), 1.0) == [], "it answers: nothing is to be tried"
    assert lost.doubted == {part} == {*lost.nodes, *lost.ways}
    assert lost.handle(PacketsLost(part), 3.0) == [] and lost.next_deadline() == 1.0 + FAILED_S, "that is known"
    assert lost.handle(TimePassed(), 1.0 + FAILED_S) == [UsePart(part)] and not lost.doubted
    lost.handle(PacketsLost(part), 1.0 + FAILED_S + REPEAT_S)
    assert lost.next_deadline() == 1.0 + FAILED_S + REPEAT_S + 2 * FAILED_S
    now = lost.next_deadline() or 0.0
    assert lost.handle(TimePassed(), now) == [UsePart(part)]
    lost.handle(PacketsLost(part), now + REPEAT_S + 1)
    assert lost.next_deadline() == now + REPEAT_S + 1 + FAILED_S, "that was long ago"


def test_a_lost_part_is_no_better_for_losing_packets() -> None:
    lost = Losses()
    lost.handle(PartsLost(HALL), 0.0)
    assert lost.handle(PacketsLost("hall"), 1.0) == [] and not lost.doubted and lost.nodes == HALL


def test_a_node_of_which_two_ways_lose_packets_is_doubted_itself() -> None:
    lost = Losses("desk")
    lost.handle(PacketsLost(way_between("desk", "attic")), 0.0)
    lost.handle(PacketsLost(way_between("attic", "hall")), 1.0)
    assert lost.nodes == {"attic"}


ALL: list[Part] = ["attic", "cellar", "hall", way_between("attic", "hall")]
PARTS = st.sampled_from(ALL)
EVENTS = st.one_of(
    st.frozensets(PARTS).map(PartsLost),
    PARTS.map(PacketsLost),
    st.sampled_from(["attic", "hall"]).map(StageFailed),
    PARTS.map(PartAnswered),
    PARTS.map(PartSilent),
    st.just(TimePassed()),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 20.0))))
def test_whatever_happens_no_part_is_lost_for_good_nor_tried_twice_at_a_time(
    steps: list[tuple[ls.LossEvent, float]],
) -> None:
    lost, now, tried = Losses(), 0.0, set[Part]()
    for event, pause_s in steps:
        now += pause_s
        if isinstance(event, PartAnswered | PartSilent):
            if event.part not in tried:
                continue  # nobody asked
            tried.discard(event.part)
        before = lost.nodes | lost.ways
        actions = lost.handle(event, now)
        used = {action.part for action in actions if isinstance(action, UsePart)}
        assert used == before - lost.nodes - lost.ways - (event.parts if isinstance(event, PartsLost) else set())
        for action in actions:
            if isinstance(action, TryPart):
                assert action.part in lost.nodes | lost.ways
                assert action.part not in tried
                tried.add(action.part)
        assert lost.doubted <= lost.nodes | lost.ways
        lost.check()
    lost.handle(TimePassed(), now + max(FORGET_S, MAX_DOUBT_S))
    assert not lost.nodes and not lost.ways and lost.next_deadline() is None
