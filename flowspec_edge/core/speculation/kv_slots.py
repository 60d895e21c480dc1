"""Which row of the KV cache holds which row of the tree, and who may look at whom.

A slot is a place in the cache; it is not a position in the sequence (that is the row's depth) and not a draft id. Slot 0 is
reserved and masked for everyone: the attention operator ignores position ids while its past is empty, so it never is.
Rows take the next free slot in the order they arrive, parents before children. Dropped rows are closed up at once: the
rows behind them move down, order kept, so committed rows are always a prefix and only the tail ever moves.
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
                f"KV cache: {first - FIRST_SLOT} rows held and {len(rows)} more exceed its {self.capacity - FIRST_SLOT}; "
                "open the session with a larger limit"
            )
        for row in rows:
            self._slot_of[row.id] = len(self._ids)
            self._ids.append(row.id)
            self._parent_slots.append(self._slot_of.get(row.parent, 0))
        return first

    def drop(self, dropped: Collection[int]) -> list[SlotMove]:
        """Free the slots of ``dropped`` rows (those that have one) and close the gaps. Returns the moves to make, in order."""
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
        """Who may look at whom: [rows from ``first`` on, slots in use], True for a row's ancestors and itself."""
        total = len(self._ids)
        mask = np.zeros((total - first, total), np.bool_)  # [rows, slots]
        for slot in range(first, total):
            row = mask[slot - first]
            parent = self._parent_slots[slot]
            if parent >= first:
                row[:first] = mask[parent - first, :first]
                row[first:slot] = mask[parent - first, first:slot]
            else:
                self._mark_path(row, parent)
            row[slot] = True
        return mask

    def _mark_path(self, row: NDArray[np.bool_], slot: int) -> None:
        parents = self._parent_slots
        while slot:
            if parents[slot] == slot - 1:  # a run of consecutive slots, such as the prompt, in one stroke
                stop = slot + 1
                while slot and parents[slot] == slot - 1:
                    slot -= 1
                row[max(slot, FIRST_SLOT) : stop] = True
                slot = parents[slot] if slot else 0
            else:
                row[slot] = True
                slot = parents[slot]

    def check(self) -> None:
        """Assert the invariants: slots and ids agree, parents stand before children."""
        assert len(self._ids) == len(self._parent_slots) == len(self._slot_of) + FIRST_SLOT
        for id, slot in self._slot_of.items():
            assert self._ids[slot] == id
            assert self._parent_slots[slot] < slot
