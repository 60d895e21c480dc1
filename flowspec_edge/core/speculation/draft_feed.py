"""What one session's drafter is fed with: verified pairs, drafted rows, and the news of dead ones.

A verified pair is a row of the text and the hidden row of its parent. The drafter takes each of them once, in the order
of the text, from the second row of the prompt to the root. Its hidden row is the normed one that comes back around the
ring or, where the drafter taps layers, the rows that enter them: these come straight from the stages that own the
layers, in any order, and the drafter waits until all of them are here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowspec_edge.core.events import RunDraft
from flowspec_edge.core.rows import Floats, Row
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.errors import ProtocolError


class DraftFeed:
    """The drafter's input of one session. ``root`` is the draft id of the root, each time.

    Args:
        num_prompt: rows of the prompt. Nothing is drafted before the first token after them is known.
        taps: the layers whose hidden rows the drafter wants; none where it wants the normed ones.
        is_on: whether the drafter is to work at all; if not, nothing is kept for it.
    """

    def __init__(self, session: int, tree: Tree, num_prompt: int, taps: tuple[int, ...], *, is_on: bool) -> None:
        self._session = session
        self._tree = tree
        self._num_prompt = num_prompt
        self._taps = taps if is_on else ()
        self._is_on = is_on
        self._hidden: dict[int, Floats] = {}  # per row, until the drafter has taken it
        self._tapped: dict[int, dict[int, Floats]] = {}  # per verified row, by layer, until all layers have come
        self._num_extended = 0  # how many verified pairs the drafter has taken
        self._undrafted: list[int] = []  # rows that died and that the drafter has not been told of
        self._running: list[int] = []  # the rows of the running pass whose children it drafts
        self._num_running = 0  # all rows of the running pass

    # ------------------------------------------------------------------ what comes in

    def take_returned(self, rows: tuple[Row, ...], hidden: Floats) -> None:
        """Normed hidden rows came back around the ring, [rows, hidden_size]."""
        if self.wants_returned:
            self._hidden.update((row.id, hidden[index]) for index, row in enumerate(rows) if row.id in self._tree)

    def take_tapped(self, layer: int, ids: tuple[int, ...], hidden: Floats) -> None:
        """Hidden rows [ids, hidden_size] came from the stage that owns a tapped layer.

        Raises:
            ProtocolError: nobody asked for them, or one came twice.
        """
        for id, values in zip(ids, hidden, strict=True):
            rows = self._tapped.setdefault(id, {})
            if layer not in self._taps or layer in rows or id not in self._tree or id in self._hidden:
                raise ProtocolError(f"session {self._session}: row {id} of layer {layer} came unasked, or twice")
            rows[layer] = values
            if len(rows) == len(self._taps):
                self._hidden[id] = np.concatenate([rows[tap] for tap in self._taps])
                del self._tapped[id]

    def forget(self, dropped: Sequence[int]) -> None:
        """These rows died. The next pass tells the drafter, once."""
        for id in dropped:
            self._hidden.pop(id, None)
        if self._is_on:
            self._undrafted += dropped

    # ------------------------------------------------------------------ what goes out

    @property
    def wants_returned(self) -> bool:
        """Whether hidden rows of the whole prompt must come back around the ring."""
        return self._is_on and not self._taps

    @property
    def is_tapped(self) -> bool:
        """Whether stages send hidden rows of tapped layers."""
        return bool(self._taps)

    @property
    def is_running(self) -> bool:
        """Whether a pass of the drafter is under way."""
        return bool(self._running)

    def may_draft(self, root: int) -> bool:
        """Whether there is anything to draft below."""
        return self._is_on and root >= self._num_prompt

    def num_unextended(self, root: int) -> int:
        """Verified pairs that the drafter has not taken yet, and can take."""
        if not self._is_on or self.is_awaiting_tapped(root):
            return 0
        return self._tree[root].depth - self._num_extended

    def is_awaiting_tapped(self, root: int) -> bool:
        """Whether the drafter cannot take the verified pairs before tapped rows are here that have not come."""
        if not self._taps or root < self._num_prompt or self._tree[root].depth == self._num_extended:
            return False
        return any(self._tree[id].parent not in self._hidden for id in self._unextended(root))

    def next_pass(self, root: int, drafted: Sequence[int]) -> RunDraft:
        """The pass over all verified pairs that can be taken, and over ``drafted`` rows; it runs now."""
        verified = self._unextended(root) if self.num_unextended(root) else []
        rows = [*verified, *(id for id in drafted if id != root)]
        assert rows, "a pass over nothing"
        hidden = [self._hidden.pop(self._tree[id].parent) for id in verified]
        self._num_extended += len(verified)
        self._running, self._num_running = rows[max(len(verified) - 1, 0) :], len(rows)
        dropped, self._undrafted = tuple(self._undrafted), []
        return RunDraft(
            self._session,
            tuple(Row(id, self._tree[id].parent, self._tree[id].token) for id in rows),
            np.array([self._tree[id].depth - 1 for id in rows], np.int64),
            np.stack(hidden) if hidden else np.zeros((0, 0), np.float32),
            dropped,
        )

    def take_finished(self) -> tuple[list[int], int]:
        """The pass has finished. Returns the rows whose children it drafted, and how many rows it ran over."""
        parents, self._running = self._running, []
        return parents, self._num_running

    def _unextended(self, root: int) -> list[int]:
        """Draft ids of the verified rows that the drafter has not taken, in the order of the text."""
        path = []
        row = self._tree[root]
        while row.depth > self._num_extended:
            path.append(row.id)
            row = self._tree[row.parent]
        return path[::-1]
