"""Slots: each row finds its ancestors in order, wherever they are, and moving equals rebuilding."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.core.rows import NO_PARENT, Advance, Row, SlotMove
from flowspec_edge.core.speculation import kv_slots
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.errors import ProtocolError, StageFailedError
from tests.core.speculation.trees import Story, interleavings, stories


@pytest.fixture
def three_recent() -> Iterator[None]:
    """Only the last three rows of a path may be anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_slots, "RECENT_ROWS", 3)
        yield


def chain(start: int, stop: int, parent: int = NO_PARENT) -> list[Row]:
    """Rows ``[start, stop)``, each the child of the one before it, the first one that of ``parent``."""
    return [Row(id, id - 1 if id > start else parent, id) for id in range(start, stop)]


def test_a_row_finds_its_ancestors_and_not_its_siblings() -> None:
    slots = KvSlots(8)
    slots.place([Row(0, NO_PARENT, 1), Row(1, 0, 2), Row(2, 0, 3)])
    placed = slots.place([Row(3, 2, 4), Row(4, 3, 5)])
    assert (placed.first_slot, placed.positions.tolist(), placed.moves) == (3, [2, 3], ())
    assert placed.recent[:, -4:].tolist() == [[0, 0, 2, 3], [0, 2, 3, 4]]
    assert placed.recent.shape == (2, RECENT_ROWS)


def test_only_the_rows_behind_a_gap_move() -> None:
    slots = KvSlots(16)
    slots.place([Row(id, 0 if id else NO_PARENT, id) for id in range(8)])
    slots.drop([3, 4, 6])
    assert slots.ids == [0, 1, 2, 5, 7]
    assert slots.place([Row(8, 7, 8)]).moves == ((5, 3, 1), (7, 4, 1))
    assert slots.place([Row(9, 8, 9)]).moves == (), "they are made once"


def test_a_full_cache_is_a_named_error() -> None:
    slots = KvSlots(1)
    slots.place([Row(0, NO_PARENT, 1)])
    with pytest.raises(StageFailedError, match="1 rows held and 1 more exceed its 1"):
        slots.place([Row(1, 0, 1)])


def test_a_prompt_may_be_longer_than_what_may_be_anywhere() -> None:
    slots = KvSlots(400)
    placed = slots.place(chain(0, 300))
    assert placed.moves == ()
    assert placed.recent[200].tolist() == list(range(201 - RECENT_ROWS, 201))


def test_a_path_that_becomes_old_beside_the_spine_is_moved_onto_it(three_recent: None) -> None:
    """Rows 2 and 3 took the places behind row 1. When the path over row 4 goes on, it gets them."""
    slots = KvSlots(16)
    slots.place([*chain(0, 4), *chain(4, 7, parent=1)])
    placed = slots.place(chain(7, 8, parent=6))
    assert slots.ids == [0, 1, 4, 5, 6, 3, 2, 7]
    assert placed.recent.tolist() == [[3, 4, 7]] and placed.positions.tolist() == [5]
    cache = move(np.array([0, 1, 2, 3, 4, 5, 6, -1]), placed.moves)
    assert cache[:7].tolist() == slots.ids[:7]
    slots.check()


def test_rows_with_different_older_ancestors_cannot_be_in_one_chunk(three_recent: None) -> None:
    slots = KvSlots(32)
    slots.place([*chain(0, 5), *chain(5, 8, parent=0)])
    with pytest.raises(ProtocolError, match="different paths of more than 3 rows"):
        slots.place([Row(8, 7, 1), Row(9, 8, 1), Row(10, 4, 1), Row(11, 10, 1), Row(12, 11, 1), Row(13, 12, 1)])


def move(cache: np.ndarray, moves: Sequence[SlotMove]) -> np.ndarray:
    for source, target, length in moves:
        cache[target : target + length] = cache[source : source + length].copy()
    return cache


@settings(max_examples=200)
@given(stories(), st.data(), st.integers(1, 5))
def test_each_row_finds_its_path(story: Story, data: st.DataObject, num_recent: int) -> None:
    """After each message: moved cache = rebuilt cache, and what a row attends to is its path in order."""
    tree, slots = Tree(), KvSlots(256)
    cache = np.full(256, -1)  # each cache row holds its draft id, so a wrong move shows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_slots, "RECENT_ROWS", num_recent)
        for message in data.draw(interleavings(story)):
            arrived = []
            if isinstance(message, Advance):
                tree.advance(message)
            else:
                arrived = [row for row in message if tree.add(row)]
            slots.drop(tree.take_dropped())
            slots.check()
            assert set(slots.ids) == {row.id for row in tree} - {row.id for row in arrived}
            for row in arrived:  # by itself, since the rows of these chunks may have different older ancestors
                if row.id not in tree:
                    continue
                placed = slots.place([row])
                move(cache, placed.moves)[placed.first_slot] = row.id
                slots.check()
                assert cache[: len(slots)].tolist() == slots.ids
                path = [ancestor.id for ancestor in tree.path(row.id)]
                assert placed.positions.tolist() == [len(path) - 1]
                older = cache[: max(len(path) - num_recent, 0)].tolist()
                assert older + cache[placed.recent[0, -min(num_recent, len(path)) :]].tolist() == path


@settings(max_examples=100)
@given(stories(), st.data(), st.integers(1, 5))
def test_a_path_that_is_kept_is_in_the_slots_of_its_positions(
    story: Story, data: st.DataObject, num_recent: int
) -> None:
    tree, slots = Tree(), KvSlots(256)
    cache = np.full(257, -1)  # and one to exchange rows through
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_slots, "RECENT_ROWS", num_recent)
        for message in data.draw(interleavings(story)):
            if isinstance(message, Advance):
                tree.advance(message)
                continue
            for row in message:
                if tree.add(row) and row.id in tree:
                    slots.drop(tree.take_dropped())
                    placed = slots.place([row])
                    move(cache, placed.moves)[placed.first_slot] = row.id
    slots.drop(tree.take_dropped())
    path = [row.id for row in tree.path(data.draw(st.sampled_from(slots.ids)))] if len(slots) else []
    move(cache, slots.keep(path))
    assert slots.ids == path == cache[: len(path)].tolist()
    slots.check()


def test_slots_that_begin_with_a_chain_are_those_that_it_was_placed_in() -> None:
    begun, placed = KvSlots(300, 50), KvSlots(300)
    placed.place(chain(0, 50))
    begun.check()
    for slots in (begun, placed):
        placement = slots.place([*chain(50, 52, parent=49), Row(52, 40, 1)])
        assert placement.first_slot == 50 and placement.positions.tolist() == [50, 51, 41]
        np.testing.assert_array_equal(placement.recent[2, -3:], [39, 40, 52])
