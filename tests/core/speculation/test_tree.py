"""Advance and chunks: what lives depends on neither order nor repetition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.errors import ProtocolError
from tests.core.speculation.trees import Story, interleavings, living, stories


def small_tree() -> Tree:
    """0 -> 1 -> {2, 3}, 2 -> 4."""
    tree = Tree()
    for row in (Row(0, NO_PARENT, 10), Row(1, 0, 11), Row(2, 1, 12), Row(3, 1, 13), Row(4, 2, 14)):
        assert tree.add(row)
    return tree


def test_advance_commits_the_path_and_drops_the_other_branches() -> None:
    tree = small_tree()
    tree.advance(Advance(1, 13))
    assert sorted(tree.take_dropped()) == [2, 4]
    assert living(tree) == {0: 11, 1: 13, 3: None}


def test_advance_to_an_unknown_token_drops_every_child_and_waits_for_the_new_one() -> None:
    tree = small_tree()
    tree.advance(Advance(1, 99))
    assert sorted(tree.take_dropped()) == [2, 3, 4]
    assert not tree.add(Row(5, 1, 50))
    assert tree.add(Row(6, 1, 99))
    assert not tree.add(Row(7, 3, 60))


def test_rows_of_the_prompt_are_committed_as_they_come() -> None:
    tree = Tree(num_prompt=3)
    for row in (Row(0, NO_PARENT, 10), Row(1, 0, 11), Row(2, 1, 12), Row(3, 2, 13), Row(4, 2, 14)):
        assert tree.add(row)
    tree.check()
    assert living(tree) == {0: 11, 1: 12, 2: None, 3: None, 4: None}
    assert not tree.add(Row(5, 1, 50)), "the token after row 1 is known"
    tree.advance(Advance(2, 14))
    assert sorted(tree.take_dropped()) == [3]


def test_of_two_tokens_at_one_place_of_the_prompt_the_first_counts() -> None:
    """An origin that keeps the rules sends no such rows."""
    tree = Tree([Row(0, NO_PARENT, 10), Row(1, 0, 11), Row(2, 0, 12), Row(9, 1, 13)], num_prompt=4)
    assert tree.add(Row(3, 1, 14)), "which row 9 gives way to"
    tree.check()
    assert living(tree) == {0: 11, 1: 14, 3: None}


def test_advance_that_overtakes_its_row_waits_for_it() -> None:
    tree = Tree()
    tree.add(Row(0, NO_PARENT, 10))
    tree.advance(Advance(1, 12))
    tree.add(Row(1, 0, 11))
    assert living(tree) == {0: 11, 1: 12}


def test_contradicting_advances_are_the_origins_fault() -> None:
    tree = small_tree()
    tree.advance(Advance(1, 13))
    with pytest.raises(ProtocolError, match="row 1 is advanced to 13 and to 12"):
        tree.advance(Advance(1, 12))


def test_two_children_with_one_token_are_refused() -> None:
    tree = small_tree()
    with pytest.raises(ProtocolError, match="rows 2 and 9 are both token 12"):
        tree.add(Row(9, 1, 12))


@settings(max_examples=300)
@given(stories(), st.data())
def test_chunks_and_advances_commute(story: Story, data: st.DataObject) -> None:
    """Any interleaving that keeps chunks in order, Advances anywhere and repeated, ends in the same tree."""
    expected = None
    for order in (story.in_order(), data.draw(interleavings(story)), data.draw(interleavings(story))):
        tree = Tree()
        for message in order:
            if isinstance(message, Advance):
                tree.advance(message)
            else:
                for row in message:
                    tree.add(row)
            tree.check()
        expected = expected if expected is not None else living(tree)
        assert living(tree) == expected


@pytest.mark.parametrize("num", [1, 2, 5])
def test_a_tree_that_begins_with_rows_of_its_prompt_is_as_if_they_had_come(num: int) -> None:
    tokens = (5, 6, 5, 5, 7)
    begun, grown = Tree(num_prompt=6), Tree(num_prompt=6)
    begun.begin(tokens[:num])
    for id, token in enumerate(tokens[:num]):
        grown.add(Row(id, id - 1 if id else NO_PARENT, token))
    for tree in (begun, grown):
        tree.check()
        assert [row.token for row in tree.committed()] == list(tokens[: num - 1])
        assert tree.add(Row(num, num - 1, 9)) and not tree.add(Row(num, num - 1, 9))
    assert list(begun) == list(grown)
    with pytest.raises(ProtocolError, match="claims to be first"):
        begun.add(Row(9, NO_PARENT, 5))


def test_the_committed_rows_are_told_in_the_order_of_the_text() -> None:
    tree = small_tree()
    assert tree.committed() == [] == Tree().committed()
    tree.advance(Advance(1, 13))
    assert [row.id for row in tree.committed()] == [0, 1]
    tree.advance(Advance(3, 99))
    assert [row.id for row in tree.committed()] == [0, 1, 3]
