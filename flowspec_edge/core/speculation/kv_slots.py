"""Which slot of the KV cache holds which row of the tree, and where each row's ancestors are.

A slot is a place in the cache; it is not a position in the sequence (that is the row's depth) and not a draft id. Rows
take the next free slot in the order they arrive, parents before children. When rows are dropped, those behind them move
down at once and keep their order. So committed rows are in the slots of their positions, and only the tail ever moves.

The *spine* is the longest path that is in the slots of its positions: the committed rows, and whatever goes on behind
them in order. A row's older ancestors, all but the last ``RECENT_ROWS`` of its path, must be on the spine when the row
is run. For drafts that is so once the Advance to their root has come. A chunk may overtake that Advance; then the path
above it is moved onto the spine, committed or not, and what was there makes room. So a row's older ancestors are where
they must be whatever has arrived, and in whatever order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.limits import RECENT_ROWS
from flowspec_edge.core.rows import NO_PARENT, Placement, Row, SlotMove
from flowspec_edge.errors import ProtocolError, StageFailedError

NO_SLOT = -1


class KvSlots:
    """The slots of one session's cache, which holds ``capacity`` rows.

    The first ``num_rows`` are there: a chain whose draft ids, like the slots, are their positions.
    """

    def __init__(self, capacity: int, num_rows: int = 0) -> None:
        self.capacity = capacity
        self._ids: list[int] = list(range(num_rows))
        self._parent_slots: list[int] = list(range(NO_SLOT, num_rows - 1))
        self._slot_of: dict[int, int] = dict(enumerate(range(num_rows)))
        self._num_spine = num_rows
        self._depths: list[int] = list(range(num_rows))
        self._moves: list[SlotMove] = []  # not yet made

    def __len__(self) -> int:
        """Slots in use: also the next free slot."""
        return len(self._ids)

    def __contains__(self, id: int) -> bool:
        return id in self._slot_of

    @property
    def ids(self) -> list[int]:
        """Draft ids in slot order."""
        return list(self._ids)

    def place(self, rows: Sequence[Row]) -> Placement:
        """Give the next slots to ``rows``, and say what a forward over them needs to know.

        Raises:
            StageFailedError: the cache is full.
            ProtocolError: rows of one chunk have different older ancestors, which no honest origin asks for.
        """
        first = len(self._ids)
        if first + len(rows) > self.capacity:
            raise StageFailedError(
                f"KV cache: {first} rows held and {len(rows)} more exceed its {self.capacity}; open the session with a "
                "larger limit"
            )
        astray = self._first_astray(rows)
        if astray is not None:
            self._line_up(astray)
            if self._first_astray(rows) is not None:
                raise ProtocolError(
                    f"a chunk has rows on different paths of more than {RECENT_ROWS} rows that are not known to be text"
                )
        for row in rows:
            self._append(row)
        moves, self._moves = tuple(self._moves), []
        return Placement(moves, first, np.array(self._depths[first:], np.int64), self._recent_slots(first))

    def drop(self, dropped: Collection[int]) -> None:
        """Free the slots of ``dropped`` rows (those that have one) and close the gaps: the next placement has the
        moves.
        """
        gone = sorted(self._slot_of.pop(id) for id in dropped if id in self._slot_of)
        if not gone:
            return
        new_slot: dict[int, int] = {}
        target = gone[0]
        for here, following in zip(gone, [*gone[1:], len(self._ids)], strict=True):
            length = following - here - 1
            if length:
                self._moves.append(SlotMove(here + 1, target, length))
            for slot in range(here + 1, following):
                new_slot[slot] = target
                target += 1
        for slot, moved in new_slot.items():
            id, parent_slot = self._ids[slot], self._parent_slots[slot]
            self._ids[moved], self._depths[moved] = id, self._depths[slot]
            self._parent_slots[moved] = new_slot.get(parent_slot, parent_slot)
            self._slot_of[id] = moved
        for slot in range(self._num_spine, gone[0]):  # where paths were exchanged, a row may be in front of its parent
            self._parent_slots[slot] = new_slot.get(self._parent_slots[slot], self._parent_slots[slot])
        del self._ids[target:], self._parent_slots[target:], self._depths[target:]
        self._num_spine = min(self._num_spine, gone[0])
        self._extend_spine()

    def keep(self, ids: Sequence[int]) -> tuple[SlotMove, ...]:
        """Drop all rows but ``ids``, a path from the first row on. The moves bring it to the slots of its positions."""
        if ids:
            self._line_up(self._slot_of[ids[-1]])
        self.drop(self._slot_of.keys() - {*ids})
        moves, self._moves = tuple(self._moves), []
        return moves

    def check(self) -> None:
        """Assert the invariants: slots and ids agree, and the spine is the longest path from slot 0 on."""
        assert len(self._ids) == len(self._parent_slots) == len(self._depths) == len(self._slot_of)
        for id, slot in self._slot_of.items():
            assert self._ids[slot] == id
            parent = self._parent_slots[slot]
            assert self._depths[slot] == (0 if parent == NO_SLOT else self._depths[parent] + 1)
        assert all(self._parent_slots[slot] == slot - 1 for slot in range(self._num_spine))
        assert self._num_spine == len(self._ids) or self._parent_slots[self._num_spine] != self._num_spine - 1

    # ------------------------------------------------------------------ inside

    def _append(self, row: Row) -> None:
        parent = NO_SLOT if row.parent == NO_PARENT else self._slot_of[row.parent]
        self._slot_of[row.id] = len(self._ids)
        self._ids.append(row.id)
        self._parent_slots.append(parent)
        self._depths.append(0 if parent == NO_SLOT else self._depths[parent] + 1)
        self._extend_spine()

    def _extend_spine(self) -> None:
        while self._num_spine < len(self._ids) and self._parent_slots[self._num_spine] == self._num_spine - 1:
            self._num_spine += 1

    def _beside_spine(self, slot: int) -> list[int]:
        """The slots of the path to ``slot`` that are not on the spine, in order of depth."""
        path: list[int] = []
        while slot >= self._num_spine:
            path.append(slot)
            slot = self._parent_slots[slot]
        return path[::-1]

    def _first_astray(self, rows: Sequence[Row]) -> int | None:
        """The slot of the last held ancestor of a row that would have an older ancestor off the spine, if one would."""
        above: dict[int, tuple[int, int]] = {}  # by new row: the held row above it, and rows from the spine to it
        num_spine = self._num_spine
        tip = NO_PARENT if not num_spine else self._ids[num_spine - 1]
        for slot, row in enumerate(rows, len(self._ids)):
            if row.parent in above:
                held, beside = above[row.parent]
            else:
                held = self._slot_of.get(row.parent, NO_SLOT)
                beside = len(self._beside_spine(held))
            if row.parent == tip and slot == num_spine:  # it goes on behind the spine
                num_spine, tip, beside = num_spine + 1, row.id, -1
            above[row.id] = held, beside + 1
            if beside + 1 > RECENT_ROWS:
                return held
        return None

    def _line_up(self, slot: int) -> None:
        """Move the path to ``slot`` onto the spine. What was in its place takes the place that it leaves."""
        path = [self._ids[beside] for beside in self._beside_spine(slot)]
        if not path:
            return
        first = self._depths[self._slot_of[path[0]]]
        for id in path:
            held = self._slot_of[id]
            self._exchange(self._depths[held], held, first)
        self._num_spine = first
        self._extend_spine()

    def _exchange(self, one: int, other: int, first: int) -> None:
        """Exchange two slots. Rows in front of slot ``first`` are above both, so only those behind it refer to them."""
        if one == other:
            return
        spare = len(self._ids)
        self._moves += [SlotMove(one, spare, 1), SlotMove(other, one, 1), SlotMove(spare, other, 1)]
        for listed in (self._ids, self._parent_slots, self._depths):
            listed[one], listed[other] = listed[other], listed[one]
        self._slot_of[self._ids[one]], self._slot_of[self._ids[other]] = one, other
        places = {one: other, other: one}
        self._parent_slots[first:] = [places.get(parent, parent) for parent in self._parent_slots[first:]]

    def _recent_slots(self, first: int) -> NDArray[np.int64]:
        """For each row from slot ``first`` on, the slots of the last RECENT_ROWS of its path: [rows, RECENT_ROWS]."""
        recent = np.empty((len(self._ids) - first, RECENT_ROWS), np.int64)
        for slot in range(first, len(self._ids)):
            row, parent = recent[slot - first], self._parent_slots[slot]
            if parent >= first:
                row[:-1] = recent[parent - first, 1:]
            else:
                beside = self._beside_spine(parent)[-(RECENT_ROWS - 1) :]
                last = self._parent_slots[beside[0]] if beside else parent
                row[-1 - len(beside) : -1] = beside
                row[: -1 - len(beside)] = np.arange(last + 2 + len(beside) - RECENT_ROWS, last + 1)
            row[-1] = slot
        return np.maximum(recent, 0)
