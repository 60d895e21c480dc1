"""Which slot of the KV cache holds which row of the tree, and which slots each row attends to.

A slot is a place in the cache; it is not a position in the sequence (that is the row's depth) and not a draft id. Slot
0 is reserved and masked for every row. It keeps the past from being empty, because the attention operator ignores
position ids while it is. Rows take the next free slot in the order they arrive, parents before children. When rows are
dropped, those behind them move down at once and keep their order. So committed rows are always a prefix, and only the
tail ever moves.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.rows import NO_PARENT, Row, SlotMove
from flowspec_edge.errors import StageFailedError

FIRST_SLOT = 1
"""Slot 0 is the reserved one."""


class KvSlots:
    """The slots of one session's cache, which holds ``capacity`` rows, the reserved one included."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._ids: list[int] = [NO_PARENT]
        self._parent_slots: list[int] = [0]
        self._slot_of: dict[int, int] = {}

    def __len__(self) -> int:
        """Slots in use, the reserved one included: also the next free slot."""
        return len(self._ids)

    def __contains__(self, id: int) -> bool:
        return id in self._slot_of

    @property
    def ids(self) -> list[int]:
        """Draft ids in slot order, without the reserved slot."""
        return self._ids[FIRST_SLOT:]

    def append(self, rows: Sequence[Row]) -> int:
        """Give the next slots to ``rows`` and return the first of them.

        Raises:
            StageFailedError: the cache is full.
        """
        first = len(self._ids)
        if first + len(rows) > self.capacity:
            raise StageFailedError(
                f"KV cache: {first - FIRST_SLOT} rows held and {len(rows)} more "
                f"exceed its {self.capacity - FIRST_SLOT}; open the session with a larger limit"
            )
        for row in rows:
            self._slot_of[row.id] = len(self._ids)
            self._ids.append(row.id)
            self._parent_slots.append(self._slot_of.get(row.parent, 0))
        return first

    def drop(self, dropped: Collection[int]) -> list[SlotMove]:
        """Free the slots of ``dropped`` rows (those that have one) and close the gaps. Returns the moves, in order."""
        gone = sorted(self._slot_of.pop(id) for id in dropped if id in self._slot_of)
        if not gone:
            return []
        moves: list[SlotMove] = []
        new_slot = {0: 0}
        target = gone[0]
        for here, following in zip(gone, [*gone[1:], len(self._ids)], strict=True):
            length = following - here - 1
            if length:
                moves.append(SlotMove(here + 1, target, length))
                for offset in range(length):
                    new_slot[here + 1 + offset] = target + offset
                target += length
        for move in moves:
            for offset in range(move.length):
                source, slot = move.source + offset, move.target + offset
                id, parent_slot = self._ids[source], self._parent_slots[source]
                self._ids[slot] = id
                self._parent_slots[slot] = parent_slot if parent_slot < gone[0] else new_slot[parent_slot]
                self._slot_of[id] = slot
        del self._ids[target:], self._parent_slots[target:]
        return moves

    def ancestor_mask(self, first: int) -> NDArray[np.bool_]:
        """The mask of the rows from slot ``first`` on: [rows, slots in use], True for a row's ancestors and itself."""
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

    def check(self) -> None:
        """Assert the invariants: slots and ids agree, parents stand before children."""
        assert len(self._ids) == len(self._parent_slots) == len(self._slot_of) + FIRST_SLOT
        for id, slot in self._slot_of.items():
            assert self._ids[slot] == id
            assert self._parent_slots[slot] < slot


class ReusedSlots(KvSlots):
    """Slots that rows keep for as long as they live. Nothing moves, and the slot freed last is taken first.

    A row may thus stand in front of its parent. A forward has its rows behind all slots in use, also those rows that
    have a slot already.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._free: list[int] = []

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
                self.append([row])
        return [self._slot_of[row.id] for row in rows]

    def mask_behind(self, rows: Sequence[Row]) -> NDArray[np.bool_]:
        """The mask of ``rows`` while they stand behind all slots in use: [rows, slots in use + rows].

        A row that has a slot already stands there a second time, and its descendants among the ``rows`` after it attend
        to the second one.
        """
        first = len(self)
        slots = dict(self._slot_of)
        self.append(rows)
        mask = self.ancestor_mask(first)
        self._slot_of = slots
        del self._ids[first:], self._parent_slots[first:]
        return mask

    def check(self) -> None:
        """Assert the invariants: slots and ids agree, each slot is taken or free, and no parent's slot is free."""
        for id, slot in self._slot_of.items():
            assert self._ids[slot] == id
            assert self._parent_slots[slot] not in self._free
        assert sorted([0, *self._free, *self._slot_of.values()]) == list(range(len(self._ids)))


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
