"""What stages and origin did, worked out by hand from what an origin is told and answers."""

import random
from typing import Any

import numpy as np
import pytest

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.rows import Chunk, Passage, Row
from flowspec_edge.core.speculation import lanes as lanes_module
from flowspec_edge.core.speculation.lanes import Job, Lanes, Span, Trip
from tests.fakes import FakeRing

ROWS = (Row(4, 3, 11), Row(5, 4, 12), Row(6, 4, 13))


def chunk(rows: tuple[Row, ...], *passages: Passage, session: int = 1) -> Chunk:
    return Chunk(session, rows, len(rows), passages=passages)


def test_a_trip_is_shared_out_among_waiting_computing_and_equal_hops() -> None:
    lanes = Lanes()
    lanes.see(ev.CreditArrived(1), [ev.SendChunk(chunk(ROWS))], 10.0)
    back = chunk(ROWS[1:], Passage(3, 0.5, 1.0), Passage(2, 0.0, 2.0))
    lanes.see(ev.ChunkReturned(back), [], 15.0)  # 1.5 s for three hops
    assert [*lanes.trips] == [
        Trip(1, (5, 6), Span(10.0, 15.0), (Span(11.0, 12.0), Span(12.5, 14.5)), (3, 2)),
    ]


def test_where_stages_claim_more_than_the_trip_hops_take_nothing() -> None:
    lanes = Lanes()
    lanes.see(ev.CreditArrived(1), [ev.SendChunk(chunk(ROWS))], 0.0)
    lanes.see(ev.ChunkReturned(chunk(ROWS, Passage(3, 1.0, 9.0))), [], 5.0)
    assert lanes.trips[0].stages == (Span(1.0, 10.0),)


def test_a_stage_runs_one_chunk_at_a_time() -> None:
    lanes = Lanes()
    for number, row in enumerate(ROWS[:2]):
        lanes.see(ev.CreditArrived(1), [ev.SendChunk(chunk((row,)))], float(number))
    lanes.see(ev.ChunkReturned(chunk(ROWS[:1], Passage(1, 0.0, 4.0))), [], 6.0)
    lanes.see(ev.ChunkReturned(chunk(ROWS[1:2], Passage(1, 1.0, 1.0))), [], 6.5)  # by equal hops it began at 3.75
    assert [trip.stages for trip in lanes.trips] == [(Span(1.0, 5.0),), (Span(5.0, 6.0),)]


def test_of_a_chunk_that_left_before_nothing_is_told() -> None:
    lanes = Lanes()
    lanes.see(ev.ChunkReturned(chunk(ROWS, Passage(3, 0.0, 1.0))), [], 5.0)
    assert not lanes.trips


def test_rows_of_two_sessions_are_told_apart() -> None:
    lanes = Lanes()
    for session in (1, 2):
        lanes.see(ev.CreditArrived(1), [ev.SendChunk(chunk(ROWS, session=session))], float(session))
    lanes.see(ev.ChunkReturned(chunk(ROWS, session=2)), [], 5.0)
    assert [(trip.session, trip.way.began) for trip in lanes.trips] == [(2, 2.0)]


def test_the_origins_own_jobs_last_from_their_action_to_their_event() -> None:
    lanes, options = Lanes(), GenerateOptions()
    head = ev.RunHead(3, ROWS[:1], (4,), np.zeros((1, 1), np.float32), options)
    draft = ev.RunDraft(3, ROWS[:1], np.zeros(1, np.int64), np.zeros((1, 1), np.float32), ())
    lanes.see(ev.DraftFinished(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)), [head], 1.0)  # not seen begin
    lanes.see(ev.HeadFinished((7,)), [draft], 1.5)
    lanes.see(ev.CreditArrived(1), [], 1.75)
    lanes.see(ev.DraftFinished(np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)), [], 2.0)
    assert [*lanes.jobs] == [Job(3, "head", Span(1.0, 1.5)), Job(3, "draft", Span(1.5, 2.0))]


class Seen(Journal):
    """Passes everything on to lanes as well."""

    def __init__(self, lanes: Lanes) -> None:
        super().__init__("origin", {})
        self.lanes = lanes

    def handle(self, core: Any, event: Any, now: float) -> list[Any]:
        actions = super().handle(core, event, now)
        self.lanes.see(event, actions, now)
        return actions


def test_on_a_real_ring_all_that_is_kept_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MAX_ROWS", 40)
    ring, lanes, back = FakeRing(3, random.Random(5)), Lanes(), 0
    ring.record(Seen(lanes), ring.ring.journals[1:])
    for session in range(1, 9):
        ring.submit(session, (1, 2, session), GenerateOptions(max_new_tokens=60, ignore_eos=True))
    while ring.step():
        assert len(lanes._sent_at) <= 40
        back = max(back, len(lanes.trips))
    assert 0 < back <= lanes_module.MAX_KEPT
    for trip in lanes.trips:
        assert len(trip.stages) == len(trip.num_rows) == 3
        assert trip.way.began <= trip.stages[0].began
