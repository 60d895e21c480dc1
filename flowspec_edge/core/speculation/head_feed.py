"""What the head works on: returned rows until they have logits, and logits until the walk has used them.

Only the root and rows below it are kept. The walk has passed the others, or they are dead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from flowspec_edge.core.rows import Floats, Row
from flowspec_edge.core.speculation.tree import Tree


class HeadFeed:
    """The returned rows of one session. In all methods ``root`` is the draft id of the root."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._returned: deque[tuple[tuple[Row, ...], Floats]] = deque()  # chunks that wait for the head
        self._running: list[Row] = []  # what the running head works on
        self._logits: dict[int, Floats] = {}

    @property
    def is_busy(self) -> bool:
        """Whether returned rows wait for the head or are with it."""
        return bool(self._returned or self._running)

    def take_returned(self, rows: tuple[Row, ...], hidden: Floats, root: int) -> None:
        """A chunk came back, with its hidden rows [rows, hidden_size]."""
        self._returned.append((rows, hidden))
        self._drop_returned(root)

    def next_rows(self, root: int) -> Floats | None:
        """The hidden rows [rows, hidden_size] of all that waits, for the head to run now; None where nothing waits."""
        rows: list[Row] = []
        hidden: list[Floats] = []
        while self._returned:
            returned, values = self._returned.popleft()
            kept = [index for index, row in enumerate(returned) if self._is_open(row.id, root)]
            rows += [returned[index] for index in kept]
            hidden += [values[kept]]
        if not rows:
            return None
        self._running = rows
        return np.concatenate(hidden)

    def take_logits(self, logits: Floats) -> int:
        """The head has finished: logits [rows, vocab_size] of what it ran over. Returns the number of these rows."""
        rows, self._running = self._running, []
        self._logits.update((row.id, logits[index]) for index, row in enumerate(rows))
        return len(rows)

    def logits_of(self, id: int) -> Floats | None:
        """A row's logits [vocab_size]; None where they are not here."""
        return self._logits.get(id)

    def prune(self, dropped: Iterable[int], root: int) -> None:
        """Rows died, and the root has moved: forget what the walk cannot reach any more."""
        for id in dropped:
            self._logits.pop(id, None)
        for id in [id for id in self._logits if not self._is_open(id, root)]:
            del self._logits[id]
        self._drop_returned(root)

    def _drop_returned(self, root: int) -> None:
        self._returned = deque(
            (rows, hidden) for rows, hidden in self._returned if any(self._is_open(row.id, root) for row in rows)
        )

    def _is_open(self, id: int, root: int) -> bool:
        """Whether the row lives and is the root or below it."""
        row = self._tree.get(id)
        return row is not None and row.depth >= self._tree[root].depth
