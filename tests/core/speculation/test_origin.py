"""The origin of a ring: events in, actions compared. Its ring has two stages, and its head wants what the test says."""

from typing import ClassVar

import numpy as np
import pytest

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import CREDITS_PER_HOP, PREFILL_ROWS, TREE_MARGIN
from flowspec_edge.core.rows import NO_PARENT, Chunk, Floats, Passage, Row, SessionSpec
from flowspec_edge.core.speculation import schedules
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import PROGRESS_TIMEOUT_S, Origin
from flowspec_edge.core.speculation.schedules import SCHEDULES, ablation_names
from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule
from flowspec_edge.errors import ProtocolError, RequestError
from tests.core.speculation.comparable import comparable

VOCAB = 20
PROMPT = (11, 12)
PROMPT_ROWS = (Row(0, NO_PARENT, 11), Row(1, 0, 12))
OPTIONS = GenerateOptions(max_new_tokens=10)


def make_origin(*, has_drafter: bool = True, taps: tuple[int, ...] = ()) -> Origin:
    return Origin(
        num_stages=2,
        limits=TargetLimits(max_context=1000, vocab_size=VOCAB, eos_token_ids=frozenset({0})),
        has_drafter=has_drafter,
        shape=DraftShape(width=2, proposals=2, children=2, rows_per_pass=2),
        taps=taps,
    )


def submit(
    origin: Origin, session: int = 1, schedule: str = "flowspec", max_new_tokens: int = 10
) -> list[ev.OriginAction]:
    options = GenerateOptions(max_new_tokens=max_new_tokens, schedule=schedule)
    return origin.handle(ev.PromptSubmitted(session, PROMPT, options), 0.0)


def open_session(origin: Origin, session: int = 1, schedule: str = "flowspec") -> list[ev.OriginAction]:
    """Both stages have their caches; what the origin does then."""
    submit(origin, session, schedule)
    origin.handle(ev.StageReady(session, 0), 0.0)
    return origin.handle(ev.StageReady(session, 1), 0.0)


def bring_back(origin: Origin, rows: tuple[Row, ...], session: int = 1, now: float = 1.0) -> list[ev.OriginAction]:
    return origin.handle(ev.ChunkReturned(Chunk(session, rows, len(rows), hidden(*(row.id for row in rows)))), now)


def verify(origin: Origin, *tokens: int, now: float = 1.0) -> list[ev.OriginAction]:
    return origin.handle(ev.HeadFinished(tokens), now)


def drafted(*tokens: tuple[int, int]) -> ev.DraftFinished:
    log_probs = np.log(np.array([[0.6, 0.3]] * len(tokens), np.float32))
    return ev.DraftFinished(np.array(tokens, np.int64), log_probs)


def hidden(*values: float) -> Floats:
    return np.array([[value] for value in values], np.float32)


def names(actions: list[ev.OriginAction]) -> list[str]:
    return [type(action).__name__ for action in actions]


PREFILL = ev.SendChunk(Chunk(1, PROMPT_ROWS, 2))


# ---------------------------------------------------------------------- opening


def test_a_prompt_opens_its_session_at_every_stage_and_waits_for_all_of_them() -> None:
    origin = make_origin()
    assert submit(origin) == [ev.OpenSessions(SessionSpec(1, len(PROMPT) + 10 + TREE_MARGIN, True, False, 2))]
    assert origin.handle(ev.StageReady(1, 1), 0.0) == []
    assert origin.handle(ev.StageReady(1, 1), 0.0) == [], "it has said so before"
    assert comparable(origin.handle(ev.StageReady(1, 0), 0.0)) == comparable([PREFILL])


@pytest.mark.parametrize(
    ("schedule", "taps", "cancels", "is_tapped"),
    [("flowspec", (), True, False), ("chunked", (2,), False, True), ("autoregressive", (2,), False, False)],
)
def test_the_schedule_says_whether_forwards_are_cancelled_and_rows_tapped(
    schedule: str, taps: tuple[int, ...], cancels: bool, is_tapped: bool
) -> None:
    (opened,) = submit(make_origin(taps=taps), schedule=schedule)
    assert isinstance(opened, ev.OpenSessions)
    assert (opened.spec.cancels, opened.spec.is_tapped) == (cancels, is_tapped)


def test_an_unknown_schedule_is_refused_and_nothing_is_started() -> None:
    origin = make_origin()
    with pytest.raises(RequestError, match="^schedule 'fastest' is not known; choose one of autoregressive, chunked, "):
        submit(origin, schedule="fastest")
    assert origin.next_deadline() is None


# ---------------------------------------------------------------------- one compute lane


def test_the_head_runs_before_the_drafter() -> None:
    """Both have work; a verified token is worth more than a drafted one."""
    origin = make_origin()
    open_session(origin, 1)
    open_session(origin, 2)
    origin.handle(ev.CreditArrived(2), 0.0)
    assert names(bring_back(origin, PROMPT_ROWS, 1)) == ["GrantCredit", "RunHead"]
    assert names(bring_back(origin, PROMPT_ROWS, 2)) == ["GrantCredit"]
    actions = verify(origin, 5)
    assert names(actions) == ["BroadcastAdvance", "EmitTokens", "ReportTrip", "SendChunk", "RunHead"]
    assert comparable(actions[-1]) == comparable(ev.RunHead(2, PROMPT_ROWS[1:], (1,), hidden(1), OPTIONS))
    actions = verify(origin, 5)
    assert names(actions)[-2:] == ["SendChunk", "RunDraft"]
    assert isinstance(drafting := actions[-1], ev.RunDraft) and drafting.session == 1, "a chunk of 2 has just left"


def test_the_lane_computes_one_thing_at_a_time() -> None:
    origin = make_origin()
    open_session(origin)
    bring_back(origin, PROMPT_ROWS)
    actions = verify(origin, 5)
    assert comparable(actions[-1]) == comparable(
        ev.RunDraft(1, (Row(1, 0, 12), Row(2, 1, 5)), np.arange(2), hidden(0, 1), (), OPTIONS)
    )
    assert names(bring_back(origin, (Row(2, 1, 5),))) == ["GrantCredit"], "the drafter runs"
    assert names(origin.handle(drafted((6, 7)), 1.0)) == ["RunHead"]


def test_a_computation_for_a_session_that_is_gone_frees_the_lane_and_does_nothing_else() -> None:
    origin = make_origin()
    open_session(origin, 1)
    open_session(origin, 2)
    bring_back(origin, PROMPT_ROWS, 1)
    bring_back(origin, PROMPT_ROWS, 2)
    assert origin.handle(ev.GenerationCancelled(1), 1.0) == [
        ev.FinishGeneration(1, "cancelled"),
        ev.CloseSessions(1),
    ]
    actions = verify(origin, 5)
    assert comparable(actions) == comparable([ev.RunHead(2, PROMPT_ROWS[1:], (1,), hidden(1), OPTIONS)])


# ---------------------------------------------------------------------- credit and turns


def test_a_new_root_leaves_at_once() -> None:
    origin = make_origin()
    open_session(origin)
    bring_back(origin, PROMPT_ROWS)
    actions = verify(origin, 5)
    assert actions[:3] == [ev.BroadcastAdvance(1, 1, 5), ev.EmitTokens(1, (5,)), ev.ReportTrip(1, 1, 1, 0, 0, 0)]
    assert comparable(actions[3]) == comparable(ev.SendChunk(Chunk(1, (Row(2, 1, 5),), 1)))


def test_a_chunk_needs_credit_and_a_returned_one_gives_it_back_to_the_last_hop() -> None:
    origin = make_origin(has_drafter=False)
    sessions = range(1, CREDITS_PER_HOP + 2)
    sent = [names(open_session(origin, session)) for session in sessions]
    assert sent == [["SendChunk"]] * CREDITS_PER_HOP + [[]]
    assert names(origin.handle(ev.CreditArrived(1), 0.0)) == ["SendChunk"]
    assert bring_back(origin, PROMPT_ROWS, 99) == [ev.GrantCredit(1)], "of a session that is gone"
    origin.check()


class Patient(Schedule):
    """Behind its prompt it has nothing to send before ``time``, and counts how often it is asked."""

    time: ClassVar[float] = 5.0
    num_asked: ClassVar[int] = 0

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        Patient.num_asked += 1
        return []

    def next_time(self) -> float | None:
        return self.time


def test_more_credit_than_there_was_does_not_disturb_who_waits_for_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_registered", {"patient": Patient})
    monkeypatch.setattr(Patient, "num_asked", 0)
    origin = make_origin(has_drafter=False)
    open_session(origin, schedule="patient")
    assert Patient.num_asked == 1 and origin.next_deadline() == Patient.time
    origin.handle(ev.CreditArrived(1), 4.0)
    assert Patient.num_asked == 1
    origin.handle(ev.DeadlinePassed(), Patient.time)
    assert Patient.num_asked == 2


def test_credit_beyond_what_may_wait_is_refused() -> None:
    with pytest.raises(ProtocolError, match="credit for 3 chunks, where 2 may wait .CREDITS_PER_HOP."):
        make_origin().handle(ev.CreditArrived(1), 0.0)


def test_sessions_take_turns_for_credit() -> None:
    """Each has two prefill chunks to send, and credit comes one by one."""
    origin = make_origin()
    origin.handle(ev.CreditArrived(-CREDITS_PER_HOP), 0.0)  # none left
    for session in (1, 2):
        options = GenerateOptions(max_new_tokens=10)
        origin.handle(ev.PromptSubmitted(session, (11,) * (2 * PREFILL_ROWS), options), 0.0)
        for stage in range(2):
            assert origin.handle(ev.StageReady(session, stage), 0.0) == []
    sent = [origin.handle(ev.CreditArrived(1), 1.0) for _ in range(4)]
    chunks = [action.chunk for actions in sent for action in actions if isinstance(action, ev.SendChunk)]
    assert [chunk.session for chunk in chunks] == [1, 2, 1, 2]


def sent_of(actions: list[ev.OriginAction]) -> list[int]:
    """The sessions whose chunks leave."""
    return [action.chunk.session for action in actions if isinstance(action, ev.SendChunk)]


def begin_side_by_side() -> tuple[Origin, list[ev.OriginAction]]:
    """Two texts whose prompts have come back, after 0.1 s at each stage. Their roots are known at 1.0 s."""
    origin = make_origin(has_drafter=False)
    for session in (1, 2):
        open_session(origin, session)
    origin.handle(ev.CreditArrived(2), 0.5)
    for session in (1, 2):
        passages = (Passage(2, 0.0, 0.1),) * 2
        chunk = Chunk(session, PROMPT_ROWS[1:], 1, hidden(1), passages=passages)
        origin.handle(ev.ChunkReturned(chunk), 1.0)
    actions = verify(origin, 5)
    return origin, [*actions, *verify(origin, 6)]


def test_beside_others_a_new_root_leaves_when_the_ring_is_ready_for_it() -> None:
    origin, actions = begin_side_by_side()
    assert sent_of(actions) == [1], "the first stage has this one now"
    ready_at = origin.next_deadline()
    assert ready_at is not None and 1.05 < ready_at < 1.2
    assert sent_of(origin.handle(ev.CreditArrived(1), ready_at - 0.01)) == []
    assert sent_of(origin.handle(ev.DeadlinePassed(), ready_at)) == [2]


def test_a_session_that_ends_leaves_the_ring_to_the_others() -> None:
    origin, _ = begin_side_by_side()
    assert sent_of(origin.handle(ev.GenerationCancelled(1), 1.01)) == [2]


def test_a_prompt_of_which_nothing_comes_back_shows_that_the_ring_takes_it() -> None:
    origin = make_origin(has_drafter=False)
    origin.handle(ev.PromptSubmitted(1, (11,) * (4 * PREFILL_ROWS), OPTIONS), 0.0)
    for stage in range(2):
        origin.handle(ev.StageReady(1, stage), 0.0)
    for now in (40.0, 80.0):
        origin.handle(ev.CreditArrived(1), now)
    assert origin.next_deadline() == 80.0 + PROGRESS_TIMEOUT_S


def test_a_turn_is_told_to_every_stage_before_its_chunk_leaves() -> None:
    """The pipeline has two stages, so the turn after next may begin only when this one's chunk is back."""
    origin = make_origin(has_drafter=False)
    assert open_session(origin, 1, "pipedec")[1:] == [ev.BroadcastTurn(1, 1)]
    bring_back(origin, (PROMPT_ROWS[1],))
    root = ev.SendChunk(Chunk(1, (Row(2, 1, 5),), 1, turn=1))
    assert comparable(verify(origin, 5)[3:]) == comparable([root, ev.BroadcastTurn(1, 2)])


@pytest.mark.parametrize("schedule", [*SCHEDULES, *ablation_names()])
def test_without_a_drafter_every_schedule_sends_its_root(schedule: str) -> None:
    """Nothing is drafted, so there is no tree to wait for."""
    origin = make_origin(has_drafter=False)
    open_session(origin, 1, schedule)
    bring_back(origin, (PROMPT_ROWS[1],))
    sent = [action.chunk for action in verify(origin, 5) if isinstance(action, ev.SendChunk)]
    assert [chunk.rows for chunk in sent] == [(Row(2, 1, 5),)]


# ---------------------------------------------------------------------- ends


def test_the_end_of_the_text_closes_the_session_everywhere() -> None:
    origin = make_origin()
    open_session(origin)
    bring_back(origin, PROMPT_ROWS)
    assert verify(origin, 0) == [
        ev.EmitTokens(1, (0,)),
        ev.ReportTrip(1, 1, 1, 0, 0, 0),
        ev.FinishGeneration(1, "stop"),
        ev.CloseSessions(1),
    ]
    assert origin.next_deadline() is None


def test_a_lost_ring_ends_every_generation_with_its_reason() -> None:
    origin = make_origin()
    submit(origin, 1)
    open_session(origin, 2)
    reason = "peer pi-hall: link lost"
    assert origin.handle(ev.RingLost(reason), 1.0) == [
        ev.FinishGeneration(1, "failed", reason),
        ev.CloseSessions(1),
        ev.FinishGeneration(2, "failed", reason),
        ev.CloseSessions(2),
    ]


def test_a_silent_ring_is_given_up_a_minute_after_its_last_chunk() -> None:
    origin = make_origin()
    open_session(origin)
    assert origin.next_deadline() == PROGRESS_TIMEOUT_S
    bring_back(origin, PROMPT_ROWS, now=3.0)
    assert origin.next_deadline() == 3.0 + PROGRESS_TIMEOUT_S
    assert origin.handle(ev.DeadlinePassed(), 2.9 + PROGRESS_TIMEOUT_S) == []
    assert origin.handle(ev.DeadlinePassed(), 3.0 + PROGRESS_TIMEOUT_S) == [
        ev.FinishGeneration(1, "failed", "nothing came back from the ring for 60 s; check its nodes"),
        ev.CloseSessions(1),
    ]


def test_where_one_generation_hears_nothing_the_ring_is_lost_to_all() -> None:
    """Nobody trusts the ring any more, so a generation that went on would never be told its end."""
    origin = make_origin()
    open_session(origin, 1)
    open_session(origin, 2)
    bring_back(origin, PROMPT_ROWS, 2, now=PROGRESS_TIMEOUT_S - 1)
    actions = origin.handle(ev.DeadlinePassed(), PROGRESS_TIMEOUT_S)
    ended = [action.session for action in actions if isinstance(action, ev.FinishGeneration)]
    assert ended == [1, 2] and origin.next_deadline() is None


def test_tapped_rows_go_to_their_generation_and_those_of_none_are_dropped() -> None:
    origin = make_origin(taps=(2,))
    open_session(origin)
    bring_back(origin, (PROMPT_ROWS[1],))
    verify(origin, 5)
    assert origin.handle(ev.TappedArrived(9, 2, (0, 1), hidden(20, 21)), 1.0) == []
    (draft,) = origin.handle(ev.TappedArrived(1, 2, (0, 1), hidden(20, 21)), 1.0)
    assert comparable(draft) == comparable(
        ev.RunDraft(1, (Row(1, 0, 12), Row(2, 1, 5)), np.arange(2), hidden(20, 21), (), OPTIONS)
    )


def test_it_is_known_how_far_a_prompt_is() -> None:
    origin, total = make_origin(), 6 * PREFILL_ROWS
    origin.handle(ev.PromptSubmitted(1, (11,) * total, GenerateOptions(max_new_tokens=1)), 0.0)
    assert origin.prompt_progress(1) == (0, total)
    origin.handle(ev.StageReady(1, 0), 0.0)
    origin.handle(ev.StageReady(1, 1), 0.0)
    assert origin.prompt_progress(1) == (PREFILL_ROWS, total), "no second one waits at the first stage"
    origin.handle(ev.CreditArrived(1), 0.0)
    assert origin.prompt_progress(1) == (2 * PREFILL_ROWS, total)
    origin.handle(ev.GenerationCancelled(1), 0.0)
    assert origin.prompt_progress(1) is None
