"""What each schedule answers, on views made by hand."""

import copy
import dataclasses
import math
from itertools import islice
from typing import Any

import pytest

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import MAX_LIVING_ROWS, MAX_TREE_ROWS
from flowspec_edge.core.line import Line
from flowspec_edge.core.speculation import schedules
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.payoff import FIRST_PAUSE_TOKENS
from flowspec_edge.core.speculation.pipeline import LEAD_S
from flowspec_edge.core.speculation.schedules import SCHEDULES, ablation_names, find_schedule, register_schedule
from flowspec_edge.core.speculation.schedules.ablations import CHUNK_ROWS
from flowspec_edge.core.speculation.schedules.ablations import TREE_PASSES as ABLATED_PASSES
from flowspec_edge.core.speculation.schedules.autoregressive import Autoregressive
from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule
from flowspec_edge.core.speculation.schedules.flowspec import (
    INTERVALS_LATE,
    MAX_PASS_ROWS,
    TRIPS_LATE,
    WIDEST_CHUNK_ROWS,
    Flowspec,
)
from flowspec_edge.core.speculation.schedules.pipedec import LEVEL_ROWS, Pipedec
from flowspec_edge.core.speculation.schedules.rounds import (
    EXPANSION_ROWS,
    FRONTIER_PASSES,
    FRONTIER_ROWS,
    TREE_PASSES,
    TREE_ROWS,
    Chunked,
    Lockstep,
    Pruned,
    Rounds,
)
from flowspec_edge.errors import RequestError
from tests.core.speculation.views import (
    ROOT,
    CostsStub,
    FitStub,
    FlightStub,
    PipelineStub,
    View,
    changed,
    make_view,
)

TREE = {1: (ROOT, 0.6), 2: (ROOT, 0.3), 3: (1, 0.4), 4: (3, 0.1), 5: (2, 0.0001)}
"""Two children of the root; below the likelier one a chain of two; and a row that is worth nothing."""
DRAFTED: dict[str, Any] = {"ran": {ROOT: 1, 1: 2, 3: 3}, "num_passes": TREE_PASSES}
WIDE = {id: (ROOT, 0.5 - id / 10_000) for id in range(1, 600)}


def level(num_rows: int, start: int = 1) -> dict[int, tuple[int, float]]:
    """A tree of ``num_rows`` children of the root."""
    return {id: (ROOT, 0.9 / id) for id in range(start, start + num_rows)}


# ---------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", [*SCHEDULES, *ablation_names()])
def test_a_schedule_looks_and_changes_nothing(name: str) -> None:
    """The views raise where something is assigned, added or removed; mypy refuses the same in a schedule's code."""
    schedule = find_schedule(name)(2)
    fresh = make_view(TREE, **DRAFTED, is_computing=True)
    drafted, sent = changed(fresh, is_computing=False), changed(fresh, is_computing=False, sent=frozenset({ROOT, 1}))
    flying = changed(sent, num_unextended=1, pipeline=PipelineStub(flights=(FlightStub(turn=1),), back_at=0.1))
    for view in (fresh, drafted, sent, flying, changed(flying, is_verifying=True)) * 2:
        schedule.choose_pass(view, 0.0)
        schedule.next_turn(view, True)
        schedule.choose_rows(view, 0.0)
        schedule.may_verify(view)
        schedule.take_verified(view, 1, 0.0)
        schedule.next_time()


@pytest.mark.parametrize("name", [*SCHEDULES, *ablation_names()])
def test_what_is_asked_for_and_not_sent_is_answered_again(name: str) -> None:
    """Another session's chunk may go first."""
    schedule = find_schedule(name)(2)
    view = make_view(TREE, **DRAFTED)
    for _ in range(TREE_PASSES + 1):
        schedule.choose_pass(view, 0.0)
    schedule.next_turn(view, True)
    answers = [schedule.choose_rows(view, 0.0) for _ in range(3)]
    assert answers[0] and answers == answers[:1] * 3
    schedule.take_sent()
    left = changed(view, sent=frozenset(answers[0]))
    assert not set(answers[0]).intersection(schedule.choose_rows(left, 0.0))


@pytest.mark.parametrize("name", [*SCHEDULES, *ablation_names()])
def test_a_root_that_was_not_sent_leaves_first(name: str) -> None:
    schedule = find_schedule(name)(2)
    view = make_view(TREE, **DRAFTED)
    schedule.next_turn(view, True)
    for _ in range(TREE_PASSES + 1):  # schedules that wait for a tree count the passes that they asked for
        schedule.choose_pass(view, 0.0)
    assert schedule.choose_rows(view, 0.0)[0] == ROOT


# ---------------------------------------------------------------------- autoregressive


def sent_by(schedule: Schedule, view: View) -> list[int]:
    """The rows that the schedule chooses, which leave."""
    rows = schedule.choose_rows(view, 0.0)
    if rows:
        schedule.take_sent()
    return rows


def test_autoregressive_sends_each_root_once_and_drafts_nothing() -> None:
    schedule = Autoregressive(2)
    view = make_view(TREE, **DRAFTED)
    assert schedule.choose_rows(view, 0.0) == [ROOT]
    assert schedule.choose_rows(changed(view, sent=frozenset({ROOT})), 0.0) == []
    assert schedule.choose_pass(view, 0.0) is None
    assert not schedule.uses_drafter


# ---------------------------------------------------------------------- flowspec


def test_flowspec_sends_a_new_root_at_once_with_the_likeliest_rows() -> None:
    view = make_view(TREE, pipeline=PipelineStub(leaves_at=9.0))
    assert Flowspec(2).choose_rows(view, 0.0) == [ROOT, 1, 3, 2, 4], "row 5 is below the least chance"


def test_flowspec_takes_rows_as_long_as_one_more_wins_more_than_it_costs() -> None:
    """With a new root the text enters the chunk surely: a row must win 0.15 s times its chance, and costs 0.05 s."""
    costs = CostsStub(stage=Line(0.1), seconds_per_row=0.05)
    view = make_view(TREE, pipeline=PipelineStub(costs))
    assert Flowspec(2).choose_rows(view, 0.0) == [ROOT, 1, 3]
    dear = make_view(TREE, pipeline=PipelineStub(CostsStub(stage=Line(0.1), seconds_per_row=0.15)))
    assert Flowspec(2).choose_rows(dear, 0.0) == [ROOT], "the root goes whatever it costs"


def test_flowspec_counts_a_rows_cost_only_where_the_text_enters_the_chunk() -> None:
    """Row 3 wins 0.15 s times 0.12. It makes a chunk later that the text enters with a chance of 0.3: 0.015 s."""
    costs = CostsStub(stage=Line(0.1), seconds_per_row=0.05)
    tree = {1: (ROOT, 0.3), 3: (1, 0.12), 4: (3, 0.09)}
    view = make_view(tree, sent=frozenset({ROOT}), pipeline=PipelineStub(costs))
    assert Flowspec(2).choose_rows(view, 0.0) == [1, 3]


def test_flowspec_does_not_count_on_the_next_chunk_where_many_leave_in_a_trip() -> None:
    """Row 3 comes later by a third of the trip, a second, not by 1.5 intervals of 0.01 s."""
    costs = CostsStub(stage=Line(0.01), seconds_per_row=0.05, plain_token_s=1.0)
    tree = {1: (ROOT, 0.3), 3: (1, 0.12)}
    view = make_view(tree, sent=frozenset({ROOT}), pipeline=PipelineStub(costs))
    assert Flowspec(2).choose_rows(view, 0.0) == [1, 3]
    assert TRIPS_LATE * 0.12 > 0.3 * 0.05 > INTERVALS_LATE * 0.01 * 0.12


def test_flowspec_counts_what_a_row_costs_the_other_sessions() -> None:
    """Row 3 wins 0.18 s times 0.12. Nobody loses by it but each other session, by 0.02 s."""
    costs = CostsStub(stage=Line(0.1, 0.02))
    tree = {1: (ROOT, 0.3), 3: (1, 0.12)}
    view = make_view(tree, sent=frozenset({ROOT}), pipeline=PipelineStub(costs, num_delayed=1))
    assert Flowspec(2).choose_rows(view, 0.0) == [1, 3]
    crowded = changed(view, pipeline=PipelineStub(costs, num_delayed=2))
    assert Flowspec(2).choose_rows(crowded, 0.0) == [1]


def test_flowspec_bounds_a_chunk_and_what_the_stages_hold() -> None:
    view = make_view(WIDE, sent=frozenset({ROOT}))
    assert len(Flowspec(2).choose_rows(view, 0.0)) == WIDEST_CHUNK_ROWS
    nearly_full = changed(view, sent=frozenset({ROOT, *range(1, MAX_LIVING_ROWS - 2)}))
    assert len(Flowspec(2).choose_rows(nearly_full, 0.0)) == 3


def test_flowspec_sends_as_late_as_the_first_stage_allows() -> None:
    schedule = Flowspec(2)
    view = make_view(TREE, sent=frozenset({ROOT}), pipeline=PipelineStub(leaves_at=2.0))
    assert schedule.choose_rows(view, 1.9) == []
    assert schedule.next_time() == 2.0 - LEAD_S
    assert schedule.choose_rows(view, 2.0 - LEAD_S) == [1, 3, 2, 4]


def test_flowspec_sends_at_once_while_nothing_is_measured() -> None:
    costs = CostsStub(is_measured=False)
    view = make_view(TREE, sent=frozenset({ROOT}), pipeline=PipelineStub(costs, leaves_at=2.0))
    assert Flowspec(2).choose_rows(view, 0.0) == [1, 3, 2, 4]


def test_flowspec_waits_for_the_head_where_the_text_hardly_enters_the_chunk() -> None:
    schedule = Flowspec(2)
    unlikely = make_view({1: (ROOT, 0.4)}, sent=frozenset({ROOT}), is_verifying=True)
    assert schedule.choose_rows(unlikely, 5.0) == []
    assert schedule.next_time() is None, "the head will tell"
    likely = make_view({1: (ROOT, 0.6)}, sent=frozenset({ROOT}), is_verifying=True)
    assert schedule.choose_rows(likely, 5.0) == [1]
    for blocks_for_s, rows in ((0.014, [1]), (0.016, [])):
        pipeline = PipelineStub(CostsStub(head=FitStub(Line(0.010))), blocks_for_s=blocks_for_s)
        assert schedule.choose_rows(changed(likely, pipeline=pipeline), 5.0) == rows, "0.6 of 10 ms, or 0.4 of that"


def test_flowspec_waits_for_the_next_chunk_where_waiting_costs_less_than_a_blocked_stage() -> None:
    """The next chunk is back in 10 ms; a chunk that leaves now blocks the first stage for 100 ms."""
    schedule = Flowspec(2)
    pipeline = PipelineStub(back_at=1.010)
    unlikely = make_view({1: (ROOT, 0.4)}, sent=frozenset({ROOT}), pipeline=pipeline)
    assert schedule.choose_rows(unlikely, 1.0) == []
    assert schedule.next_time() == 1.010
    likely = make_view({1: (ROOT, 0.95)}, sent=frozenset({ROOT}), pipeline=pipeline)
    assert schedule.choose_rows(likely, 1.0) == [1]
    blocking = PipelineStub(back_at=1.010, blocks_for_s=0.2)
    assert schedule.choose_rows(changed(likely, pipeline=blocking), 1.0) == []


def test_flowspec_waits_no_longer_for_a_chunk_that_is_late() -> None:
    pipeline = PipelineStub(CostsStub(head=FitStub(Line(0.010))), back_at=1.010)
    view = make_view({1: (ROOT, 0.4)}, sent=frozenset({ROOT}), pipeline=pipeline)
    assert Flowspec(2).choose_rows(view, 1.0) == []
    assert Flowspec(2).choose_rows(view, 1.5) == [1], "who knows how late"


def test_flowspec_values_no_token_at_more_than_it_takes_without_drafts() -> None:
    """A single stage: 1.5 of its intervals would be 0.15 s, and a token takes 0.11. A row costs 0.1 s."""
    costs = CostsStub(stage=Line(0.0, 0.1), seconds_per_row=0.1, plain_token_s=0.11)
    view = make_view({1: (ROOT, 0.95), 2: (1, 0.8)}, pipeline=PipelineStub(costs))
    assert Flowspec(1).choose_rows(view, 0.0) == [ROOT, 1]


def test_flowspec_pauses_where_speculation_does_not_pay() -> None:
    """Two tokens in two seconds each, where plain decoding takes a tenth."""
    schedule = Flowspec(2)
    view = make_view(TREE, **DRAFTED)
    for number in range(3):
        assert schedule.choose_pass(view, 2.0 * number) is not None
        schedule.take_verified(view, 1, 2.0 * number)
    assert schedule.choose_pass(view, 0.0) is None
    assert schedule.choose_rows(view, 0.0) == [ROOT]
    for number in range(FIRST_PAUSE_TOKENS):
        schedule.take_verified(view, 1, 40.0 + number)
    assert schedule.choose_rows(view, 0.0) == [ROOT, 1, 3, 2, 4], "it is tried again"


def test_flowspec_runs_the_likeliest_rows_and_more_of_them_where_they_cost_little() -> None:
    def rows(draft: Line) -> list[int] | None:
        view = make_view(level(100), ran={ROOT: 1}, width=4, pipeline=PipelineStub(CostsStub(draft=FitStub(draft))))
        return Flowspec(2).choose_pass(view, 0.0)

    assert rows(Line(per_row=0.010)) == [1, 2, 3, 4]
    assert rows(Line(0.006, 0.0001)) == list(range(1, 11)), "six more take a tenth of the time"
    assert rows(Line(0.1, 0.0001)) == list(range(1, MAX_PASS_ROWS + 1))


def test_flowspec_leaves_the_lane_to_a_head_that_is_about_to_come() -> None:
    """A pass takes 20 ms. Verified rows go at once: what is drafted before them may be void."""
    view = make_view(TREE, ran={ROOT: 1}, pipeline=PipelineStub(back_at=1.015))
    assert Flowspec(2).choose_pass(view, 1.0) is None
    assert Flowspec(2).choose_pass(view, 0.9) == [1, 2]
    assert Flowspec(2).choose_pass(view, 1.1) == [1, 2], "it is late, and who knows how late"
    assert Flowspec(2).choose_pass(changed(view, num_unextended=1), 1.0) == [1, 2]


def test_flowspec_bounds_the_tree() -> None:
    view = make_view(level(MAX_TREE_ROWS), ran={ROOT: 1})
    assert Flowspec(2).choose_pass(view, 0.0)
    full = make_view(level(MAX_TREE_ROWS + 1), ran={ROOT: 1})
    assert Flowspec(2).choose_pass(full, 0.0) is None
    assert Flowspec(2).choose_pass(changed(full, num_unextended=1), 0.0), "but it takes what is verified"


def test_flowspec_asks_for_no_pass_over_nothing() -> None:
    assert Flowspec(2).choose_pass(make_view(), 0.0) is None
    assert Flowspec(2).choose_pass(make_view(num_unextended=2), 0.0) == []


# ---------------------------------------------------------------------- pruned and chunked


def drafted_round(num_rows: int) -> View:
    """A tree of one level that took all its passes."""
    return make_view(level(num_rows), ran={ROOT: 1}, num_passes=TREE_PASSES)


def leaving(schedule: Schedule, view: View) -> list[int]:
    """What leaves in the next turn, or at once where there are no turns."""
    schedule.next_turn(view, True)
    return sent_by(schedule, view)


@pytest.mark.parametrize("kind", [Pruned, Chunked, Lockstep])
def test_a_round_drafts_level_by_level_before_anything_leaves(kind: type[Rounds]) -> None:
    """Row 2 is likelier than row 3, and is not run with it: its level has been run."""
    schedule = kind(3)
    assert schedule.choose_pass(make_view(num_unextended=1), 0.0) == [], "the root first"
    ran = {ROOT: 1}
    for num_passes, rows in ((1, [1, 2]), (2, [3]), (3, [4])):
        view = make_view(TREE, ran=ran, num_passes=num_passes, width=2)
        assert schedule.choose_pass(view, 0.0) == rows
        assert leaving(schedule, view) == []
        ran[rows[0]] = num_passes + 1
    view = make_view(TREE, ran=ran, num_passes=TREE_PASSES, num_unextended=1)
    assert schedule.choose_pass(view, 0.0) is None
    assert leaving(schedule, view) == [ROOT]


def test_a_round_cuts_its_tree_into_one_chunk_more_than_there_are_stages() -> None:
    schedule = Chunked(3)
    view = drafted_round(10)
    chunks = [sent_by(schedule, view) for _ in range(5)]
    assert chunks == [[ROOT, 1], [2, 3, 4], [5, 6, 7], [8, 9, 10], []]
    schedule, view = Chunked(4), drafted_round(200)
    assert [len(sent_by(schedule, view)) for _ in range(6)] == [16, 16, 16, 16, 17, 0], f"{TREE_ROWS} rows"


def test_a_round_has_only_what_its_own_passes_drafted() -> None:
    """Row 3 hangs below a row that ran in an earlier round, and is likelier than row 2."""
    schedule = Chunked(1)
    schedule.take_verified(make_view(num_passes=5), 1, 0.0)
    view = make_view(TREE, ran={ROOT: 6, 1: 5}, num_passes=5 + TREE_PASSES)
    assert [sent_by(schedule, view) for _ in range(2)] == [[ROOT], [1, 2]]


def test_a_round_waits_while_head_or_drafter_work() -> None:
    assert leaving(Pruned(3), changed(drafted_round(11), is_computing=True)) == []


def begin_pruned(num_stages: int, view: View) -> tuple[Pruned, View]:
    """Turn 1 has begun, and its chunk has left."""
    schedule = Pruned(num_stages)
    assert schedule.next_turn(view, True) == 1
    chunk = sent_by(schedule, view)
    assert chunk and sent_by(schedule, view) == [], "one chunk a turn"
    return schedule, changed(view, sent=frozenset(chunk), pipeline=PipelineStub(flights=(FlightStub(turn=1),)))


def test_pruned_goes_on_with_what_lives_while_the_text_stays_in_the_tree() -> None:
    tree = {1: (ROOT, 0.6), 2: (ROOT, 0.3), 3: (1, 0.5)}
    schedule, view = begin_pruned(1, make_view(tree, ran={ROOT: 1, 1: 2}, num_passes=TREE_PASSES))
    assert view.sent == {ROOT, 1}
    taken = make_view({3: (1, 0.8)}, root=1, num_passes=TREE_PASSES, sent=frozenset({ROOT, 1}))
    schedule.take_verified(taken, 1, 0.0)
    assert schedule.choose_pass(taken, 0.0) is None, "nothing is drafted while the round goes on"
    assert leaving(schedule, taken) == [3], "row 2 is dead"


def test_a_chunk_whose_rows_have_all_died_is_passed_over() -> None:
    schedule, _ = begin_pruned(2, drafted_round(5))
    taken = make_view({5: (1, 0.8)}, root=1, sent=frozenset({ROOT, 1}), num_passes=TREE_PASSES)
    schedule.take_verified(taken, 1, 0.0)  # of rows 2 and 3, and rows 4 and 5, only the last lives
    assert leaving(schedule, taken) == [5]


def test_pruned_drafts_a_tree_anew_when_the_text_has_left_it() -> None:
    """What ran in the last round does not count: row 1 is run again."""
    schedule, _ = begin_pruned(1, drafted_round(3))
    missed = make_view({1: (9, 0.5)}, root=9, ran={9: 7, 1: 7}, num_passes=7, num_unextended=1)
    schedule.take_verified(missed, 1, 0.0)
    assert schedule.choose_pass(missed, 0.0) == [], "the new root first"
    assert leaving(schedule, missed) == []
    after = make_view({1: (9, 0.5)}, root=9, ran={9: 8, 1: 7}, num_passes=8)
    assert schedule.choose_pass(after, 0.0) == [1]
    assert schedule.choose_pass(changed(after, drafting=make_view(num_passes=14).drafting), 0.0) is None


def test_a_turn_waits_for_the_chunk_that_must_be_back_and_verified() -> None:
    """With two stages, what left in turn 1 has passed the ring when turn 3 begins."""
    schedule, view = begin_pruned(2, drafted_round(8))
    assert leaving(schedule, view), "nothing is due in turn 2"
    assert schedule.next_turn(view, True) is None
    back = changed(view, pipeline=PipelineStub(flights=(FlightStub(turn=2),)))
    assert schedule.next_turn(changed(back, is_verifying=True), True) is None
    assert schedule.next_turn(back, True) == 3


def test_a_turn_lets_its_chunk_leave_before_the_next_begins() -> None:
    schedule, view = begin_pruned(2, drafted_round(8))
    assert schedule.next_turn(view, True) == 2
    due = PipelineStub(flights=(FlightStub(turn=2),))
    for has_credit in (True, False):
        assert schedule.next_turn(changed(view, pipeline=due), has_credit) is None, "credit comes with the next forward"
    assert schedule.next_turn(changed(view, pipeline=PipelineStub()), True) is None, "nothing else brings credit"
    shared = changed(view, pipeline=PipelineStub(flights=(FlightStub(turn=2),), num_delayed=1))
    assert schedule.next_turn(shared, True) is None
    assert schedule.next_turn(shared, False) == 3, "another session has the credit, and may wait for this turn"


def test_chunked_verifies_when_all_of_its_tree_is_back() -> None:
    schedule = Chunked(1)
    view = drafted_round(3)
    sent_by(schedule, view)
    assert not schedule.may_verify(view), "a chunk has not left"
    sent_by(schedule, view)
    assert not schedule.may_verify(changed(view, pipeline=PipelineStub(flights=(FlightStub(),))))
    assert schedule.may_verify(view)
    assert Pruned(1).may_verify(changed(view, pipeline=PipelineStub(flights=(FlightStub(),))))


def test_chunked_begins_a_round_with_every_verification() -> None:
    schedule = Chunked(1)
    sent_by(schedule, drafted_round(3))
    accepted = make_view({2: (1, 0.5)}, root=1, ran={1: 3}, num_passes=7, sent=frozenset({ROOT, 1}), num_unextended=1)
    schedule.take_verified(accepted, 2, 0.0)
    assert schedule.choose_pass(accepted, 0.0) == [], "it drafts again, though its root was a row of the tree"


# ---------------------------------------------------------------------- lockstep


NUM_DRAFTED = TREE_PASSES
GROWN = level(200)


def begin_lockstep(tree: dict[int, tuple[int, float]]) -> tuple[Lockstep, View]:
    """The first chunk is back, and row 1 accepted: it is the root. It leaves in turn 2, which has begun."""
    schedule = Lockstep(1)
    view = drafted_round(1)
    assert leaving(schedule, view) == [ROOT]
    assert schedule.choose_pass(changed(view, num_unextended=1), 0.0) is None, "nothing is expanded before that"
    view = make_view(tree, root=1, ran={1: 1}, num_passes=NUM_DRAFTED, num_unextended=1)
    schedule.take_verified(view, 1, 0.0)
    assert leaving(schedule, view) == [1]
    return schedule, changed(view, sent=frozenset({1}), pipeline=PipelineStub(flights=(FlightStub(turn=2),)))


def below(tree: dict[int, tuple[int, float]]) -> dict[int, tuple[int, float]]:
    """The same tree, one row deeper: below row 1."""
    return {id + 1: (parent + 1, chance) for id, (parent, chance) in tree.items()}


def after_passes(view: View, num_passes: int, ran: dict[int, int]) -> View:
    """The drafter has finished so many passes since ``begin_lockstep``."""
    return changed(view, num_unextended=0, drafting=dataclasses.replace(view.drafting, ran=ran, num_passes=num_passes))


def test_lockstep_drafts_the_tree_anew_while_the_stages_run() -> None:
    schedule, view = begin_lockstep(below(TREE))
    assert schedule.choose_pass(view, 0.0) == [], "the new root with what is verified"
    begun = after_passes(view, NUM_DRAFTED + 1, {1: NUM_DRAFTED + 1, 2: NUM_DRAFTED})
    assert schedule.choose_pass(begun, 0.0) == [2, 3], "row 2 ran before, and is run again"
    assert schedule.next_turn(begun, True) is None, "the turn is as long as the drafter needs"
    done = after_passes(view, NUM_DRAFTED + TREE_PASSES, {1: NUM_DRAFTED + 1})
    assert schedule.choose_pass(done, 0.0) is None
    assert schedule.next_turn(changed(done, pipeline=PipelineStub()), True) == 3


def test_lockstep_sends_all_new_rows_of_the_tree_and_none_of_older_ones() -> None:
    """Row 4 hangs below row 2, which this tree has not run."""
    schedule, view = begin_lockstep(below(TREE))
    done = after_passes(view, NUM_DRAFTED + TREE_PASSES, {1: NUM_DRAFTED + 1, 2: NUM_DRAFTED})
    assert leaving(schedule, changed(done, pipeline=PipelineStub())) == [2, 3]
    schedule, view = begin_lockstep(below(GROWN))
    done = after_passes(view, NUM_DRAFTED + TREE_PASSES, {1: NUM_DRAFTED + 1})
    sent = frozenset({1, *range(2, 12)})
    rows = leaving(schedule, changed(done, sent=sent, pipeline=PipelineStub()))
    assert rows == list(range(12, EXPANSION_ROWS + 2)), "rows at the stages are of the tree, and stay where they are"


def test_lockstep_grows_the_tree_where_nothing_was_accepted() -> None:
    schedule, view = begin_lockstep(below(GROWN))
    num_passes = NUM_DRAFTED + TREE_PASSES
    view = after_passes(view, num_passes, {1: num_passes})
    first = leaving(schedule, changed(view, pipeline=PipelineStub()))
    view = changed(view, sent=frozenset({1, *first}), pipeline=PipelineStub(flights=(FlightStub(turn=3),)))
    assert schedule.choose_pass(view, 0.0), "the last level is run"
    view = after_passes(view, num_passes + FRONTIER_PASSES, {1: num_passes})
    assert schedule.choose_pass(view, 0.0) is None
    assert len(leaving(schedule, changed(view, pipeline=PipelineStub()))) == FRONTIER_ROWS


def test_lockstep_goes_on_where_the_text_enters_what_is_about_to_leave() -> None:
    schedule, view = begin_lockstep(below(TREE))
    done = after_passes(view, NUM_DRAFTED + TREE_PASSES, {1: NUM_DRAFTED + 1, 2: NUM_DRAFTED + 2})
    assert schedule.next_turn(changed(done, is_verifying=True), True) is None
    stays, leaves = schedule, copy.deepcopy(schedule)
    num_passes = done.drafting.num_passes
    entered = make_view({4: (2, 0.5)}, root=2, num_passes=num_passes, num_unextended=1)
    stays.take_verified(entered, 1, 0.0)
    assert leaving(stays, entered) == [2, 4]
    left = make_view(root=9, num_passes=num_passes, num_unextended=1)
    leaves.take_verified(left, 1, 0.0)
    assert leaving(leaves, left) == [], "a tree is drafted first"


def test_lockstep_sends_no_more_than_the_stages_may_hold() -> None:
    schedule, view = begin_lockstep(below(WIDE))
    done = after_passes(view, NUM_DRAFTED + TREE_PASSES, {1: NUM_DRAFTED + 1})
    sent = frozenset({1, *range(100, 100 + MAX_LIVING_ROWS - 3)})
    assert leaving(schedule, changed(done, sent=sent, pipeline=PipelineStub())) == [2, 3, 4]


# ---------------------------------------------------------------------- pipedec


def test_pipedec_sends_one_level_a_turn_and_no_more_rows_than_a_level_may_have() -> None:
    schedule = Pipedec(2)
    view = make_view(level(LEVEL_ROWS + 4) | {90: (1, 0.05), 91: (2, 0.04)})
    assert sent_by(schedule, view) == [], "no turn has begun"
    assert schedule.next_turn(view, True) == 1
    assert sent_by(schedule, view) == [ROOT]
    assert sent_by(schedule, view) == []
    view = changed(view, sent=frozenset({ROOT}), pipeline=PipelineStub(flights=(FlightStub(turn=1),)))
    assert schedule.next_turn(view, True) == 2
    assert sent_by(schedule, view) == list(range(1, LEVEL_ROWS + 1))
    below = changed(view, sent=frozenset(range(LEVEL_ROWS + 1)), pipeline=PipelineStub())
    assert schedule.next_turn(below, True) == 3
    assert sent_by(schedule, below) == [90, 91], "only children of rows that were sent"


def test_a_pipedec_turn_waits_for_what_must_be_back_and_verified() -> None:
    schedule = Pipedec(2)
    view = make_view(level(4))
    schedule.next_turn(view, True)
    sent_by(schedule, view)
    sent = changed(view, sent=frozenset({ROOT}))
    assert schedule.next_turn(changed(sent, is_verifying=True), True) is None
    assert schedule.next_turn(changed(sent, pipeline=PipelineStub(flights=(FlightStub(turn=0),))), True) is None
    assert schedule.next_turn(changed(sent, pipeline=PipelineStub(flights=(FlightStub(turn=1),))), True) == 2


def test_a_pipedec_turn_waits_for_the_next_level_while_it_may_still_be_drafted() -> None:
    flying = PipelineStub(flights=(FlightStub(turn=1),))
    for busy in ({"is_computing": True}, {"num_unextended": 1}, {"pipeline": PipelineStub()}):
        schedule = Pipedec(2)
        schedule.next_turn(make_view(), True)
        sent_by(schedule, make_view())
        view = make_view(sent=frozenset({ROOT}), **({"pipeline": flying} | busy))
        assert schedule.next_turn(view, True) is None, busy
        assert schedule.next_turn(make_view(sent=frozenset({ROOT}), pipeline=flying), True) == 2, "there is none"


def test_a_pipedec_turn_lets_its_chunk_leave_before_the_next_begins() -> None:
    schedule = Pipedec(2)
    view = make_view(level(4), pipeline=PipelineStub(flights=(FlightStub(turn=1),)))
    schedule.next_turn(view, True)
    assert schedule.next_turn(view, True) is None, "there is credit for it"
    assert schedule.next_turn(view, False) == 2


def test_pipedec_expands_what_was_sent_and_refreshes_what_was_accepted() -> None:
    view = make_view(TREE, ran={ROOT: 1, 2: 1}, sent=frozenset({ROOT, 1}))
    assert Pipedec(2).choose_pass(view, 0.0) == [1], "row 3 was not sent"
    refreshed = make_view(TREE, ran={ROOT: 4, 1: 3, 2: 3, 3: 5}, sent=frozenset({ROOT}))
    assert Pipedec(2).choose_pass(refreshed, 0.0) == [1, 2]
    assert Pipedec(2).choose_pass(make_view(), 0.0) is None
    assert Pipedec(2).choose_pass(make_view(num_unextended=1), 0.0) == []


# ---------------------------------------------------------------------- flowspec without one mechanism


def answer(name: str, view: View, now: float = 0.0) -> list[int]:
    return find_schedule(f"flowspec-without-{name}")(2).choose_rows(view, now)


def test_what_each_variant_leaves_out() -> None:
    new_root = make_view(TREE)
    assert answer("score-order", make_view({3: (ROOT, 0.1), 1: (ROOT, 0.3), 2: (1, 0.29)})) == [ROOT, 1, 2, 3]
    assert answer("tree", new_root) == [ROOT, 1, 3, 4]
    waiting = make_view(TREE, sent=frozenset({ROOT}), pipeline=PipelineStub(leaves_at=9.0))
    assert answer("just-in-time", waiting) == [1, 3, 2, 4]
    dear = PipelineStub(CostsStub(seconds_per_row=9.0))
    assert len(answer("chunk-control", make_view(WIDE, pipeline=dear))) == CHUNK_ROWS
    assert answer("incremental-drafting", new_root) == [ROOT]
    flags = {
        name: (kind.is_calibrated, kind.uses_lookup, kind.is_coupled, kind.cancels)
        for name in ("calibration", "lookup", "coupling", "cancelling")
        for kind in [find_schedule(f"flowspec-without-{name}")]
    }
    assert flags == {
        "calibration": (False, False, True, True),
        "lookup": (True, False, True, True),
        "coupling": (True, True, False, True),
        "cancelling": (True, True, True, False),
    }


def test_without_an_immediate_root_it_waits_for_its_tree() -> None:
    schedule = find_schedule("flowspec-without-immediate-root")(2)
    view = make_view(TREE, ran={ROOT: 1})
    for _ in range(ABLATED_PASSES):
        assert schedule.choose_rows(view, 0.0) == []
        assert schedule.next_time() is None
        assert schedule.choose_pass(view, 0.0) == [1, 2]
    assert schedule.choose_rows(view, 0.0)[0] == ROOT
    schedule.take_verified(view, 1, 0.0)
    assert schedule.choose_rows(view, 0.0) == [], "so does the next root"


def test_without_expansion_a_tree_gets_its_passes_and_no_more() -> None:
    schedule = find_schedule("flowspec-without-expansion")(2)
    view = make_view(TREE, ran={ROOT: 1})
    passes = [schedule.choose_pass(view, 0.0) for _ in range(ABLATED_PASSES + 1)]
    assert passes == [[1, 2]] * ABLATED_PASSES + [None]


def test_without_incremental_drafting_children_leave_with_the_whole_tree() -> None:
    schedule = find_schedule("flowspec-without-incremental-drafting")(2)
    view = make_view(TREE, ran={ROOT: 1}, sent=frozenset({ROOT}))
    assert schedule.choose_rows(view, 0.0) == []
    for _ in range(ABLATED_PASSES):
        schedule.choose_pass(view, 0.0)
    assert schedule.choose_rows(view, 0.0) == [1, 3, 2, 4]


# ---------------------------------------------------------------------- registered schedules


class Mine(Schedule):
    """The root and its likeliest child."""

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        return [] if view.root in view.sent else [view.root, *(id for id, _ in islice(view.unsent(math.log(0.5)), 1))]


def test_a_schedule_of_ones_own_is_found_by_its_name_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "_registered", {})
    with pytest.raises(RequestError, match="'mine' is not known"):
        find_schedule("mine")
    register_schedule("mine", Mine)
    assert find_schedule("mine") is Mine
    assert Mine(2).choose_rows(make_view(TREE), 0.0) == [ROOT, 1]
    origin = Origin(num_stages=1, limits=TargetLimits(100, 20, frozenset()), has_drafter=False)
    (opened,) = origin.handle(ev.PromptSubmitted(1, (1,), GenerateOptions(schedule="mine")), 0.0)
    assert isinstance(opened, ev.OpenSessions)
    with pytest.raises(RequestError, match="^schedule 'other' is not known; choose one of autoregressive, .*, mine$"):
        find_schedule("other")


@pytest.mark.parametrize("name", ["flowspec", "flowspec-without-tree"])
def test_names_that_come_along_are_taken(name: str) -> None:
    with pytest.raises(ValueError, match=f"schedule '{name}' comes with flowspec-edge; choose another name"):
        register_schedule(name, Mine)
    assert find_schedule(name) is not Mine
