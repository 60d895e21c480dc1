"""What becomes of a text whose ring was lost: events in, actions compared."""

import math

import pytest

from flowspec_edge.core.planning import recovery as rc
from flowspec_edge.core.planning.recovery import (
    MAX_LOSSES,
    RETRY_S,
    GiveUp,
    OpenRing,
    Recovery,
    RingFailed,
    RingOpened,
    RoomMissing,
    WaitForBoards,
)


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
