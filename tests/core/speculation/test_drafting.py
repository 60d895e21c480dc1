"""Scores of drafted rows, and which of them the drafter should run and the ring should have next."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.core.speculation.acceptance import Acceptance
from flowspec_edge.core.speculation.drafting import Drafting, DraftShape
from flowspec_edge.core.speculation.lookup import Lookup
from flowspec_edge.core.speculation.lookup_drafts import LOOKUP_ROWS
from flowspec_edge.core.speculation.tree import Tree, TreeRow
from tests.narrowing import present

FAR = 1000
"""A depth that nothing reaches."""
ROOT = 1


def make_drafting(
    *, children: int = 2, rows_per_pass: int = 10, acceptance: Acceptance | None = None, lookup: Lookup | None = None
) -> tuple[Tree, Drafting]:
    tree = Tree([Row(0, NO_PARENT, 1), Row(ROOT, 0, 2)])
    shape = DraftShape(width=4, proposals=3, children=children, rows_per_pass=rows_per_pass)
    drafting = Drafting(tree, shape, acceptance=acceptance, lookup=lookup)
    drafting.move_root(ROOT, [2], 10)
    return tree, drafting


def merge(drafting: Drafting, answers: dict[int, list[tuple[int, float]]], next_id: int) -> list[TreeRow]:
    """One pass: per row, the tokens that the draft proposes after it, each with its probability."""
    tokens = np.array([[token for token, _ in proposed] for proposed in answers.values()])
    chances = np.array([[chance for _, chance in proposed] for proposed in answers.values()])
    return drafting.merge(list(answers), tokens, np.log(chances).astype(np.float32), next_id)


def chances(drafting: Drafting) -> dict[int, float]:
    return {id: round(math.exp(score), 4) for id, score in drafting.scores.items()}


def unsent(drafting: Drafting, *, max_depth: int = FAR, min_score: float = -math.inf) -> list[int]:
    found, scores = dict(drafting.unsent(max_depth, min_score)), drafting.scores
    assert found == {id: scores[id] for id in found}
    return list(found)


def draft_two_levels(drafting: Drafting) -> None:
    """Below the root 10 (0.6) and 11 (0.3), below 10 the rows 12 (0.3) and 13 (0.12)."""
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 10)
    merge(drafting, {10: [(7, 0.5), (8, 0.2)]}, 12)


def test_a_pass_adds_the_likeliest_children_numbered_from_the_next_id() -> None:
    _, drafting = make_drafting(children=2)
    added = merge(drafting, {ROOT: [(5, 0.6), (6, 0.3), (7, 0.05)]}, 10)
    assert [(row.id, row.parent, row.token) for row in added] == [(10, ROOT, 5), (11, ROOT, 6)]
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
    drafting.move_root(11, [6], 20)
    assert merge(drafting, {10: [(7, 0.5), (8, 0.2)], ROOT: [(5, 0.5), (9, 0.3)]}, 20) == []
    drafting.check()
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


def test_the_best_rows_are_those_of_the_passes_that_count() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    drafting.mark_sent([10])
    assert drafting.best_rows(9) == [10, 11, 12, 13], "sent or not, a parent before its child"
    assert drafting.best_rows(3, since=1) == [12, 13], "row 10 ran in pass 2, and the root before"
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 20)
    assert drafting.best_rows(9, since=2) == [10, 11]
    assert drafting.best_rows(1, since=2) == [10]


def test_when_the_root_moves_scores_count_from_it_and_drafts_stay() -> None:
    tree, drafting = make_drafting()
    draft_two_levels(drafting)
    tree.advance(Advance(ROOT, 5))
    assert drafting.move_root(10, [5], 20) == []
    assert chances(drafting) == {12: 0.5, 13: 0.2}
    drafting.check()
    assert drafting.frontier(9, FAR) == [12, 13], "row 10 has run, so its children can"


def test_unsent_rows_come_best_first_and_parents_before_children() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    drafting.mark_sent([ROOT])
    assert unsent(drafting) == [10, 11, 12, 13]
    assert drafting.num_sent == 0, "the root is no draft any more"
    drafting.mark_sent([10])
    assert unsent(drafting) == [11, 12, 13]
    assert drafting.num_sent == 1


def test_unsent_rows_end_at_the_last_depth_that_matters_and_at_the_least_chance() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    assert unsent(drafting, max_depth=2) == [10, 11]
    assert unsent(drafting, min_score=math.log(0.2)) == [10, 11, 12]


def test_the_target_teaches_what_drafts_are_worth() -> None:
    acceptance = Acceptance()
    _, drafting = make_drafting(acceptance=acceptance)
    merge(drafting, {ROOT: [(5, 0.6), (6, 0.3)]}, 10)
    log_probs, matches = np.log([0.6, 0.3]), np.zeros(2, np.int64)
    before = acceptance.log_chances(log_probs, matches)
    drafting.observe(ROOT, 6)
    taken, passed_over = 1, 0
    assert acceptance.log_chances(log_probs, matches)[passed_over] < before[passed_over]
    assert acceptance.log_chances(log_probs, matches)[taken] > before[taken]


def test_the_text_itself_proposes_what_followed_before() -> None:
    text = [1, 2, 3, 4, 5, 1, 2]
    tree = Tree([Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(text)])
    drafting = Drafting(tree, DraftShape(), acceptance=Acceptance(), lookup=Lookup(text[:-1]))
    added = drafting.move_root(6, [2], 20)
    assert [(row.parent, row.token) for row in added][:3] == [(6, 3), (20, 4), (21, 5)]
    assert 3 <= len(added) <= LOOKUP_ROWS
    assert drafting.scores[20] > drafting.scores[21]


def lookup_to_check() -> tuple[Tree, Drafting]:
    text = [1, 2, 3, 4, 5, 1, 2]
    tree = Tree([Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(text)])
    drafting = Drafting(tree, DraftShape(), acceptance=Acceptance(), lookup=Lookup(text[:-1]), is_checked=True)
    assert drafting.move_root(6, [2], 20) == []
    return tree, drafting


def test_where_lookups_are_checked_only_what_may_come_becomes_rows() -> None:
    _, drafting = lookup_to_check()
    unchecked = present(drafting.unchecked)
    chains = unchecked.next_chains()
    assert chains[6][:3] == (3, 4, 5) and list(chains) == [6]
    merge(drafting, {6: [(3, 0.5), (9, 0.3)]}, 20)
    assert unchecked.next_chains() == {}, "one question at a time"
    added = drafting.add_checked([2], 30)
    assert [(row.id, row.parent, row.token) for row in added] == [(30, 20, 4)], "3 is a row already, 5 may not come"
    assert drafting.scores[30] < drafting.scores[20]
    assert list(unchecked.next_chains()) == [20], "what was proposed meanwhile is asked now"
    assert drafting.add_checked([0], 40) == []
    drafting.check()


def test_what_was_checked_below_rows_that_have_gone_is_forgotten() -> None:
    tree, drafting = lookup_to_check()
    unchecked = present(drafting.unchecked)
    (chain,) = unchecked.next_chains().values()
    tree.advance(Advance(6, 9))
    tree.add(Row(50, 6, 9))
    drafting.move_root(50, [9], 51)
    assert drafting.add_checked([len(chain)], 60) == []
    assert len(drafting) == 0 and unchecked.next_chains() == {}
    drafting.check()


def test_dead_rows_are_forgotten() -> None:
    tree, drafting = make_drafting()
    draft_two_levels(drafting)
    tree.advance(Advance(ROOT, 6))
    assert drafting.move_root(11, [6], 20) == []
    assert len(drafting) == 0 and not drafting.scores
    drafting.check()
    assert [row.id for row in merge(drafting, {11: [(7, 0.5), (8, 0.2)]}, 20)] == [20, 21]
    tree.advance(Advance(11, 9))
    tree.add(Row(30, 11, 9))
    drafting.move_root(30, [9], 31)
    assert not drafting.scores, "the text went on with a row that was not drafted"
    drafting.check()


def test_what_hangs_below_a_row_is_scored_anew_with_it() -> None:
    _, drafting = make_drafting()
    draft_two_levels(drafting)
    merge(drafting, {ROOT: [(5, 0.2), (6, 0.7)]}, 20)
    assert chances(drafting) == {10: 0.2, 11: 0.7, 12: 0.1, 13: 0.04}
    assert unsent(drafting) == [11, 10, 12, 13]


def test_a_match_that_the_draft_proposes_as_well_counts_as_both() -> None:
    text = [1, 2, 3, 4, 5, 1, 2]
    tree = Tree([Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(text)])
    acceptance = Acceptance()
    drafting = Drafting(tree, DraftShape(children=2), acceptance=acceptance, lookup=Lookup(text[:-1]))
    drafting.move_root(6, [2], 20)
    looked_up = drafting.scores[20]
    added = merge(drafting, {6: [(9, 0.4), (3, 0.3), (8, 0.1)]}, 60)
    assert [row.token for row in added] == [9], "token 3 is a row already"
    assert drafting.scores[20] > looked_up
    merge(drafting, {6: [(9, 0.4), (7, 0.3), (8, 0.1)]}, 70)
    least = acceptance.log_chances(np.log([0.1]) - 1, np.array([2]))[0]
    assert drafting.scores[20] == pytest.approx(least), "it is less likely than all that the draft proposes"
    drafting.check()


# ---------------------------------------------------------------------- all at once, beside each for itself


CHANCES = st.floats(0.01, 0.5)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), CHANCES, CHANCES), min_size=1, max_size=40), st.data())
def test_scores_and_choices_are_those_of_each_row_alone(
    passes: list[tuple[int, float, float]], data: st.DataObject
) -> None:
    """Random trees, rows that ran once or again, rows that left: the table answers what a walk over all rows would."""
    tree, drafting = make_drafting()
    ran, chosen = dict[int, int](), dict[tuple[int, int], float]()
    for number, (pick, *pair) in enumerate(passes, 1):
        parent = sorted({ROOT, *drafting.scores})[pick % (len(drafting) + 1)]
        merge(drafting, {parent: [(5, pair[0]), (6, pair[1])]}, 10 * number)
        ran[parent] = number
        chosen |= {(parent, 5): pair[0], (parent, 6): pair[1]}

    paths = {ROOT: 1.0}
    for row in tree.descendants(ROOT):
        paths[row.id] = paths[row.parent] * chosen[row.parent, row.token]
    del paths[ROOT]
    scores = drafting.scores
    assert {id: math.exp(score) for id, score in scores.items()} == pytest.approx(paths, rel=1e-5)
    best = sorted(scores, key=lambda id: (-scores[id], id))
    sent = data.draw(st.sets(st.sampled_from(best)))
    drafting.mark_sent(sorted(sent))
    assert unsent(drafting) == [id for id in best if id not in sent]
    assert drafting.num_sent == len(sent)
    below = [id for id in best if tree[id].parent in ran]
    assert drafting.frontier(FAR, FAR) == [id for id in below if id not in ran]
    assert drafting.stale(FAR, FAR) == [id for id in below if 0 < ran.get(id, 0) < ran[tree[id].parent]]
    drafting.check()
