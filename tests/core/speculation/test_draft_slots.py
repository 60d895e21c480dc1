"""A drafter's slots: the mask is the ancestor closure, wherever rows stand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.core.speculation.draft_slots import DraftSlots
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.errors import StageFailedError
from tests.core.speculation.trees import Story, interleavings, stories


def test_the_reserved_slot_is_seen_by_nobody() -> None:
    slots = DraftSlots(8)
    mask = slots.mask_behind([Row(0, NO_PARENT, 1), Row(1, 0, 2), Row(2, 0, 3)])
    assert mask.astype(int).tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 1]]


def test_a_full_cache_is_a_named_error() -> None:
    slots = DraftSlots(2)
    slots.place([Row(0, NO_PARENT, 1)])
    with pytest.raises(StageFailedError, match="1 rows held and 1 more exceed its 1"):
        slots.place([Row(1, 0, 1)])


def test_a_freed_slot_goes_to_the_next_row_and_nothing_moves() -> None:
    slots = DraftSlots(8)
    assert slots.place([Row(1, 0, 1), Row(2, 1, 2), Row(3, 1, 3), Row(4, 3, 4)]) == [1, 2, 3, 4]
    slots.release([2, 9])
    assert slots.place([Row(5, 4, 5), Row(6, 5, 6)]) == [2, 5]
    slots.check()


def test_a_row_that_is_run_again_stands_behind_all_slots_and_its_children_look_at_it_there() -> None:
    slots = DraftSlots(8)
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
def test_draft_slots_show_each_row_its_ancestors(story: Story, data: st.DataObject) -> None:
    """Wherever rows stand, the draft ids of the slots that a row attends to are those of its path."""
    tree, slots = Tree(), DraftSlots(256)
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
