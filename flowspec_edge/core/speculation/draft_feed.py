"""Prepares the input of one session's drafter: verified pairs, drafted rows, and which rows have died.

A verified pair is a row of the text and the target's hidden row of its parent. The drafter takes each pair once, in the
order of the text, from the second row of the prompt to the root. Most drafters take the hidden row that comes back
around the ring, behind the final norm. A drafter that taps layers takes the rows that enter these layers instead. They
come straight from the stages that own the layers, in any order, and a pair is ready when all of its rows are here.

The drafter takes the pairs of a prompt while that is under way. So it is nearly done with them when the first token is
known, and the hidden rows of 100,000 tokens, which do not fit into the memory of a board, never wait for it together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from flowspec_edge.config import GenerateOptions, Grammar
from flowspec_edge.core.events import RunDraft
from flowspec_edge.core.rows import Floats, Paths, Row
from flowspec_edge.core.speculation.kept_sessions import EndedText
from flowspec_edge.core.speculation.text_paths import TextPaths
from flowspec_edge.core.speculation.tree import Tree, TreeRow
from flowspec_edge.errors import ProtocolError


class DraftFeed:
    """The drafter's input of one session. In all methods ``root`` is the draft id of the root.

    Args:
        num_prompt: rows of the prompt. Nothing is drafted before the first token after them is known.
        taps: the layers that the drafter taps; none where it wants the hidden rows that come back.
        paths: those of the session's rows, where its options look back.
        ranked_by: the options by which its proposals are ranked, where the noise of the draw counts for that.
        grammar: that of its options.
        is_on: whether the session uses its drafter; if not, nothing is kept for it.
    """

    def __init__(
        self,
        session: int,
        tree: Tree,
        num_prompt: int,
        taps: tuple[int, ...],
        paths: TextPaths | None = None,
        ranked_by: GenerateOptions | None = None,
        grammar: Grammar | None = None,
        *,
        is_on: bool,
    ) -> None:
        self._session = session
        self._tree = tree
        self._num_prompt = num_prompt
        self._taps = taps if is_on else ()
        self._ranked_by = ranked_by
        self._grammar = grammar
        self._paths = None if ranked_by is None and grammar is None else paths
        self.is_on = is_on
        self._hidden: dict[int, Floats] = {}  # per row, until the drafter has taken it
        self._tapped: dict[int, dict[int, Floats]] = {}  # per verified row, by layer, until all layers have come
        self._num_extended = 0  # how many verified pairs the drafter has taken
        self._dropped: list[int] = []  # rows that died and that the drafter has not been told of
        self._running: list[int] = []  # the rows of the running pass whose children it drafts
        self._num_running = 0  # all rows of the running pass

    # ------------------------------------------------------------------ a session before, and one behind

    def begin(self, text: EndedText, num_rows: int) -> None:
        """The first rows are those of an ended session, and so are the drafter's; its pairs are taken already."""
        if self.is_on:
            assert num_rows <= text.num_pairs, "it goes on with the next pair"
            self._num_extended = min(text.num_taken, num_rows)
            self._hidden = dict(itertools.islice(enumerate(text.hidden, text.num_taken), num_rows - self._num_extended))

    def end(self, rows: Sequence[TreeRow]) -> EndedText:
        """What there is of a session that ends with these verified rows, its first ones, for another one."""
        ids = [row.id for row in rows[self._num_extended :]] if self.is_on else []
        hidden = tuple(self._hidden[id].copy() for id in itertools.takewhile(self._hidden.__contains__, ids))
        return EndedText(tuple(row.token for row in rows), self._num_extended, hidden)

    # ------------------------------------------------------------------ what comes in

    def take_returned(self, rows: tuple[Row, ...], hidden: Floats) -> None:
        """Hidden rows [rows, hidden_size] came back around the ring."""
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
        for id in self._hidden.keys() & dropped:
            del self._hidden[id]
        if self.is_on:
            self._dropped += dropped

    # ------------------------------------------------------------------ what goes out

    @property
    def wants_returned(self) -> bool:
        """Whether hidden rows of the whole prompt must come back around the ring."""
        return self.is_on and not self._taps

    @property
    def is_tapped(self) -> bool:
        """Whether stages send hidden rows of tapped layers."""
        return bool(self._taps)

    @property
    def is_running(self) -> bool:
        """Whether a pass of the drafter is under way."""
        return self._num_running > 0

    def may_draft(self, root: int) -> bool:
        """Whether anything may be drafted below the root: not before the first token after the prompt is known."""
        return self.is_on and root >= self._num_prompt

    def num_unextended(self, root: int) -> int:
        """How many verified pairs the drafter can take and has not taken yet."""
        if not self.is_on or self.is_awaiting_tapped(root):
            return 0
        return self._tree[root].depth - self._num_extended

    def is_awaiting_tapped(self, root: int) -> bool:
        """Whether the next verified pairs wait for tapped rows that have not come."""
        if not self._taps or root < self._num_prompt or self._tree[root].depth == self._num_extended:
            return False
        return any(self._tree[id].parent not in self._hidden for id in self._unextended(root))

    def next_of_prompt(self, least: int, most: int) -> RunDraft | None:
        """Begin a pass over the next pairs of the prompt alone, ``most`` at most, where ``least`` or more are here.

        What the drafter proposes after them is of no use.
        """
        first = self._num_extended  # a prompt's draft ids are its positions
        if len(self._hidden) < least or first >= self._num_prompt - 1:
            return None
        rows = range(first + 1, min(first + most, self._num_prompt - 1) + 1)
        here = list(itertools.takewhile(lambda id: id - 1 in self._hidden and id in self._tree, rows))
        return self._begin(here, []) if len(here) >= least else None

    def next_pass(self, root: int, drafted: Sequence[int]) -> RunDraft:
        """Begin a pass over all verified pairs that can be taken, and over the ``drafted`` rows.

        Raises:
            ProtocolError: rows have come back, and others that left before them have not.
        """
        verified = self._unextended(root) if self.num_unextended(root) else []
        rows = [id for id in drafted if id != root]
        self._running = [*verified[-1:], *rows]
        paths = None if self._paths is None else self._paths.to(self._running, root)
        return self._begin(verified, rows, self._ranked_by, paths, self._grammar)

    def _begin(
        self,
        verified: list[int],
        drafted: list[int],
        ranked_by: GenerateOptions | None = None,
        paths: Paths | None = None,
        grammar: Grammar | None = None,
    ) -> RunDraft:
        rows = [self._tree[id] for id in (*verified, *drafted)]
        assert rows, "a pass over nothing"
        parents = [self._tree[id].parent for id in verified]
        if missing := [id for id in parents if id not in self._hidden]:
            raise ProtocolError(
                f"session {self._session}: row {missing[0]} has not come back, though rows have that left after it"
            )
        hidden = [self._hidden.pop(id) for id in parents]
        self._num_extended += len(verified)
        self._num_running = len(rows)
        dropped, self._dropped = tuple(self._dropped), []
        return RunDraft(
            self._session,
            tuple([Row(row.id, row.parent, row.token) for row in rows]),
            np.array([row.depth - 1 for row in rows], np.int64),
            np.stack(hidden) if hidden else np.zeros((0, 0), np.float32),
            dropped,
            ranked_by,
            paths,
            grammar,
        )

    def take_finished(self) -> tuple[list[int], int]:
        """The pass has finished. Returns the rows whose children it drafted, and how many rows it ran over."""
        parents, self._running = self._running, []
        num_rows, self._num_running = self._num_running, 0
        return parents, num_rows

    def _unextended(self, root: int) -> list[int]:
        """Draft ids of the verified rows that the drafter has not taken, in the order of the text."""
        path = []
        row = self._tree[root]
        while row.depth > self._num_extended:
            path.append(row.id)
            row = self._tree[row.parent]
        return path[::-1]
