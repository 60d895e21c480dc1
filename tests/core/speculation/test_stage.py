"""One stage by itself: events in, actions compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import CREDITS_PER_HOP, MAX_KEPT_SESSIONS, MAX_SESSIONS, MAX_WAITING_ADVANCES
from flowspec_edge.core.rows import NO_PARENT, Chunk, Passage, Row, SessionSpec, SlotMove
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.errors import ProtocolError
from tests.narrowing import present

ROOT = Row(0, NO_PARENT, 5)
LEFT, RIGHT = Row(1, 0, 6), Row(2, 0, 7)
BELOW_RIGHT = Row(3, 2, 8)


class Driver:
    """A stage in the middle of a ring with an open session, and the time."""

    def __init__(self, *, is_last: bool = False) -> None:
        self.core = Stage(is_last=is_last)
        self.now = 100.0
        self.tell(ev.SessionRequested(SessionSpec(1, 100)))

    def tell(self, event: ev.StageEvent, *, after_s: float = 0.0) -> list[ev.StageAction]:
        self.now += after_s
        actions = self.core.handle(event, self.now)
        self.core.check()
        return actions

    def arrive(
        self, *rows: Row, session: int = 1, turn: int = 0, passages: tuple[Passage, ...] = (), after_s: float = 0.0
    ) -> list[ev.StageAction]:
        hidden = np.array([[row.id] for row in rows], np.float32)
        return self.tell(ev.ChunkArrived(Chunk(session, rows, len(rows), hidden, turn, passages)), after_s=after_s)

    def finish(self, *rows: Row, after_s: float = 0.0) -> list[ev.StageAction]:
        return self.tell(ev.ForwardFinished(np.array([[row.id] for row in rows], np.float32)), after_s=after_s)

    def run_root(self) -> None:
        self.arrive(ROOT)
        self.finish(ROOT)


@pytest.fixture
def stage() -> Driver:
    return Driver()


def kinds(actions: Sequence[ev.StageAction]) -> list[type[Any]]:
    return [type(action) for action in actions]


def sent(actions: Sequence[ev.StageAction]) -> list[Chunk]:
    return [action.chunk for action in actions if isinstance(action, ev.SendChunk)]


def started(actions: Sequence[ev.StageAction]) -> list[tuple[Row, ...]]:
    return [action.rows for action in actions if isinstance(action, ev.RunForward)]


def test_a_passage_says_rows_and_waiting_and_running_time(stage: Driver) -> None:
    earlier = Passage(3, 0.5, 0.25)
    stage.arrive(ROOT, passages=(earlier,))
    stage.arrive(LEFT, RIGHT, passages=(earlier,), after_s=1.0)
    (first,) = sent(stage.finish(ROOT, after_s=2.0))
    assert first.passages == (earlier, Passage(1, 0.0, 3.0))
    (second,) = sent(stage.finish(LEFT, RIGHT, after_s=4.0))
    assert second.passages == (earlier, Passage(2, 2.0, 4.0))


def test_a_passage_counts_the_rows_that_ran_not_those_that_are_sent_on(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.CreditArrived(1))
    stage.arrive(LEFT, RIGHT)
    stage.tell(ev.AdvanceArrived(1, 0, 7))
    (chunk,) = sent(stage.finish(LEFT, RIGHT))
    assert chunk.rows == (RIGHT,)
    assert present(chunk.hidden).tolist() == [[RIGHT.id]]
    assert chunk.passages[0].num_rows == 2


def test_a_chunk_waits_for_its_turn(stage: Driver) -> None:
    assert stage.arrive(ROOT, turn=3) == []
    assert stage.tell(ev.TurnBegan(1, 2)) == []
    actions = stage.tell(ev.TurnBegan(1, 3), after_s=5.0)
    assert kinds(actions) == [ev.GrantCredit, ev.RunForward]
    (chunk,) = sent(stage.finish(ROOT))
    assert chunk.turn == 4
    assert chunk.passages[0].waited_s == 5.0


def test_a_turn_that_is_told_late_takes_none_back(stage: Driver) -> None:
    stage.tell(ev.TurnBegan(1, 3))
    stage.tell(ev.TurnBegan(1, 2))
    assert started(stage.arrive(ROOT, turn=3)) == [(ROOT,)]


def test_a_turn_that_has_begun_before_lets_the_chunk_run_at_once(stage: Driver) -> None:
    stage.tell(ev.TurnBegan(1, 3))
    assert started(stage.arrive(ROOT, turn=2)) == [(ROOT,)]


def test_a_chunk_without_a_turn_is_sent_on_without_one(stage: Driver) -> None:
    assert started(stage.arrive(ROOT)) == [(ROOT,)]
    (chunk,) = sent(stage.finish(ROOT))
    assert chunk.turn == 0


def test_a_dead_chunk_does_not_wait_for_its_turn(stage: Driver) -> None:
    stage.run_root()
    stage.arrive(RIGHT, turn=7)
    assert stage.tell(ev.AdvanceArrived(1, 0, 6)) == [ev.GrantCredit(1)]
    assert started(stage.arrive(LEFT)) == [(LEFT,)]


def test_a_chunk_that_is_dead_on_arrival_gives_its_credit_back(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.AdvanceArrived(1, 0, 6))
    assert stage.arrive(RIGHT, BELOW_RIGHT) == [ev.GrantCredit(1)]
    assert stage.arrive(LEFT, session=9) == [ev.GrantCredit(1)]


def test_an_advance_that_waited_for_a_row_prunes_its_chunk(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.AdvanceArrived(1, 1, 8))
    (forward,) = [a for a in stage.arrive(LEFT, RIGHT, Row(4, 1, 9)) if isinstance(a, ev.RunForward)]
    assert forward.rows == (LEFT,)
    assert present(forward.hidden).tolist() == [[LEFT.id]]


def test_rows_that_die_while_their_chunk_waits_for_the_link_do_not_leave(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.CreditArrived(1))
    assert stage.tell(ev.LinkPaused()) == []
    stage.arrive(LEFT, RIGHT, BELOW_RIGHT)
    assert stage.finish(LEFT, RIGHT, BELOW_RIGHT) == []
    assert stage.tell(ev.AdvanceArrived(1, 0, 7)) == []
    (chunk,) = sent(stage.tell(ev.LinkResumed()))
    assert chunk.rows == (RIGHT, BELOW_RIGHT) and chunk.num_wanted == 2
    assert present(chunk.hidden).tolist() == [[RIGHT.id], [BELOW_RIGHT.id]]
    assert chunk.passages[-1].num_rows == 3, "that many ran"
    assert stage.tell(ev.LinkResumed()) == [], "it has left"


def test_a_chunk_that_dies_while_it_waits_for_the_link_gives_its_credit_back(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.LinkPaused())
    stage.arrive(RIGHT)
    assert stage.finish(RIGHT) == []
    assert started(stage.arrive(LEFT)) == [], "all credit is used"
    assert started(stage.tell(ev.AdvanceArrived(1, 0, 6))) == [(LEFT,)]
    assert stage.finish(LEFT) == []
    assert [chunk.rows for chunk in sent(stage.tell(ev.LinkResumed()))] == [(LEFT,)]


def test_the_end_of_a_session_ends_what_waits_for_the_link(stage: Driver) -> None:
    stage.tell(ev.LinkPaused())
    stage.arrive(ROOT)
    stage.finish(ROOT)
    assert stage.tell(ev.SessionEnded(1)) == [ev.FreeCache(1)]
    assert stage.tell(ev.LinkResumed()) == []


def test_a_turn_of_one_session_is_none_of_another(stage: Driver) -> None:
    stage.tell(ev.SessionRequested(SessionSpec(2, 100)))
    stage.arrive(ROOT, session=2, turn=1)
    assert stage.tell(ev.TurnBegan(1, 1)) == []
    assert started(stage.tell(ev.TurnBegan(2, 1))) == [(ROOT,)]


def test_the_last_living_rows_death_cancels_the_forward_once(stage: Driver) -> None:
    stage.run_root()
    stage.arrive(RIGHT, BELOW_RIGHT)
    assert stage.tell(ev.AdvanceArrived(1, 0, 6)) == [ev.CancelForward(1)]
    assert stage.tell(ev.AdvanceArrived(1, 0, 6)) == []
    assert stage.tell(ev.SessionEnded(1)) == [ev.FreeCache(1)]


def test_a_row_that_brings_a_waiting_advance_with_it_cancels_too(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.AdvanceArrived(1, 1, 8))
    stage.arrive(RIGHT)
    assert stage.arrive(LEFT) == [ev.CancelForward(1)]


def test_a_forward_with_a_living_row_goes_on(stage: Driver) -> None:
    stage.run_root()
    stage.arrive(LEFT, RIGHT)
    assert stage.tell(ev.AdvanceArrived(1, 0, 7)) == []
    assert stage.tell(ev.AdvanceArrived(1, 2, 8)) == []  # a committed row lives
    assert kinds(stage.finish(LEFT, RIGHT)) == [ev.SendChunk]


def test_the_end_of_its_session_cancels_the_forward_once(stage: Driver) -> None:
    stage.arrive(ROOT)
    assert stage.tell(ev.SessionEnded(1)) == [ev.FreeCache(1), ev.CancelForward(1)]
    assert stage.tell(ev.SessionEnded(1)) == []
    assert stage.finish(ROOT) == []


def test_the_end_of_another_session_cancels_nothing(stage: Driver) -> None:
    stage.tell(ev.SessionRequested(SessionSpec(2, 100)))
    stage.arrive(ROOT)
    assert stage.tell(ev.SessionEnded(2)) == [ev.FreeCache(2)]


def test_nothing_of_a_cancelled_forward_is_sent_whatever_it_returned(stage: Driver) -> None:
    stage.run_root()
    stage.arrive(RIGHT)
    stage.tell(ev.AdvanceArrived(1, 0, 6))
    assert stage.tell(ev.ForwardFinished(np.zeros((0, 1), np.float32))) == []


def test_a_cancelled_forward_gives_its_credit_back(stage: Driver) -> None:
    stage.run_root()  # one credit is left
    stage.arrive(RIGHT)
    stage.arrive(LEFT)
    stage.tell(ev.AdvanceArrived(1, 0, 6))
    assert started(stage.finish(RIGHT)) == [(LEFT,)]
    stage.finish(LEFT)
    assert stage.arrive(Row(4, 1, 9)) == [], "both credits are in use"
    assert kinds(stage.tell(ev.CreditArrived(1))) == [ev.GrantCredit, ev.RunForward]


def test_a_cancelled_chunks_slots_are_used_anew(stage: Driver) -> None:
    """The rows of the cancelled forward are behind every living row, and the next rows are written over them."""
    stage.run_root()
    stage.arrive(RIGHT, BELOW_RIGHT)
    stage.tell(ev.AdvanceArrived(1, 0, 6))
    stage.arrive(LEFT)
    (forward,) = [action for action in stage.finish(RIGHT, BELOW_RIGHT) if isinstance(action, ev.RunForward)]
    assert (forward.placement.moves, forward.placement.first_slot) == ((), 1)
    assert forward.placement.recent[0, -2:].tolist() == [0, 1]


def test_the_last_stage_sends_only_wanted_rows_and_gives_the_credit_back_where_none_is() -> None:
    last = Driver(is_last=True)
    prompt = (ROOT, LEFT)
    hidden = np.zeros((2, 1), np.float32)
    last.tell(ev.ChunkArrived(Chunk(1, prompt[:1], 0, hidden[:1])))
    assert last.finish(ROOT) == []
    last.tell(ev.ChunkArrived(Chunk(1, prompt[1:], 1, hidden[1:])))
    (chunk,) = sent(last.finish(LEFT))
    assert (chunk.rows, chunk.num_wanted) == ((LEFT,), 1)
    assert started(last.arrive(Row(4, 1, 9))) == [(Row(4, 1, 9),)]


def test_more_chunks_than_credits_are_refused(stage: Driver) -> None:
    for id in range(CREDITS_PER_HOP + 1):
        stage.arrive(Row(id, id - 1 if id else NO_PARENT, 5))
    with pytest.raises(ProtocolError, match="a chunk without credit"):
        stage.arrive(Row(9, 8, 5))


class TappedDriver(Driver):
    """A stage whose layers 2 and 4 are tapped, and a prompt of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.tell(ev.SessionRequested(SessionSpec(2, 100, True, True, 1)))

    def run(self, *rows: Row) -> list[ev.StageAction]:
        (forward,) = [
            action for action in self.arrive(*rows, session=2) if isinstance(action, ev.RunForward) and action.is_tapped
        ]
        hidden = np.array([[row.id] for row in forward.rows], np.float32)
        return self.tell(ev.ForwardFinished(hidden, {2: hidden + 0.2, 4: hidden + 0.4}))


def tapped(
    actions: Sequence[ev.StageAction],
) -> list[tuple[int, tuple[int, ...], Any]]:
    return [(a.layer, a.ids, a.hidden.ravel().tolist()) for a in actions if isinstance(a, ev.SendTapped)]


def test_tapped_rows_of_the_prompt_are_sent_at_once_and_others_when_they_are_verified() -> None:
    stage = TappedDriver()
    assert tapped(stage.run(ROOT)) == [(2, (0,), [pytest.approx(0.2)]), (4, (0,), [pytest.approx(0.4)])]
    stage.tell(ev.CreditArrived(1))
    assert tapped(stage.run(LEFT, RIGHT)) == []
    assert tapped(stage.tell(ev.AdvanceArrived(2, 0, 7))) == [], "the root's successor is not verified by that"
    assert tapped(stage.run(BELOW_RIGHT)) == []
    assert tapped(stage.tell(ev.AdvanceArrived(2, 3, 9))) == [
        (2, (2, 3), [pytest.approx(2.2), pytest.approx(3.2)]),
        (4, (2, 3), [pytest.approx(2.4), pytest.approx(3.4)]),
    ]


def test_an_advance_before_the_forwards_end_sends_the_same_tapped_rows() -> None:
    stage = TappedDriver()
    stage.run(ROOT)
    stage.tell(ev.CreditArrived(1))
    stage.tell(ev.AdvanceArrived(2, 2, 8))
    assert [ids for _, ids, _ in tapped(stage.run(LEFT, RIGHT))] == [(2,), (2,)]
    assert tapped(stage.tell(ev.AdvanceArrived(2, 2, 8))) == [], "each row is sent once"


def test_a_session_that_wants_no_tapped_rows_gets_none(stage: Driver) -> None:
    (forward,) = [action for action in stage.arrive(ROOT) if isinstance(action, ev.RunForward)]
    assert not forward.is_tapped
    assert tapped(stage.finish(ROOT)) == []


def test_credit_beyond_what_may_wait_is_refused(stage: Driver) -> None:
    with pytest.raises(ProtocolError, match="credit for 3 chunks, where 2 may wait .CREDITS_PER_HOP."):
        stage.tell(ev.CreditArrived(1))


WRONG_CHUNKS: list[tuple[bool, Chunk, str]] = [
    (True, Chunk(1, (Row(0, NO_PARENT, 10),), 1), "token 10 came, and the vocabulary ends at 9"),
    (True, Chunk(1, (ROOT,), 1, np.zeros((1, 4), np.float32)), "a chunk of hidden rows came"),
    (False, Chunk(1, (ROOT,), 1), "a chunk of tokens alone came"),
    (False, Chunk(1, (ROOT,), 1, np.zeros((1, 5), np.float32)), "hidden rows of 5 values came where the model has 4"),
    (True, Chunk(9, (Row(0, NO_PARENT, 10),), 1), "token 10 came"),
]


def test_credit_for_a_chunk_that_has_not_left_is_refused(stage: Driver) -> None:
    stage.arrive(ROOT)
    with pytest.raises(ProtocolError, match="CREDITS_PER_HOP"):
        stage.tell(ev.CreditArrived(1))
    stage.tell(ev.LinkPaused())
    stage.finish(ROOT)
    with pytest.raises(ProtocolError, match="CREDITS_PER_HOP"):
        stage.tell(ev.CreditArrived(1))


@pytest.mark.parametrize(("embeds", "chunk", "text"), WRONG_CHUNKS, ids=[text for _, _, text in WRONG_CHUNKS])
def test_a_chunk_that_the_layers_cannot_run_over_is_refused_before_it_runs(
    embeds: bool, chunk: Chunk, text: str
) -> None:
    stage = Stage(is_last=False, embeds=embeds, vocab_size=10, hidden_size=4)
    stage.handle(ev.SessionRequested(SessionSpec(1, 100)), 0.0)
    with pytest.raises(ProtocolError, match=text):
        stage.handle(ev.ChunkArrived(chunk), 0.0)
    good = Chunk(1, (ROOT,), 1, None if embeds else np.zeros((1, 4), np.float32))
    assert kinds(stage.handle(ev.ChunkArrived(good), 0.0)) == [ev.GrantCredit, ev.RunForward]


def test_a_flood_of_sessions_ends_at_the_limit(stage: Driver) -> None:
    for session in range(2, MAX_SESSIONS + 1):
        stage.tell(ev.SessionRequested(SessionSpec(session, 100)))
    with pytest.raises(ProtocolError, match="MAX_SESSIONS"):
        stage.tell(ev.SessionRequested(SessionSpec(1000, 100)))


def test_a_flood_of_advances_ends_at_the_limit(stage: Driver) -> None:
    with pytest.raises(ProtocolError, match=f"{MAX_WAITING_ADVANCES + 1} Advances wait for rows that never came"):
        for at in range(MAX_WAITING_ADVANCES + 1):
            stage.tell(ev.AdvanceArrived(1, at + 1, 5))


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Row(0, NO_PARENT, 6), "row 0 came twice, with different parents or tokens"),
        (Row(3, 3, 6), "draft ids count up from parents to children"),
        (Row(3, 7, 6), "row 3 has the parent 7"),
        (Row(NO_PARENT, 0, 6), "row 4294967295 has the parent 0"),
    ],
)
def test_rows_that_contradict_the_tree_are_refused(stage: Driver, row: Row, text: str) -> None:
    stage.run_root()
    with pytest.raises(ProtocolError, match=text):
        stage.arrive(row)


def test_a_row_whose_parent_is_not_there_is_dead_on_arrival(stage: Driver) -> None:
    stage.run_root()
    assert stage.arrive(Row(9, 7, 6)) == [ev.GrantCredit(1)]


def test_the_committed_rows_of_an_ended_session_are_kept_and_taken_over(stage: Driver) -> None:
    """Behind the root was a draft; the other one was run before the Advance, and is moved to its place."""
    stage.run_root()
    stage.arrive(LEFT, RIGHT, BELOW_RIGHT)
    stage.finish(LEFT, RIGHT, BELOW_RIGHT)
    stage.tell(ev.CreditArrived(2))
    stage.tell(ev.AdvanceArrived(1, 2, 8))
    kept = stage.tell(ev.SessionEnded(1, is_kept=True))
    assert kept == [ev.KeepCache(1, (SlotMove(1, 4, 1), SlotMove(2, 1, 1), SlotMove(4, 2, 1)))]
    opened = stage.tell(ev.SessionRequested(SessionSpec(2, 100, num_prompt=4, kept=1, num_kept=2)))
    assert opened == [ev.OpenCache(2, 100, 1, 2)]
    _, forward = stage.arrive(Row(2, 1, 9), Row(3, 2, 9), session=2)
    assert isinstance(forward, ev.RunForward)
    assert (forward.placement.first_slot, forward.placement.positions.tolist()) == (2, [2, 3])
    assert forward.placement.recent[0, -3:].tolist() == [0, 1, 2] and not forward.placement.moves


def test_a_kept_session_is_taken_over_once(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.AdvanceArrived(1, 0, 6))
    stage.tell(ev.SessionEnded(1, is_kept=True))
    for session, num_kept in ((2, 1), (3, 0)):
        spec = SessionSpec(session, 100, num_prompt=2, kept=1, num_kept=1)
        assert stage.tell(ev.SessionRequested(spec)) == [ev.OpenCache(session, 100, num_kept, num_kept)]


def test_one_that_has_fewer_rows_is_freed_and_the_origin_hears_of_none(stage: Driver) -> None:
    stage.run_root()
    stage.tell(ev.AdvanceArrived(1, 0, 6))
    stage.tell(ev.SessionEnded(1, is_kept=True))
    spec = SessionSpec(2, 100, num_prompt=9, kept=1, num_kept=2)
    assert stage.tell(ev.SessionRequested(spec)) == [ev.FreeCache(1), ev.OpenCache(2, 100)]
    assert kinds(stage.arrive(ROOT, session=2)) == [ev.GrantCredit, ev.RunForward]


def test_only_rows_that_were_run_are_kept(stage: Driver) -> None:
    """A session without any is freed, whatever the origin says."""
    stage.tell(ev.SessionRequested(SessionSpec(2, 100, num_prompt=2)))
    stage.arrive(ROOT)
    stage.arrive(ROOT, LEFT, session=2)
    assert stage.tell(ev.SessionEnded(2, is_kept=True)) == [ev.FreeCache(2), ev.GrantCredit(1)]
    assert stage.tell(ev.SessionEnded(1, is_kept=True)) == [ev.FreeCache(1), ev.CancelForward(1)]


def test_a_kept_session_is_freed_when_the_origin_says_so_or_too_many_are(stage: Driver) -> None:
    for session in range(2, MAX_KEPT_SESSIONS + 4):
        stage.tell(ev.SessionRequested(SessionSpec(session, 100)))
        stage.arrive(ROOT, session=session)
        stage.finish(ROOT)
        stage.tell(ev.CreditArrived(1))
        stage.tell(ev.AdvanceArrived(session, 0, 6))
        freed = [ev.FreeCache(session - MAX_KEPT_SESSIONS)] if session > MAX_KEPT_SESSIONS + 1 else []
        assert stage.tell(ev.SessionEnded(session, is_kept=True)) == [ev.KeepCache(session, ()), *freed]
    assert stage.tell(ev.SessionEnded(9)) == [ev.FreeCache(9)]
    assert stage.tell(ev.SessionEnded(9)) == []
    with pytest.raises(ProtocolError, match="session 10 is open already"):
        stage.tell(ev.SessionRequested(SessionSpec(10, 100)))


@pytest.mark.parametrize(("num_prompt", "capacity"), [(3, 100), (9, 3)])
def test_more_rows_than_a_prompt_may_begin_with_are_refused(stage: Driver, num_prompt: int, capacity: int) -> None:
    with pytest.raises(ProtocolError, match=f"3 rows of a prompt of {num_prompt} are to be those of a kept session"):
        stage.tell(ev.SessionRequested(SessionSpec(2, capacity, num_prompt=num_prompt, kept=1, num_kept=3)))
