"""A new board is used when nobody waits for it, or at once; a hot one is weighed again when a session has ended."""

import random
from collections.abc import Iterator

import pytest

from flowspec_edge.core.planning.rebalancing import (
    REPLAN_S,
    SETTLE_S,
    BoardsFound,
    MakePlan,
    MoveRing,
    PacketsLost,
    PlanMade,
    Rebalancing,
    RebalancingEvent,
    RingClosed,
    RingOpened,
    SessionBegan,
    SessionEnded,
    TimePassed,
    WayReturned,
)

TWO, THREE, FOUR = frozenset("ab"), frozenset("abc"), frozenset("abcd")


@pytest.fixture(params=[False, True], ids=["when idle", "at once"])
def core(request: pytest.FixtureRequest) -> Iterator[Rebalancing]:
    core = Rebalancing(at_once=request.param)
    core.handle(BoardsFound(TWO), 0.0)
    assert core.handle(RingOpened(TWO), 1.0) == []
    yield core
    core.check()


def plan_due(core: Rebalancing, now: float) -> list[MakePlan | MoveRing]:
    assert core.next_deadline() == now
    return core.handle(TimePassed(), now)


def test_boards_that_were_weighed_are_no_news(core: Rebalancing) -> None:
    assert core.handle(BoardsFound(TWO), 5.0) == []
    assert core.handle(BoardsFound(frozenset("a")), 6.0) == []
    assert core.next_deadline() is None


def test_an_idle_ring_moves_to_a_better_plan(core: Rebalancing) -> None:
    assert core.handle(BoardsFound(THREE), 10.0) == []
    assert core.handle(BoardsFound(FOUR), 11.0) == []  # switched on together
    assert plan_due(core, 10.0 + SETTLE_S) == [MakePlan()]
    assert core.next_deadline() is None
    assert core.handle(PlanMade(FOUR, is_better=True), 14.0) == [MoveRing()]
    assert core.handle(RingOpened(FOUR), 15.0) == []
    assert core.next_deadline() is None


def test_a_plan_that_is_not_better_moves_nothing_and_is_not_made_again(core: Rebalancing) -> None:
    core.handle(BoardsFound(THREE), 10.0)
    assert plan_due(core, 10.0 + SETTLE_S) == [MakePlan()]
    assert core.handle(PlanMade(THREE, is_better=False), 14.0) == []
    assert core.handle(BoardsFound(TWO), 15.0) == []
    assert core.handle(BoardsFound(THREE), 16.0) == []
    assert core.next_deadline() is None


def test_sessions_that_run_end_where_they_began_unless_it_is_to_be_at_once(core: Rebalancing) -> None:
    core.handle(SessionBegan(), 9.0)
    core.handle(SessionBegan(), 9.0)
    core.handle(BoardsFound(THREE), 10.0)
    assert plan_due(core, 10.0 + SETTLE_S) == [MakePlan()]
    assert core.handle(PlanMade(THREE, is_better=True), 14.0) == [MoveRing()] * core.at_once
    assert core.handle(SessionEnded(), 15.0) == []
    assert core.handle(SessionEnded(), 16.0) == [MoveRing()] * (not core.at_once)


def test_a_board_that_comes_while_a_plan_is_made_waits_for_the_next_one(core: Rebalancing) -> None:
    core.handle(BoardsFound(THREE), 10.0)
    assert plan_due(core, 10.0 + SETTLE_S) == [MakePlan()]
    assert core.handle(BoardsFound(FOUR), 12.0) == []
    assert core.handle(PlanMade(THREE, is_better=False), 14.0) == [MakePlan()], "it has settled meanwhile"


def test_after_a_session_an_old_plan_is_made_anew(core: Rebalancing) -> None:
    for began in (1.0, REPLAN_S):
        core.handle(SessionBegan(), began)
        core.handle(SessionBegan(), began)
        assert core.handle(SessionEnded(), began + 0.5) == []
        assert core.handle(SessionEnded(), began + 1.0) == [MakePlan()] * (began == REPLAN_S)
    assert core.handle(PlanMade(TWO, is_better=False), REPLAN_S + 2.0) == []


def test_a_way_that_works_again_makes_a_plan_due(core: Rebalancing) -> None:
    assert core.handle(WayReturned(), 10.0) == core.handle(WayReturned(), 11.0) == []
    assert plan_due(core, 10.0 + SETTLE_S) == [MakePlan()]
    assert core.handle(PlanMade(TWO, is_better=True), 14.0) == [MoveRing()]
    core.handle(RingClosed(), 15.0)
    core.handle(WayReturned(), 16.0)
    assert core.next_deadline() is None, "the next ring is planned with it anyway"


def test_without_a_ring_nothing_is_due(core: Rebalancing) -> None:
    core.handle(BoardsFound(THREE), 10.0)
    core.handle(RingClosed(), 10.5)
    assert core.next_deadline() is None
    assert core.handle(BoardsFound(FOUR), 11.0) == []
    assert core.handle(RingOpened(FOUR), 12.0) == []
    assert core.next_deadline() is None


def test_a_plan_is_made_anew_when_a_board_that_it_uses_has_left(core: Rebalancing) -> None:
    core.handle(SessionBegan(), 9.0)
    core.handle(BoardsFound(FOUR), 10.0)
    assert plan_due(core, 10.0 + SETTLE_S) == [MakePlan()]
    assert core.handle(BoardsFound(THREE), 12.0) == []
    assert core.handle(PlanMade(FOUR, is_better=True, used=FOUR), 14.0) == [MakePlan()]
    assert core.handle(PlanMade(THREE, is_better=True, used=frozenset("ac")), 15.0) == [MoveRing()] * core.at_once
    if not core.at_once:
        assert core.handle(BoardsFound(frozenset("ac")), 16.0) == [], "a board that it does not use"
        assert core.handle(BoardsFound(frozenset("a")), 17.0) == [MakePlan()]


def test_a_session_that_ends_after_its_ring_makes_nothing_due(core: Rebalancing) -> None:
    core.handle(SessionBegan(), 2.0)
    core.handle(RingClosed(), 2.0 + REPLAN_S)
    assert core.handle(SessionEnded(), 3.0 + REPLAN_S) == []
    assert core.next_deadline() is None


def test_a_plan_of_a_ring_that_was_lost_meanwhile_is_forgotten(core: Rebalancing) -> None:
    core.handle(BoardsFound(THREE), 10.0)
    assert plan_due(core, 10.0 + SETTLE_S) == [MakePlan()]
    core.handle(RingClosed(), 12.0)
    assert core.handle(PlanMade(THREE, is_better=True), 14.0) == []


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_one_thing_is_done_at_a_time(seed: int) -> None:
    rng = random.Random(seed)
    core = Rebalancing(at_once=rng.random() < 0.5)
    now, num_sessions = 0.0, 0
    doing: MakePlan | MoveRing | None = None
    for _ in range(200):
        now += rng.choice((0.0, 0.3, 5.0, 70.0))
        boards = frozenset(rng.sample("abcde", rng.randint(1, 5)))
        events: list[RebalancingEvent] = [BoardsFound(boards), SessionBegan(), TimePassed()]
        if num_sessions:
            events.append(SessionEnded())
        if doing is None:
            events += [RingOpened(boards), RingClosed()]
        elif doing == MakePlan():
            events += [PlanMade(boards, rng.random() < 0.5, frozenset(rng.sample(sorted(boards), 1))), RingClosed()]
        else:
            events = [RingOpened(boards), RingClosed(), *events]
        event = rng.choice(events)
        num_sessions += isinstance(event, SessionBegan) - isinstance(event, SessionEnded)
        if isinstance(event, PlanMade) or (doing == MoveRing() and isinstance(event, (RingOpened, RingClosed))):
            doing = None
        actions = core.handle(event, now)
        core.check()
        assert len(actions) <= 1
        if actions:
            assert doing is None, "one at a time"
            assert actions != [MoveRing()] or core.at_once or not num_sessions
            (doing,) = actions


def test_a_ring_that_loses_packets_moves_while_texts_are_written(core: Rebalancing) -> None:
    core.handle(SessionBegan(), 2.0)
    core.handle(BoardsFound(frozenset("a")), 3.0)  # b is doubted
    assert core.handle(PacketsLost(), 3.0) == [MakePlan()]
    assert core.handle(PlanMade(frozenset("a"), is_better=True, used=frozenset("a")), 3.1) == [MoveRing()]
    assert core.handle(RingOpened(frozenset("a")), 3.2) == []
    core.handle(BoardsFound(TWO), 8.0)
    assert plan_due(core, 8.0 + SETTLE_S) == [MakePlan()]
    moves = core.handle(PlanMade(TWO, is_better=True), 10.0)
    assert moves == ([MoveRing()] if core.at_once else []), "for what is merely better it waits as ever"


def test_a_ring_that_loses_packets_stays_where_no_other_one_is_better(core: Rebalancing) -> None:
    core.handle(SessionBegan(), 2.0)
    core.handle(BoardsFound(frozenset("a")), 3.0)
    core.handle(PacketsLost(), 3.0)
    assert core.handle(PlanMade(frozenset("a"), is_better=False), 3.1) == []
    core.handle(BoardsFound(TWO), 8.0)
    assert plan_due(core, 8.0 + SETTLE_S) == [MakePlan()]
    assert core.handle(PlanMade(TWO, is_better=True), 10.0) == ([MoveRing()] if core.at_once else [])


def test_a_plan_under_way_knows_nothing_of_losses_so_another_one_is_made(core: Rebalancing) -> None:
    core.handle(SessionBegan(), 2.0)
    core.handle(BoardsFound(THREE), 3.0)
    assert plan_due(core, 3.0 + SETTLE_S) == [MakePlan()]
    assert core.handle(PacketsLost(), 5.0) == []
    assert core.handle(PlanMade(THREE, is_better=False), 5.1) == [MakePlan()]
    assert core.handle(PlanMade(THREE, is_better=True), 5.2) == [MoveRing()]


def test_without_a_ring_no_packets_are_lost() -> None:
    core = Rebalancing()
    assert core.handle(PacketsLost(), 1.0) == [] and core.next_deadline() is None
    core.check()


def test_a_ring_that_follows_no_boards_moves_for_lost_packets_alone() -> None:
    core = Rebalancing(follows=False)
    core.handle(BoardsFound(TWO), 0.0)
    core.handle(RingOpened(TWO), 1.0)
    for event in (BoardsFound(THREE), WayReturned(), SessionBegan(), SessionEnded()):
        assert core.handle(event, 2.0 + REPLAN_S) == [] and core.next_deadline() is None
    assert core.handle(PacketsLost(), 3.0 + REPLAN_S) == [MakePlan()]
    assert core.handle(PlanMade(TWO, is_better=True), 4.0 + REPLAN_S) == [MoveRing()]
    core.check()
