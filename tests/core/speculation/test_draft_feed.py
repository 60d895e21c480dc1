"""What the drafter is told: each verified pair once and in order, drafted rows, and dead ones."""

import numpy as np
import pytest

from flowspec_edge.core.events import RunDraft
from flowspec_edge.core.rows import NO_PARENT, Floats, Row
from flowspec_edge.core.speculation.draft_feed import DraftFeed
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.errors import ProtocolError
from tests.core.speculation.comparable import comparable

SESSION = 7
ROWS = [Row(0, NO_PARENT, 5), Row(1, 0, 6), Row(2, 1, 7), Row(3, 2, 8), Row(4, 2, 9)]
"""A prompt of two rows, the first new token 2, and two drafted rows below it."""
NO_HIDDEN = np.zeros((0, 0), np.float32)


def make_feed(taps: tuple[int, ...] = (), *, is_on: bool = True) -> DraftFeed:
    return DraftFeed(SESSION, Tree(ROWS), 2, taps, is_on=is_on)


def hidden(*values: float) -> Floats:
    return np.array([[value] for value in values], np.float32)


def run(*ids: int, positions: list[int], hidden: Floats = NO_HIDDEN, dropped: tuple[int, ...] = ()) -> RunDraft:
    return RunDraft(SESSION, tuple(ROWS[id] for id in ids), np.array(positions), hidden, dropped)


def test_a_pair_is_a_row_and_the_hidden_row_before_it() -> None:
    feed = make_feed()
    feed.take_returned(tuple(ROWS[:2]), hidden(0.5, 1.5))
    assert feed.num_unextended(2) == 2
    expected = run(1, 2, positions=[0, 1], hidden=hidden(0.5, 1.5))
    assert comparable(feed.next_pass(2, [])) == comparable(expected)
    assert feed.num_unextended(2) == 0


def test_the_answer_is_about_the_last_pair_and_the_drafted_rows() -> None:
    feed = make_feed()
    feed.take_returned(tuple(ROWS[:2]), hidden(0.5, 1.5))
    feed.next_pass(2, [])
    assert feed.is_running
    assert feed.take_finished() == ([2], 2)
    assert not feed.is_running
    feed.take_returned((ROWS[2],), hidden(2.5))
    expected = run(3, 4, positions=[2, 2], hidden=hidden(2.5))
    assert comparable(feed.next_pass(3, [4, 3])) == comparable(expected), "the root is a verified row, and runs once"
    assert feed.take_finished() == ([3, 4], 2)


def test_drafted_rows_run_alone_where_no_pair_is_new() -> None:
    feed = make_feed()
    feed.take_returned(tuple(ROWS[:2]), hidden(0.5, 1.5))
    feed.next_pass(2, [])
    feed.take_finished()
    assert comparable(feed.next_pass(2, [3, 4])) == comparable(run(3, 4, positions=[2, 2]))
    assert feed.take_finished() == ([3, 4], 2)


def test_the_drafter_is_told_once_of_rows_that_died() -> None:
    feed = make_feed()
    feed.take_returned(tuple(ROWS[:2]), hidden(0.5, 1.5))
    feed.forget([11, 12])
    feed.forget([13])
    assert feed.next_pass(2, []).dropped == (11, 12, 13)
    assert feed.next_pass(2, [3]).dropped == ()


def test_hidden_rows_of_dead_rows_are_not_kept() -> None:
    feed = make_feed()
    feed.take_returned((Row(9, 2, 3),), hidden(9.5))  # died on its way
    feed.take_returned((ROWS[2],), hidden(2.5))
    feed.forget([2])
    assert feed._hidden == {}


LONG = [Row(id, id - 1 if id else NO_PARENT, 5 + id) for id in range(8)]
"""A prompt of seven rows, and the first new token 7."""


@pytest.mark.parametrize("taps", [(), (2,)])
def test_pairs_of_a_prompt_are_taken_in_parts_while_it_is_under_way(taps: tuple[int, ...]) -> None:
    tree = Tree(LONG[:3])
    feed = DraftFeed(SESSION, tree, 7, taps, is_on=True)

    def bring(*ids: int) -> None:
        for id in ids:
            tree.add(LONG[id])
        values = hidden(*(id + 0.5 for id in ids))
        if taps:
            feed.take_tapped(2, ids, values)
        else:
            feed.take_returned(tuple(LONG[id] for id in ids), values)

    def part(first: int, last: int) -> RunDraft:
        pairs = range(first, last + 1)
        before = hidden(*(id - 0.5 for id in pairs))
        return RunDraft(SESSION, tuple(LONG[id] for id in pairs), np.array(pairs) - 1, before, ())

    bring(0, 1)
    assert feed.next_of_prompt(3, 3) is None, "three rows are wanted"
    bring(3)
    assert feed.next_of_prompt(3, 3) is None, "and three that follow each other"
    bring(2)
    assert feed.next_of_prompt(1, 0) is None, "there is no time"
    assert comparable(feed.next_of_prompt(3, 3)) == comparable(part(1, 3))
    assert feed.is_running
    assert feed.take_finished() == ([], 3), "its proposals are of no use"
    assert list(feed._hidden) == [3]
    bring(4, 5)
    assert comparable(feed.next_of_prompt(1, 9)) == comparable(part(4, 5)), "row 6 has not left"
    feed.take_finished()
    bring(6)
    assert comparable(feed.next_of_prompt(1, 9)) == comparable(part(6, 6))
    feed.take_finished()
    assert feed.next_of_prompt(1, 9) is None, "the next one is that of the first token"
    tree.add(LONG[7])
    assert feed.num_unextended(7) == 1
    assert comparable(feed.next_pass(7, [])) == comparable(part(7, 7))


def test_tapped_rows_are_awaited_and_joined_in_the_order_of_the_layers() -> None:
    feed = make_feed((2, 4))
    assert (feed.is_tapped, feed.wants_returned) == (True, False)
    feed.take_returned(tuple(ROWS[:2]), hidden(0.5, 1.5))  # the normed rows are not what it wants
    feed.take_tapped(4, (0, 1), hidden(40.0, 41.0))
    feed.take_tapped(2, (1,), hidden(21.0))
    assert feed.is_awaiting_tapped(2)
    assert feed.num_unextended(2) == 0, "row 1's pair needs row 0, of layer 2"
    feed.take_tapped(2, (0,), hidden(20.0))
    assert not feed.is_awaiting_tapped(2)
    assert feed.num_unextended(2) == 2
    joined = np.array([[20.0, 40.0], [21.0, 41.0]], np.float32)
    assert comparable(feed.next_pass(2, [])) == comparable(run(1, 2, positions=[0, 1], hidden=joined))


def test_drafted_rows_do_not_wait_for_tapped_ones() -> None:
    feed = make_feed((2,))
    feed.take_tapped(2, (0, 1), hidden(20.0, 21.0))
    feed.next_pass(2, [])
    assert feed.is_awaiting_tapped(3)
    assert comparable(feed.next_pass(3, [4])) == comparable(run(4, positions=[2]))


def test_nothing_is_awaited_before_the_first_token() -> None:
    assert not make_feed((2,)).is_awaiting_tapped(1)
    assert not make_feed((2,)).may_draft(1)
    assert make_feed((2,)).may_draft(2)


@pytest.mark.parametrize(
    ("taps", "layer", "id", "num_times"), [((), 2, 0, 1), ((2,), 3, 0, 1), ((2,), 2, 9, 1), ((2,), 2, 0, 2)]
)
def test_tapped_rows_that_nobody_asked_for_are_refused(
    taps: tuple[int, ...], layer: int, id: int, num_times: int
) -> None:
    """Refused are: any row without taps, another layer, a row that is not in the tree, and the same row twice."""
    feed = make_feed(taps)
    for _ in range(num_times - 1):
        feed.take_tapped(layer, (id,), hidden(1.0))
    with pytest.raises(ProtocolError, match=f"session 7: row {id} of layer {layer} came unasked, or twice"):
        feed.take_tapped(layer, (id,), hidden(1.0))


def test_without_a_drafter_nothing_is_kept_and_nothing_can_be_taken() -> None:
    feed = make_feed((2,), is_on=False)
    feed.take_returned(tuple(ROWS[:2]), hidden(0.5, 1.5))
    feed.forget([3])
    assert (feed.is_tapped, feed.wants_returned, feed.may_draft(2), feed.num_unextended(2)) == (False, False, False, 0)
    assert not feed._hidden
    assert not feed._dropped
