"""Scores of drafted rows, and which of them the drafter should run and the ring should have next."""

import math

import numpy as np
import pytest

from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.core.speculation.acceptance import Acceptance, Edge
from flowspec_edge.core.speculation.drafting import LOOKUP_ROWS, Drafting, DraftShape
from flowspec_edge.core.speculation.lookup import Lookup
from flowspec_edge.core.speculation.tree import Tree

FAR = 1000
"""A depth that nothing reaches."""
ROOT = 1


def make_drafting(
    *, children: int = 2, rows_per_pass: int = 10, acceptance: Acceptance | None = None, lookup: Lookup | None = None
) -> tuple[Tree, Drafting]:
    tree = Tree([Row(0, NO_PARENT, 1), Row(ROOT, 0, 2)])
    shape = DraftShape(width=4, proposals=3, children=children, rows_per_pass=rows_per_pass)
    return tree, Drafting(tree, shape, acceptance=acceptance, lookup=lookup)


def merge(drafting: Drafting, answers: dict[int, list[tuple[int, float]]], next_id: int) -> list[Row]:
    """One pass: per row, the tokens that the draft proposes after it, each with its probability."""
    tokens = np.array([[token for token, _ in proposed] for proposed in answers.values()])
    chances = np.array([[chance for _, chance in proposed] for proposed in answers.values()])
    return drafting.merge(list(answers), tokens, np.log(chances).astype(np.float32), next_id)


def chances(drafting: Drafting) -> dict[int, float]:
    return {id: round(math.exp(score), 4) for id, score in drafting.scores.items()}


def draft_two_levels(drafting: Drafting) -> None:
    """Below the root 10 (0.6) and 11 (0.3), below 10 the rows 12 (0.3) and 13 (0.12)."""
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 10)
    merge(drafting, {10: [(7, 0.5), (8, 0.2)]}, 12)


def test_a_pass_adds_the_likeliest_children_numbered_from_the_next_id() -> None:
    _, drafting = make_drafting(children=2)
    added = merge(drafting, {ROOT: [(5, 0.6), (6, 0.3), (7, 0.05)]}, 10)
    assert added == [Row(10, ROOT, 5), Row(11, ROOT, 6)]
    assert chances(drafting) == {10: 0.6, 11: 0.3}
    assert drafting.num_passes == 1


def test_a_score_is_the_chance_of_the_whole_path() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    assert chances(drafting) == {10: 0.6, 11: 0.3, 12: 0.3, 13: 0.12}


def test_of_a_pass_only_its_likeliest_rows_stay() -> None:
    _, drafting = make_drafting(rows_per_pass=2)
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 10)
    added = merge(drafting, {10: [(7, 0.5), (8, 0.05)], 11: [(7, 0.9), (8, 0.05)]}, 12)
    assert {(row.parent, row.token) for row in added} >= {(10, 7), (11, 7)}
    _, narrow = make_drafting(rows_per_pass=2, children=3)
    assert len(merge(narrow, {ROOT: [(5, 0.6), (6, 0.3), (7, 0.05)]}, 10)) == 2


def test_children_that_exist_get_the_new_score_and_no_second_row() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    assert merge(drafting, {ROOT: [(5, 0.2), (6, 0.7)]}, 20) == []
    assert chances(drafting)[10] == 0.2
    assert chances(drafting)[11] == 0.7


def test_a_parent_that_died_meanwhile_counts_for_nothing() -> None:
    tree, drafting = make_drafting()
    draft_two_levels(drafting)
    tree.advance(Advance(ROOT, 6))
    drafting.forget(tree.take_dropped())
    assert merge(drafting, {10: [(7, 0.5), (8, 0.2)], ROOT: [(5, 0.5), (9, 0.3)]}, 20) == []
    assert drafting.num_passes == 3


def test_the_frontier_is_what_has_not_run_below_what_has() -> None:
    _, drafting = make_drafting()
    assert drafting.frontier(9, FAR) == []
    draft_two_levels(drafting)
    assert drafting.frontier(9, FAR) == [11, 12, 13]
    assert drafting.frontier(1, FAR) == [11]
    assert drafting.frontier(9, max_depth=3) == [11], "children of the rows at the last depth could not become text"


def test_stale_rows_ran_before_their_parent_ran_again() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    assert drafting.stale(9, FAR) == []
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 20)
    assert drafting.stale(9, FAR) == [10]
    assert drafting.stale(9, max_depth=2) == []


def test_a_pass_takes_frontier_and_stale_rows_by_worth() -> None:
    """Running row 10 anew is worth 0.3 of its 0.6: more than row 13, less than rows 11 and 12."""
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 20)
    assert drafting.next_pass(9, FAR, -math.inf) == [11, 12, 10, 13]
    assert drafting.next_pass(2, FAR, -math.inf) == [11, 12]
    assert drafting.next_pass(9, FAR, math.log(0.15)) == [11, 12, 10]


def test_what_ran_before_since_is_to_be_drafted_anew() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    assert drafting.frontier(9, FAR, since=2) == [], "the root comes first, as a verified row"
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 20)
    assert drafting.frontier(9, FAR, since=2) == [10, 11]
    assert drafting.stale(9, FAR, since=2) == []


def test_when_the_root_moves_scores_count_from_it_and_drafts_stay() -> None:
    tree, drafting = make_drafting()
    draft_two_levels(drafting)
    tree.advance(Advance(ROOT, 5))
    drafting.forget(tree.take_dropped())
    assert drafting.move_root(10, [5], 20) == []
    assert chances(drafting) == {12: 0.5, 13: 0.2}
    assert drafting.frontier(9, FAR) == [12, 13], "row 10 has run, so its children can"


def test_unsent_rows_come_best_first_and_parents_before_children() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    assert list(drafting.unsent(ROOT, {0, ROOT}, FAR, -math.inf)) == [10, 11, 12, 13]
    assert list(drafting.unsent(ROOT, {0, ROOT, 10}, FAR, -math.inf)) == [11, 12, 13]
    drafting.scores[12] = 0.0  # a score may be older than its parent's
    assert list(drafting.unsent(ROOT, {0, ROOT}, FAR, -math.inf)) == [10, 12, 11, 13]


def test_unsent_rows_end_at_the_last_depth_that_matters_and_at_the_least_chance() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    assert list(drafting.unsent(ROOT, {ROOT}, 2, -math.inf)) == [10, 11]
    assert list(drafting.unsent(ROOT, {ROOT}, FAR, math.log(0.2))) == [10, 11, 12]


def test_the_target_teaches_what_drafts_are_worth() -> None:
    acceptance = Acceptance()
    _, drafting = make_drafting(acceptance=acceptance)
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 10)
    before = acceptance.log_chance(Edge(math.log(0.6))), acceptance.log_chance(Edge(math.log(0.3)))
    drafting.observe(ROOT, 6)
    assert acceptance.log_chance(Edge(math.log(0.6))) < before[0]
    assert acceptance.log_chance(Edge(math.log(0.3))) > before[1]


def test_the_text_itself_proposes_what_followed_before() -> None:
    text = [1, 2, 3, 4, 5, 1, 2]
    tree = Tree([Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(text)])
    drafting = Drafting(tree, DraftShape(), acceptance=Acceptance(), lookup=Lookup(text[:-1]))
    added = drafting.move_root(6, [2], 20)
    assert [(row.parent, row.token) for row in added][:3] == [(6, 3), (20, 4), (21, 5)]
    assert 3 <= len(added) <= LOOKUP_ROWS
    assert drafting.scores[20] > drafting.scores[21]


def test_dead_rows_are_forgotten() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    drafting.forget([10, 12, 13])
    assert set(drafting.scores) == {11}
    with pytest.raises(KeyError):
        drafting._ran[10]
