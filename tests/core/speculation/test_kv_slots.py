"""Slots: the mask is the ancestor closure, and moving equals rebuilding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.core.speculation.kv_slots import FIRST_SLOT, KvSlots, ReusedSlots
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.errors import StageFailedError
from tests.core.speculation.trees import Story, interleavings, stories


def ancestor_closure(tree: Tree, ids: list[int]) -> np.ndarray:
    mask = np.zeros((len(ids), len(ids) + FIRST_SLOT), bool)
    for i, id in enumerate(ids):
        path = {row.id for row in tree.path(id)}
        mask[i, FIRST_SLOT:] = [other in path for other in ids]
    return mask


def test_the_reserved_slot_is_seen_by_nobody() -> None:
    slots = KvSlots(8)
    first = slots.append([Row(0, NO_PARENT, 1), Row(1, 0, 2), Row(2, 0, 3)])
    assert slots.ancestor_mask(first).astype(int).tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


def test_a_one_row_chunk_does_not_see_its_siblings() -> None:
    slots = KvSlots(8)
    slots.append([Row(0, NO_PARENT, 1), Row(1, 0, 2), Row(2, 0, 3)])
    first = slots.append([Row(3, 2, 4)])
    assert slots.ancestor_mask(first).astype(int).tolist() == [[0, 1, 0, 1, 1]]


def test_only_the_rows_behind_a_gap_move() -> None:
    slots = KvSlots(16)
    slots.append([Row(id, 0 if id else NO_PARENT, id) for id in range(8)])
    assert slots.drop([3, 4, 6]) == [(6, 4, 1), (8, 5, 1)]
    assert slots.ids == [0, 1, 2, 5, 7]


def test_a_full_cache_is_a_named_error() -> None:
    slots = KvSlots(2)
    slots.append([Row(0, NO_PARENT, 1)])
    with pytest.raises(StageFailedError, match="1 rows held and 1 more exceed its 1"):
        slots.append([Row(1, 0, 1)])


@settings(max_examples=200)
@given(stories(), st.data())
def test_slots_follow_the_tree(story: Story, data: st.DataObject) -> None:
    """After each message: moved cache = rebuilt cache, and every mask = the ancestor closure."""
    tree, slots = Tree(), KvSlots(256)
    cache = np.full(256, -1)  # each cache row holds its draft id, so a wrong move shows
    for message in data.draw(interleavings(story)):
        arrived = []
        if isinstance(message, Advance):
            tree.advance(message)
        else:
            arrived = [row for row in message if tree.add(row)]
        for move in slots.drop(tree.take_dropped()):
            cache[move.target : move.target + move.length] = cache[move.source : move.source + move.length].copy()
        arrived = [row for row in arrived if row.id in tree]
        first = slots.append(arrived)
        cache[first : len(slots)] = [row.id for row in arrived]
        slots.check()
        assert cache[FIRST_SLOT : len(slots)].tolist() == slots.ids
        assert set(slots.ids) == {row.id for row in tree}
        closure = ancestor_closure(tree, slots.ids)
        for first in {FIRST_SLOT, max(len(slots) - 1, FIRST_SLOT), (FIRST_SLOT + len(slots)) // 2}:
            np.testing.assert_array_equal(slots.ancestor_mask(first), closure[first - FIRST_SLOT :])


def test_a_freed_slot_goes_to_the_next_row_and_nothing_moves() -> None:
    slots = ReusedSlots(8)
    assert slots.place([Row(1, 0, 1), Row(2, 1, 2), Row(3, 1, 3), Row(4, 3, 4)]) == [1, 2, 3, 4]
    slots.release([2, 9])
    assert slots.place([Row(5, 4, 5), Row(6, 5, 6)]) == [2, 5]
    slots.check()


def test_a_row_that_is_run_again_stands_behind_all_slots_and_its_children_look_at_it_there() -> None:
    slots = ReusedSlots(8)
    slots.place([Row(1, 0, 1), Row(2, 1, 2)])
    again = [Row(1, 0, 1), Row(3, 1, 3), Row(4, 2, 4)]
    assert slots.mask_behind(again).astype(int).tolist() == [
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 1, 1, 0, 0, 1],
    ]
    assert slots.place(again) == [1, 3, 4], "only what had no slot has taken one"


@settings(max_examples=30)
@given(stories(), st.data())
def test_reused_slots_show_each_row_its_ancestors(story: Story, data: st.DataObject) -> None:
    """Wherever rows stand, the draft ids of the slots that a row attends to are those of its path."""
    tree, slots = Tree(), ReusedSlots(256)
    for message in data.draw(interleavings(story)):
        arrived = []
        if isinstance(message, Advance):
            tree.advance(message)
        else:
            arrived = [row for row in message if tree.add(row)]
        slots.release(tree.take_dropped())
        arrived = [row for row in arrived if row.id in tree]
        again = data.draw(st.lists(st.sampled_from(slots.ids), unique=True, max_size=3)) if slots.ids else []
        again = [id for id in again if id != NO_PARENT]
        rows = [Row(id, tree[id].parent, tree[id].token) for id in again] + arrived
        standing = [NO_PARENT, *slots.ids, *(row.id for row in rows)]
        for row, seen in zip(rows, slots.mask_behind(rows), strict=True):
            assert sorted(standing[slot] for slot in np.flatnonzero(seen)) == sorted(r.id for r in tree.path(row.id))
        slots.place(rows)
        slots.check()
        assert {id for id in slots.ids if id != NO_PARENT} == {row.id for row in tree}
