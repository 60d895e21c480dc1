"""The tokens before each row, for options under which a draw depends on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from flowspec_edge.core.rows import Paths
from flowspec_edge.core.speculation.tree import Tree


class TextPaths:
    """The text of one session as an array that grows.

    Args:
        prompt: what the session begins with. Its last ``num_written`` tokens are text that was written elsewhere.
        num_left: how many tokens may be written.
    """

    def __init__(self, tree: Tree, prompt: Sequence[int], num_written: int, num_left: int) -> None:
        self._tree = tree
        self._num_prompt = len(prompt) - num_written
        self._tokens = np.empty(len(prompt) + num_left, np.int64)
        self._tokens[: len(prompt)] = prompt
        self._num_tokens = len(prompt)

    def append(self, token: int) -> None:
        """The text goes on. Paths that were given before stay as they are."""
        self._tokens[self._num_tokens] = token
        self._num_tokens += 1

    def to(self, ids: Iterable[int], root: int) -> Paths:
        """The paths to these rows, each of which is the root or below it."""
        depth = self._tree[root].depth
        return Paths(self._num_prompt, self._tokens[:depth], tuple(self._below(id, depth) for id in ids))

    def _below(self, id: int, depth: int) -> tuple[int, ...]:
        """The tokens from the root, which is at that depth, to the row."""
        row = self._tree[id]
        tokens = [row.token]
        while row.depth > depth:
            row = self._tree[row.parent]
            tokens.append(row.token)
        return tuple(reversed(tokens))
