"""Takes the prompt of one session into the tree, piece by piece, as it leaves.

To take in 200,000 tokens at once takes half a second (x86), in which nothing else could happen.
"""

from __future__ import annotations

from flowspec_edge.core.rows import NO_PARENT, Row
from flowspec_edge.core.speculation.lookup import Lookup
from flowspec_edge.core.speculation.tree import Tree


class PromptFeed:
    """The rows of the prompt, whose draft ids are their positions."""

    def __init__(self, prompt: tuple[int, ...], tree: Tree, lookup: Lookup | None) -> None:
        self._prompt = prompt
        self._tree = tree
        self._lookup = lookup
        self._num_left = 0
        self.num_rows = len(prompt)
        """How many rows there are to leave."""

    def begin(self, num_rows: int) -> None:
        """The first rows are at the stages already, and do not leave. They are in tree and lookup now."""
        tokens = self._prompt[:num_rows]
        self._num_left = num_rows
        self.num_rows -= num_rows
        self._tree.begin(tokens)
        if self._lookup is not None:
            self._lookup.extend(tokens)

    @property
    def is_done(self) -> bool:
        """Whether all rows have left."""
        return self._num_left == len(self._prompt)

    @property
    def progress(self) -> tuple[int, int]:
        """How many rows have left, and how many there are. The ring has no more of them than its credit allows."""
        return self._num_left, len(self._prompt)

    def num_next(self, most: int) -> int:
        """How many rows leave next, where at most so many may."""
        return min(len(self._prompt) - self._num_left, most)

    def next_rows(self, num_rows: int) -> tuple[Row, ...]:
        """The next rows, which are about to leave; they are in tree and lookup now."""
        first = self._num_left
        tokens = self._prompt[first : first + num_rows]
        self._num_left += len(tokens)
        rows = tuple(Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(tokens, first))
        for row in rows:
            self._tree.add(row)
        if self._lookup is not None:
            self._lookup.extend(tokens)
        return rows
