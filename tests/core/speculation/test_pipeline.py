"""Costs learned from returned chunks, and times foretold from costs: each case can be worked out by hand."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.limits import PREFILL_ROWS
from flowspec_edge.core.line import Line, LineFit
from flowspec_edge.core.rows import Passage
from flowspec_edge.core.speculation.pipeline import PIECE_CHUNKS, READING, SLOWING, Flight, Pipeline, RingCosts, Traffic
from flowspec_edge.core.speculation.prefill import RingTimes

SECONDS = st.floats(0, 10)
SIZES = st.integers(1, 128)


def exactly(seconds: float) -> Any:
    return pytest.approx(seconds, abs=1e-6)


@given(SECONDS, SECONDS, st.lists(SIZES, min_size=2, max_size=50).filter(lambda sizes: len(set(sizes)) > 1))
def test_a_line_is_recovered(fixed: float, slope: float, sizes: Sequence[int]) -> None:
    fit = LineFit()
    for n in sizes:
        fit.add(n, fixed + slope * n)
    assert fit.line.per_row == pytest.approx(slope, abs=1e-4)
    for n in (1, 128):
        assert fit.line.at(n) == pytest.approx(fixed + slope * n, rel=1e-3, abs=1e-2)


@given(st.lists(st.tuples(SIZES, SECONDS), min_size=1, max_size=50))
def test_neither_part_of_a_line_is_ever_negative(samples: Sequence[tuple[int, float]]) -> None:
    fit = LineFit()
    for n, seconds in samples:
        fit.add(n, seconds)
        assert fit.line.per_row >= 0
        assert fit.line.at(0) >= -1e-9


def test_samples_of_one_size_give_their_mean() -> None:
    fit = LineFit()
    assert not fit.has_samples
    for seconds in (2.0, 4.0) * 200:
        fit.add(8, seconds)
    assert fit.has_samples
    assert fit.line.at(8) == pytest.approx(3.0, abs=0.02)


def test_a_board_that_throttles_is_noticed() -> None:
    fit = LineFit()
    for n in (2, 16, 64) * 100:
        fit.add(n, 0.010 + 0.001 * n)
    for n in (2, 16, 64) * 100:
        fit.add(n, 0.030 + 0.003 * n)
    assert fit.line.at(0) == pytest.approx(0.030, rel=0.05)
    assert fit.line.per_row == pytest.approx(0.003, rel=0.05)


def measured(*stages: tuple[float, float], hop_s: float = 0.001, num_blocks: Sequence[int] | None = None) -> Pipeline:
    """A pipeline that has learned ``(fixed, slope)`` per stage and the same time for each hop."""
    pipeline = Pipeline(Traffic(RingCosts(len(stages), num_blocks=num_blocks)))
    assert not pipeline.costs.is_measured
    for num_rows in (1, 3):
        pipeline.send(Flight(set(range(num_rows)), 0.0))
        passages = [Passage(num_rows, 0.5, fixed + slope * num_rows) for fixed, slope in stages]
        trip_s = sum(passage.waited_s + passage.ran_s for passage in passages) + hop_s * (len(stages) + 1)
        pipeline.take_returned({0}, passages, trip_s)
    assert pipeline.costs.is_measured
    assert not pipeline.flights
    return pipeline


def test_costs_are_learned_without_the_waiting() -> None:
    costs = measured((0.010, 0.001), (0.030, 0.002)).costs
    assert [stage.line.at(10) for stage in costs.stages] == [exactly(0.020), exactly(0.050)]
    assert costs.interval_s(10) == exactly(0.050)
    assert costs.seconds_per_row == exactly(0.003)
    assert costs.hop_s(10) == exactly(0.001)


def test_a_chunk_leaves_when_the_slowest_stage_will_just_be_free() -> None:
    pipeline = measured((0.010, 0), (0.030, 0))
    pipeline.send(Flight({1}, 1.0))  # stage 0: 1.001 to 1.011, stage 1: 1.012 to 1.042
    assert pipeline.returns_at() == exactly(1.043)
    assert pipeline.send_at(1) == exactly(1.042 - 0.012)
    pipeline.send(Flight({2}, pipeline.send_at(1)))
    (first, second) = pipeline.flights
    assert second.starts[1] == exactly(first.ends[1])
    assert pipeline.send_at(1) == exactly(1.072 - 0.012)
    assert pipeline.returns_at() == exactly(1.043), "the first one comes back first"


def test_a_slow_first_stage_paces_what_leaves() -> None:
    pipeline = measured((0.030, 0), (0.010, 0))
    pipeline.send(Flight({1}, 1.0))  # stage 0: 1.001 to 1.031
    assert pipeline.send_at(1) == exactly(1.030)


def test_a_chunk_that_left_too_early_is_expected_to_wait() -> None:
    pipeline = measured((0.010, 0), (0.030, 0))
    for id in (1, 2):
        pipeline.send(Flight({id}, 1.0))
    assert pipeline.flights[1].starts == [exactly(1.011), exactly(1.042)]


def test_pruning_shortens_what_has_not_started() -> None:
    pipeline = measured((0.010, 0.010))
    pipeline.send(Flight({1, 2, 3, 4, 5}, 1.0))  # 1.001 to 1.061
    pipeline.send(Flight({6, 7, 8, 9, 10}, 1.0))  # 1.061 to 1.121
    assert pipeline.send_at(1) == exactly(1.120)
    pipeline.prune({3, 4, 5, 8, 9, 10}, 1.020)
    assert pipeline.flights[0].ends == [exactly(1.061)], "it runs with the rows it began with"
    assert pipeline.flights[1].ends == [exactly(1.091)]
    assert pipeline.send_at(1) == exactly(1.090)
    pipeline.prune({6, 7}, 1.020)
    assert [flight.living for flight in pipeline.flights] == [{1, 2}]
    assert pipeline.send_at(1) == exactly(1.060)


@pytest.mark.parametrize(("num_blocks", "ends_at"), [((1,), 1.061), ((3,), 1.021), ((12,), 1.021), ((4,), 1.031)])
def test_a_dead_chunk_that_runs_keeps_its_stage_until_its_block_ends(num_blocks: Sequence[int], ends_at: float) -> None:
    """The word arrives at 1.021, behind 20 of 60 ms."""
    pipeline = measured((0.010, 0.010), num_blocks=num_blocks)
    pipeline.send(Flight({1, 2, 3, 4, 5}, 1.0))  # 1.001 to 1.061
    assert pipeline.blocked_s(5, 1.0, 1.020) == pytest.approx(0.0), "it would come behind another one"
    pipeline.prune({1, 2, 3, 4, 5}, 1.0199999)
    assert not pipeline.flights
    assert pipeline.send_at(1) == exactly(ends_at - 0.001)
    pipeline.send(Flight({6}, 1.020))
    pipeline.prune({6}, 1.020)
    assert pipeline.send_at(1) == exactly(ends_at - 0.001), "and whatever dies behind it"


def test_a_chunk_that_may_die_blocks_the_first_stage_until_its_block_ends() -> None:
    """A forward of 60 ms in three blocks begins at 1.001."""
    pipeline = measured((0.010, 0.010), num_blocks=(3,))
    assert pipeline.blocked_s(5, 1.0, 1.030) == exactly(1.041 - 1.031)
    assert pipeline.blocked_s(5, 1.0, 1.070) == exactly(0.0), "it has ended"
    assert pipeline.blocked_s(5, 1.0, 0.999) == exactly(0.0), "it has not begun"


def test_what_comes_back_is_matched_by_its_living_rows() -> None:
    pipeline = measured((0.010, 0))
    first, second = Flight({1, 2}, 1.0), Flight({3, 4}, 1.0)
    pipeline.send(first)
    pipeline.send(second)
    pipeline.prune({3}, 1.0)
    pipeline.take_returned({4}, [], 2.0)
    pipeline.take_returned({4}, [], 2.0)
    assert pipeline.flights == [first]


def test_a_chunk_that_was_given_up_teaches_nothing() -> None:
    pipeline = measured((0.010, 0))
    before = pipeline.costs.interval_s(4)
    pipeline.send(Flight({1}, 1.0))
    pipeline.prune({1}, 1.0)
    pipeline.take_returned({1}, [Passage(1, 0.0, 9.0)], 20.0)
    assert pipeline.costs.interval_s(4) == before


def test_an_unmeasured_ring_waits_for_nothing() -> None:
    pipeline = Pipeline(Traffic(RingCosts(3)))
    pipeline.send(Flight({1}, 5.0))
    assert pipeline.send_at(1) <= 5.0
    assert pipeline.returns_at() is None


def test_a_plain_token_takes_a_single_rows_quickest_trip_and_until_one_was_seen_what_the_lines_say() -> None:
    costs = RingCosts(1)
    for num_rows in (4, 8):
        costs.add_trip(0.012 + 0.001 * num_rows, [Passage(num_rows, 0.0, 0.010 + 0.001 * num_rows)])
    assert costs.plain_token_s == exactly(0.013)
    costs.add_trip(0.020, [Passage(1, 0.007, 0.011)])
    costs.add_trip(0.014, [Passage(1, 0.001, 0.011)])
    assert costs.plain_token_s == exactly(0.013), "without drafts it would not have waited"
    for _ in range(20):
        costs.add_trip(0.040, [Passage(1, 0.020, 0.011)], is_alone=False)
    assert costs.plain_token_s == exactly(0.013 * SLOWING**20), "but for other sessions it would have"


# ---------------------------------------------------------------------- several sessions


def beside(pipeline: Pipeline) -> Pipeline:
    """That of another session of the same ring."""
    return Pipeline(pipeline._traffic)


def test_chunks_of_other_sessions_keep_the_stages_busy_too() -> None:
    ours = measured((0.010, 0), (0.030, 0))
    others = beside(ours)
    others.send(Flight({1}, 1.0))  # stage 0: 1.001 to 1.011, stage 1: 1.012 to 1.042
    assert ours.send_at(1) == exactly(1.042 - 0.012)
    assert ours.returns_at() is None, "what comes back is not ours"
    ours.send(Flight({1}, ours.send_at(1)))
    assert ours.flights[0].starts[1] == exactly(others.flights[0].ends[1])
    others.prune({1}, 1.005)
    assert ours.flights[0].starts[0] == exactly(1.031), "the numbers of rows are those of a session"
    assert [flight.living for flight in ours.flights] == [{1}]


def test_a_session_that_leaves_takes_its_chunks_with_it() -> None:
    ours = measured((0.010, 0))
    others = beside(ours)
    assert (ours.num_others, others.num_others) == (1, 1)
    for id in range(9):
        others.send(Flight({id}, 1.0))
    assert ours.send_at(1) == exactly(1.090)
    others.leave(1.005)
    assert ours.num_others == 0
    assert ours.send_at(1) <= 1.011


def test_what_does_not_come_back_counts_until_it_has_passed() -> None:
    pipeline = measured((0.010, 0))
    pipeline.send(Flight({1}, 1.0, comes_back=False))  # 1.001 to 1.011
    assert pipeline.send_at(1) == exactly(1.010)
    assert not pipeline.flights
    pipeline.send(Flight({2}, 1.005))
    pipeline.prune({2}, 1.006)
    assert pipeline.send_at(1) == exactly(1.010)
    pipeline.send(Flight({3}, 1.02))
    assert len(pipeline._traffic.flights) == 1


@pytest.mark.parametrize(("row_s", "is_early"), [(0.010, True), (0.002, False)])
def test_a_small_chunk_keeps_its_place_before_the_pieces_of_another_ones_prompt(row_s: float, is_early: bool) -> None:
    """Where rows cost much, it leaves when a chunk of the usual size would, as long as the other session reads."""
    costs = RingCosts(2)
    for num_rows in (1, 9):
        costs.add_trip(1.0, [Passage(num_rows, 0.0, 0.040 + row_s * num_rows)] * 2)
    traffic = Traffic(costs)
    writing, reading = Pipeline(traffic), Pipeline(traffic)
    writing.begin_writing()
    reading.send(Flight({1, 2, 3, 4}, 0.0))
    assert (writing.num_costly_readers, reading.num_costly_readers) == (is_early, 0)
    assert writing.num_delayed == (READING if is_early else 1) and reading.num_delayed == 1
    usual, own = traffic.send_at(traffic.usual_rows), traffic.send_at(1)
    assert usual < own and writing.send_at(1) == (usual if is_early else own)
    reading.begin_writing()
    assert writing.send_at(1) == own and writing.num_delayed == 1
    reading.leave(0.0)
    assert writing.num_costly_readers == writing.num_delayed == 0


def test_a_piece_of_a_prompt_is_as_large_as_others_can_wait_for() -> None:
    """At 10 + 2 n ms 1.6 chunks of one row take as long as 4.6 rows. A single stage has no use for small ones."""
    for stage, most in (((0.010, 0.002), 4), ((0.100, 0.0001), PREFILL_ROWS), ((0.001, 0.010), 1)):
        pipeline = measured(stage)
        other = beside(pipeline)
        assert pipeline.prompt_chunk_rows(100) == 100, "nobody writes meanwhile"
        other.begin_writing()
        assert pipeline.prompt_chunk_rows(250) == most
    fresh = Pipeline(Traffic(RingCosts(1, EXPECTED)))
    other = beside(fresh)
    assert fresh.prompt_chunk_rows(250) == 250
    other.begin_writing()
    assert fresh.prompt_chunk_rows(250) == PREFILL_ROWS, "nothing is measured yet"


def test_a_plain_token_waits_for_a_row_of_each_session_where_they_crowd_the_ring() -> None:
    """A trip of three stages takes 63 ms, with the head 65 ms, and the slowest stage 30 ms."""
    ours = measured((0.010, 0), (0.030, 0), (0.019, 0))
    ours.costs.head.add(1, 0.002)
    ours.begin_writing()
    assert ours.plain_token_s == exactly(0.065)
    others = [beside(ours) for _ in range(3)]
    assert ours.plain_token_s == exactly((1 + 3 * PIECE_CHUNKS) * 0.030), "pieces of prompts take longer"
    for other in others:
        other.begin_writing()
    assert ours.plain_token_s == exactly(4 * 0.030)
    for other in others[1:]:
        other.leave(0.0)
    assert ours.plain_token_s == exactly(0.065), "there is room for two"


# ---------------------------------------------------------------------- the chunks of a prompt


EXPECTED = RingTimes((Line(0.060, 0.001),), (Line(0.001, 0.0001),))


def test_a_prompts_chunks_are_sized_by_what_was_measured_or_else_expected() -> None:
    """Three stages of 0.1 s + 1 ms a row: four chunks of 50 rows take 6 x 150 ms, two of 100 4 x 200, one 3 x 300."""
    assert measured(*[(0.1, 0.001)] * 3).prompt_chunk_rows(200) == 100
    assert measured(*[(0.4, 0.001)] * 3).prompt_chunk_rows(200) == 200
    assert RingCosts(3).prompt_chunk_rows(200) == PREFILL_ROWS, "nothing is known"
    costs = RingCosts(3, RingTimes((Line(0.1, 0.001),) * 3, (Line(0.001),) * 3))
    assert costs.prompt_chunk_rows(200) == 100
    for num_rows in (4, 4, 2):
        costs.add_trip(1.0, [Passage(num_rows, 0.0, 0.4 + 0.001 * num_rows)] * 3)
        assert costs.prompt_chunk_rows(200) == (200 if num_rows == 2 else 100), "one size alone tells no slope"


def test_where_one_size_has_come_back_as_much_of_its_time_grows_with_the_rows_as_was_expected() -> None:
    costs = RingCosts(1, EXPECTED)
    costs.add_trip(0.245, [Passage(40, 0.0, 0.2)])
    assert [costs.stages[0].line.at(num_rows) for num_rows in (0, 40)] == [exactly(0.120), exactly(0.200)]
    assert [costs.hops.line.at(num_rows) for num_rows in (0, 40)] == [exactly(0.009), exactly(0.045)]
