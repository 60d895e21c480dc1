"""What becomes of texts when nodes are lost: events in, actions compared."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.planning import recovery as rc
from flowspec_edge.core.planning.recovery import (
    FAILED_S,
    FORGET_S,
    GREET_S,
    MAX_LOSSES,
    REPEAT_S,
    RETRY_S,
    GiveUp,
    GreetNode,
    LostNodes,
    NodeAnswered,
    NodeSilent,
    NodesLost,
    OpenRing,
    Recovery,
    RingFailed,
    RingOpened,
    RoomMissing,
    StageFailed,
    TimePassed,
    UseNode,
    WaitForBoards,
)

HALL = frozenset({"hall"})


def test_a_lost_node_is_greeted_at_once_and_again_until_it_answers() -> None:
    lost = LostNodes()
    assert lost.handle(NodesLost(frozenset({"hall", "attic"})), 10.0) == [GreetNode("attic"), GreetNode("hall")]
    assert lost.nodes == {"attic", "hall"}
    assert lost.handle(NodeSilent("hall"), 11.5) == []
    assert lost.next_deadline() == 11.5 + GREET_S
    assert lost.handle(TimePassed(), 11.5 + GREET_S) == [GreetNode("hall")]
    assert lost.handle(NodeAnswered("hall"), 13.0) == [UseNode("hall")]
    assert lost.nodes == {"attic"}
    lost.check()


def test_a_node_that_is_lost_again_while_it_is_greeted_is_not_greeted_twice() -> None:
    lost = LostNodes()
    lost.handle(NodesLost(HALL), 0.0)
    assert lost.handle(NodesLost(HALL), 1.0) == []
    assert lost.handle(TimePassed(), 1.0 + FORGET_S - 0.1) == []
    assert lost.handle(TimePassed(), 1.0 + FORGET_S) == [UseNode("hall")]
    assert lost.handle(NodeSilent("hall"), 40.0) == [] and lost.handle(NodeAnswered("hall"), 40.0) == []
    assert lost.next_deadline() is None


def test_a_stage_that_fails_twice_soon_costs_its_node_some_seconds() -> None:
    lost = LostNodes()
    assert lost.handle(StageFailed("hall"), 0.0) == [] and not lost.nodes
    assert lost.handle(StageFailed("hall"), REPEAT_S + 1) == [] and not lost.nodes, "that was long ago"
    assert lost.handle(StageFailed("hall"), REPEAT_S + 2) == []
    assert lost.nodes == HALL and lost.next_deadline() == REPEAT_S + 2 + FAILED_S
    assert lost.handle(TimePassed(), REPEAT_S + 2 + FAILED_S) == [UseNode("hall")]


NODES = st.sampled_from(["attic", "cellar", "hall"])
EVENTS = st.one_of(
    st.frozensets(NODES).map(NodesLost),
    NODES.map(StageFailed),
    NODES.map(NodeAnswered),
    NODES.map(NodeSilent),
    st.just(TimePassed()),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 20.0))))
def test_whatever_happens_no_node_is_lost_for_good_nor_greeted_twice_at_a_time(
    steps: list[tuple[rc.LossEvent, float]],
) -> None:
    lost, now, greeted = LostNodes(), 0.0, set[str]()
    for event, pause_s in steps:
        now += pause_s
        if isinstance(event, NodeAnswered | NodeSilent):
            if event.node not in greeted:
                continue  # nobody asked
            greeted.discard(event.node)
        before = lost.nodes
        actions = lost.handle(event, now)
        used = {action.node for action in actions if isinstance(action, UseNode)}
        assert used == before - lost.nodes
        for action in actions:
            if isinstance(action, GreetNode):
                assert action.node in lost.nodes
                assert action.node not in greeted
                greeted.add(action.node)
        lost.check()
    lost.handle(TimePassed(), now + FORGET_S)
    assert not lost.nodes and lost.next_deadline() is None


def test_a_text_goes_on_until_too_many_rings_in_a_row_brought_no_token() -> None:
    recovery = Recovery(60.0)
    for num_tokens in (5, 6):  # a token counts, however many losses there were before
        for _ in range(MAX_LOSSES - 1):
            assert recovery.handle(RingFailed(num_tokens, "hall is lost"), 0.0) == [OpenRing()]
            assert recovery.handle(RingOpened(), 0.0) == []
    (action,) = recovery.handle(RingFailed(6, "hall is lost"), 0.0)
    assert isinstance(action, GiveUp) and "hall is lost" in action.reason
    recovery.check()


def test_a_text_waits_for_boards_so_long_and_anew_after_each_ring() -> None:
    recovery, missing = Recovery(10.0), RoomMissing("too small", had_room=True)
    for began in (100.0, 200.0):
        assert recovery.handle(missing, began) == [WaitForBoards(began + RETRY_S)]
        assert recovery.handle(missing, began + 9.5) == [WaitForBoards(began + 10)]
        if began == 100.0:
            assert recovery.handle(RingOpened(), began + 9.9) == []
    (action,) = recovery.handle(missing, 210.0)
    assert isinstance(action, GiveUp)
    assert action.reason == "too small; no board came within 10 s (--wait-for-boards)"


@pytest.mark.parametrize(("wait_s", "had_room"), [(0.0, True), (math.inf, False)])
def test_who_is_not_to_wait_or_has_lost_nothing_hears_the_reason_at_once(wait_s: float, had_room: bool) -> None:
    assert Recovery(wait_s).handle(RoomMissing("no node", had_room), 0.0) == [GiveUp("no node")]


def test_a_text_whose_first_ring_lost_a_node_waits_too() -> None:
    recovery = Recovery(10.0)
    recovery.handle(RingFailed(0, "hall is lost"), 0.0)
    assert recovery.handle(RoomMissing("too small", had_room=False), 0.0) == [rc.WaitForBoards(RETRY_S)]
