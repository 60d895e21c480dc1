"""What the head works on: returned rows until the token after them is drawn, and that token until the walk takes it.

Only the root and rows below it are kept. The walk has passed the others, or they are dead.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from flowspec_edge.config import TokenLogprobs
from flowspec_edge.core.events import HeadFinished
from flowspec_edge.core.rows import Hidden, Row
from flowspec_edge.core.speculation.tree import Tree


class HeadFeed:
    """The returned rows of one session. In all methods ``root`` is the draft id of the root."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._returned: deque[tuple[tuple[Row, ...], Hidden]] = deque()  # chunks that wait for the head
        self._running: tuple[Row, ...] = ()  # what the running head works on
        self._drawn: dict[int, int] = {}  # per row, the token after it
        self._logprobs: dict[int, TokenLogprobs] = {}  # per row, those of that token, where they are asked for
        self._forced: dict[int, tuple[int, ...]] = {}  # per row, what must come behind that token by the grammar

    @property
    def is_busy(self) -> bool:
        """Whether returned rows wait for the head or are with it."""
        return bool(self._returned or self._running)

    def take_returned(self, rows: tuple[Row, ...], hidden: Hidden, root: int) -> None:
        """A chunk came back, with its hidden rows [rows, hidden_size]."""
        self._returned.append((rows, hidden))
        self._drop_returned(root)

    def next_rows(self, root: int) -> tuple[tuple[Row, ...], Hidden] | None:
        """All that waits, for the head to run now, and its hidden rows [rows, hidden_size]; None where nothing does."""
        rows: list[Row] = []
        hidden: list[Hidden] = []
        while self._returned:
            returned, values = self._returned.popleft()
            kept = [index for index, row in enumerate(returned) if self._is_open(row.id, root)]
            rows += [returned[index] for index in kept]
            hidden += [values[kept]]
        if not rows:
            return None
        self._running = tuple(rows)
        return self._running, np.concatenate(hidden)

    def take_drawn(self, head: HeadFinished) -> int:
        """The head has finished, with the token after each row that it ran over. Returns the number of these rows."""
        rows, self._running = self._running, ()
        self._drawn.update((row.id, token) for row, token in zip(rows, head.tokens, strict=True) if token is not None)
        if head.logprobs:
            told = zip(rows, head.logprobs, strict=True)
            self._logprobs.update((row.id, logprobs) for row, logprobs in told if logprobs is not None)
        self._forced.update((row.id, tokens) for row, tokens in zip(rows, head.forced, strict=False) if tokens)
        return len(rows)

    def drawn_after(self, id: int) -> int | None:
        """The token after a row; None where it is not drawn yet."""
        return self._drawn.get(id)

    def logprobs_after(self, id: int) -> TokenLogprobs:
        """Those of the token after a row. They were asked for, and it is drawn."""
        return self._logprobs[id]

    def forced_after(self, id: int) -> tuple[int, ...]:
        """What must come behind the token after a row, as far as that is known."""
        return self._forced.get(id, ())

    def prune(self, root: int) -> None:
        """Rows died, and the root has moved: forget what the walk cannot reach any more."""
        for id in [id for id in self._drawn if not self._is_open(id, root)]:
            del self._drawn[id]
            self._logprobs.pop(id, None)
            self._forced.pop(id, None)
        self._drop_returned(root)

    def _drop_returned(self, root: int) -> None:
        self._returned = deque(
            (rows, hidden) for rows, hidden in self._returned if any(self._is_open(row.id, root) for row in rows)
        )

    def _is_open(self, id: int, root: int) -> bool:
        """Whether the row lives and is the root or below it."""
        row = self._tree.get(id)
        return row is not None and row.depth >= self._tree[root].depth
