"""Which slot of a drafter's cache holds which row, and which slots each row attends to.

Slot 0 is reserved and masked for every row. It keeps the past from being empty, because the fused attention operator
ignores position ids while it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.errors import StageFailedError


class DraftSlots:
    """The slots of one session's cache, which holds ``capacity`` rows, the reserved one included.

    Rows keep their slots for as long as they live. Nothing moves, and the slot freed last is taken first. A row may
    thus stand in front of its parent. A forward has its rows behind all slots in use, also those rows that have a slot
    already.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._ids: list[int] = [NO_PARENT]
        self._parent_slots: list[int] = [0]
        self._slot_of: dict[int, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Slots in use, the reserved one included: also the first slot behind them."""
        return len(self._ids)

    @property
    def ids(self) -> list[int]:
        """Draft ids in slot order, without the reserved slot; NO_PARENT where a slot is free."""
        return self._ids[1:]

    def slots_of(self, ids: Sequence[int]) -> list[int]:
        """Those of these rows, all of which have one."""
        return [self._slot_of[id] for id in ids]

    def release(self, ids: Collection[int]) -> None:
        """Free the slots of these rows (those that have one)."""
        for id in ids:
            slot = self._slot_of.pop(id, None)
            if slot is not None:
                self._ids[slot] = NO_PARENT
                self._free.append(slot)

    def place(self, rows: Sequence[Row]) -> list[int]:
        """The slot of each of these rows; those that have none get one.

        Raises:
            StageFailedError: the cache is full.
        """
        for row in rows:
            if row.id not in self._slot_of and self._free:
                slot = self._slot_of[row.id] = self._free.pop()
                self._ids[slot], self._parent_slots[slot] = row.id, self._slot_of.get(row.parent, 0)
            elif row.id not in self._slot_of:
                self._append([row])
        return [self._slot_of[row.id] for row in rows]

    def mask_behind(self, rows: Sequence[Row]) -> NDArray[np.bool_]:
        """The mask of ``rows`` while they stand behind all slots in use: [rows, slots in use + rows], True for a row's
        ancestors and itself.

        A row that has a slot already stands there a second time, and its descendants among the ``rows`` after it attend
        to the second one.
        """
        first = len(self)
        slots = dict(self._slot_of)
        self._append(rows)
        mask = self._ancestor_mask(first)
        self._slot_of = slots
        del self._ids[first:], self._parent_slots[first:]
        return mask

    def check(self) -> None:
        """Assert the invariants: slots and ids agree, each slot is taken or free, and no parent's slot is free."""
        for id, slot in self._slot_of.items():
            assert self._ids[slot] == id
            assert self._parent_slots[slot] not in self._free
        assert sorted([0, *self._free, *self._slot_of.values()]) == list(range(len(self._ids)))

    def _append(self, rows: Sequence[Row]) -> None:
        held = len(self._ids) - 1
        if held + len(rows) >= self.capacity:
            raise StageFailedError(
                f"the drafter's cache: {held} rows held and {len(rows)} more exceed its {self.capacity - 1}; "
                "open the session with a larger limit"
            )
        for row in rows:
            self._slot_of[row.id] = len(self._ids)
            self._ids.append(row.id)
            self._parent_slots.append(self._slot_of.get(row.parent, 0))

    def _ancestor_mask(self, first: int) -> NDArray[np.bool_]:
        total = len(self._ids)
        mask = np.zeros((total - first, total), np.bool_)  # [rows, slots]
        trunk = _Trunk(self._parent_slots)
        for slot in range(first, total):
            row = mask[slot - first]
            parent = self._parent_slots[slot]
            if parent >= first:
                row[:slot] = mask[parent - first, :slot]
            else:
                trunk.mark_path(row, parent)
            row[slot] = True
        return mask


class _Trunk:
    """The first path that was marked. All paths share the committed rows: where one meets it, the rest is known."""

    def __init__(self, parent_slots: Sequence[int]) -> None:
        self._parent_slots = parent_slots
        self._slots = np.zeros(0, np.int64)
        self._place = [-1] * len(parent_slots)  # in the trunk, by slot; -1 where it is not in it

    def mark_path(self, row: NDArray[np.bool_], slot: int) -> None:
        """Set ``row`` [slots] at ``slot`` and all its ancestors."""
        parent_slots, place = self._parent_slots, self._place
        path: list[int] = []
        while slot and place[slot] < 0:
            path.append(slot)
            slot = parent_slots[slot]
        if slot:
            row[self._slots[place[slot] :]] = True
        row[path] = True
        if not len(self._slots):
            self._slots = np.array(path, np.int64)
            for number, slot in enumerate(path):
                place[slot] = number
