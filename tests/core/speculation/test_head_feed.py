"""Returned rows until the token after them is drawn, and that token until the walk has taken it."""

import numpy as np

from flowspec_edge.core.events import HeadFinished
from flowspec_edge.core.rows import NO_PARENT, Advance, Floats, Row
from flowspec_edge.core.speculation.head_feed import HeadFeed
from flowspec_edge.core.speculation.tree import Tree
from tests.core.speculation.comparable import comparable

ROWS = [Row(0, NO_PARENT, 5), Row(1, 0, 6), Row(2, 1, 7), Row(3, 1, 8), Row(4, 2, 9)]
"""The root 1 with children 2 and 3, and 4 below 2."""


def of(*ids: int) -> tuple[tuple[Row, ...], Floats]:
    """Rows, and a hidden row each that shows which one it is."""
    return tuple(ROWS[id] for id in ids), np.array([[float(id)] for id in ids], np.float32)


def make_feed() -> tuple[Tree, HeadFeed]:
    tree = Tree(ROWS)
    return tree, HeadFeed(tree)


def test_the_head_takes_all_that_waits_at_once_and_answers_row_by_row() -> None:
    _, feed = make_feed()
    feed.take_returned(*of(1, 2), root=1)
    feed.take_returned(*of(3), root=1)
    assert comparable(feed.next_rows(1)) == comparable(of(1, 2, 3))
    assert feed.next_rows(1) is None
    assert feed.take_drawn(HeadFinished((10, 20, None))) == 3
    assert [feed.drawn_after(id) for id in (1, 2, 3, 4)] == [10, 20, None, None]


def test_it_is_busy_from_a_rows_return_to_its_draw() -> None:
    _, feed = make_feed()
    assert not feed.is_busy
    feed.take_returned(*of(1), root=1)
    assert feed.is_busy
    feed.next_rows(1)
    assert feed.is_busy
    feed.take_drawn(HeadFinished((7,)))
    assert not feed.is_busy


def test_nothing_is_drawn_before_the_root() -> None:
    """All hidden rows of a prompt come back where a drafter wants them; the walk begins at the last one."""
    _, feed = make_feed()
    feed.take_returned(*of(0), root=1)
    assert not feed.is_busy
    feed.take_returned(*of(0, 1), root=1)
    assert comparable(feed.next_rows(1)) == comparable(of(1))


def test_pruning_forgets_rows_that_wait_and_draws_that_the_walk_cannot_reach() -> None:
    tree, feed = make_feed()
    feed.take_returned(*of(1, 2, 3), root=1)
    feed.next_rows(1)
    feed.take_drawn(HeadFinished((7, 9, 4)))
    feed.take_returned(*of(3), root=1)
    tree.advance(Advance(1, 7))  # the text goes on with row 2
    feed.prune(root=2)
    assert not feed.is_busy, "row 3 is dead, and nothing else waits"
    assert [feed.drawn_after(id) for id in (1, 2, 3)] == [None, 9, None]


def test_rows_that_died_while_they_waited_do_not_reach_the_head() -> None:
    tree, feed = make_feed()
    feed.take_returned(*of(3, 4), root=1)
    tree.advance(Advance(1, 7))
    feed.prune(root=2)
    assert comparable(feed.next_rows(2)) == comparable(of(4))
