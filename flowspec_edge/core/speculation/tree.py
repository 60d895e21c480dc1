"""The token tree: rows named by draft id, pruned by ``Advance``, the same at every stage in any order of messages.

Every token of a session, prompt included, is a row ``(id, parent, token)``. ``Advance(at, to)`` says that the token
after row ``at`` is ``to``. From this alone each stage knows what lives:

* the ancestors of ``at``, and ``at`` itself, are committed, and each committed row remembers its next token;
* a row lives if its parent lives and, where the parent is committed, it is the parent's next token;
* an Advance whose ``at`` has not arrived waits for it; an Advance applied twice changes nothing.

So chunks and Advances commute: any interleaving that keeps parents before children ends in the same tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct, field

from flowspec_edge.core.limits import MAX_WAITING_ADVANCES
from flowspec_edge.core.rows import NO_PARENT, Advance, Row
from flowspec_edge.errors import ProtocolError


class TreeRow(Struct, gc=False):
    """A living row. ``next_token`` is set once, when the row is committed and its successor is known.

    Rows are in no reference cycle, and the garbage collector does not look through them, of which a long text has
    200,000.
    """

    id: int
    parent: int
    token: int
    depth: int
    next_token: int | None = None
    children: dict[int, int] = field(default_factory=dict)  # token -> draft id

    @property
    def is_committed(self) -> bool:
        return self.next_token is not None


class Tree:
    """The living rows of one session, ``rows`` to begin with.

    Those with draft ids below ``num_prompt`` are a chain that is verified: each is committed as soon as the next one is
    here. Otherwise the first Advance would have to go through all of them.
    """

    def __init__(self, rows: Iterable[Row] = (), *, num_prompt: int = 0) -> None:
        self._num_prompt = num_prompt
        self._rows: dict[int, TreeRow] = {}
        self._waiting: dict[int, int] = {}  # Advances by the row that has not arrived
        self._first: int | None = None
        self._dropped: list[int] = []
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, id: int) -> bool:
        return id in self._rows

    def __getitem__(self, id: int) -> TreeRow:
        return self._rows[id]

    def __iter__(self) -> Iterator[TreeRow]:
        return iter(self._rows.values())

    def get(self, id: int) -> TreeRow | None:
        return self._rows.get(id)

    def add(self, row: Row) -> bool:
        """Take a row in; False where it is dead on arrival, or here already.

        Raises:
            ProtocolError: a second first row, two rows of one parent with one token, two rows of one draft id, or a
                row that is numbered before its parent.
        """
        id, parent, token = row
        known = self._rows.get(id)
        if known is not None:
            if (known.parent, known.token) != (parent, token):
                raise ProtocolError(f"row {id} came twice, with different parents or tokens")
            return False
        if id >= NO_PARENT or (parent >= id and parent != NO_PARENT):
            raise ProtocolError(f"row {id} has the parent {parent}; draft ids count up from parents to children")
        if parent == NO_PARENT:
            if self._first is not None:
                raise ProtocolError(f"row {id} claims to be first, but the session began with row {self._first}")
            self._first = id
            depth = 0
        else:
            above = self._rows.get(parent)
            if above is None or (above.next_token is not None and above.next_token != token):
                return False
            if token in above.children:
                raise ProtocolError(f"rows {above.children[token]} and {id} are both token {token} after row {parent}")
            above.children[token] = id
            depth = above.depth + 1
        self._rows[id] = TreeRow(id, parent, token, depth)
        if id < self._num_prompt and parent != NO_PARENT:
            self._commit_to(self._rows[parent], token)
        if self._waiting and id in self._waiting:
            self.advance(Advance(id, self._waiting.pop(id)))
        return True

    def grow(
        self, ids: Sequence[int], parents: Sequence[int], tokens: Sequence[int], depths: Iterable[int]
    ) -> list[TreeRow]:
        """Take in new rows below living ones that are not committed: ``add`` without its checks, for own drafts."""
        known, rows = self._rows, list(map(TreeRow, ids, parents, tokens, depths))
        known.update(zip(ids, rows, strict=True))
        for id, parent, token in zip(ids, parents, tokens, strict=True):
            known[parent].children[token] = id
        return rows

    def begin(self, tokens: Sequence[int]) -> None:
        """Take in the first rows of the prompt, whose draft ids are their positions, while there are no others.

        It is ``add`` for each of them, in a fifth of the time.
        """
        last = len(tokens) - 1
        assert not self._rows and len(tokens) <= self._num_prompt, "it begins with rows of its prompt"
        self._rows = {
            id: TreeRow(id, id - 1, token, id, tokens[id + 1], {tokens[id + 1]: id + 1})
            for id, token in enumerate(tokens[:last])
        }
        self._rows[last] = TreeRow(last, last - 1, tokens[last], last)
        self._rows[0].parent = NO_PARENT
        self._first = 0

    def advance(self, advance: Advance) -> None:
        """Commit ``at`` and its ancestors, and drop every row that no longer lives.

        Raises:
            ProtocolError: the Advance contradicts an earlier one, or too many wait for rows that never came.
        """
        row = self._rows.get(advance.at)
        token = advance.to
        if row is None:
            if self._waiting.setdefault(advance.at, token) != token:
                raise ProtocolError(f"row {advance.at} is advanced to {self._waiting[advance.at]} and to {token}")
            if len(self._waiting) > MAX_WAITING_ADVANCES:
                raise ProtocolError(f"{len(self._waiting)} Advances wait for rows that never came")
            return
        while not row.is_committed:
            row.next_token = token
            next_id = row.children.pop(token, None)
            self._drop(row.children.values())
            row.children = {} if next_id is None else {token: next_id}
            if row.parent == NO_PARENT:
                return
            row, token = self._rows[row.parent], row.token
        if row.next_token != token:
            raise ProtocolError(f"row {row.id} is advanced to {row.next_token} and to {token}")

    def _commit_to(self, row: TreeRow, token: int) -> None:
        """``advance`` in a fifth of the time, where the row above is committed already and nothing dies."""
        above = self._rows.get(row.parent)
        if row.next_token is None and len(row.children) == 1 and (above is None or above.is_committed):
            row.next_token = token
        else:
            self.advance(Advance(row.id, token))

    def take_dropped(self) -> list[int]:
        """The draft ids of the rows dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def committed(self) -> list[TreeRow]:
        """The committed rows, in the order of the text."""
        rows = []
        row = None if self._first is None else self._rows.get(self._first)
        while row is not None and row.next_token is not None:
            rows.append(row)
            row = self._rows.get(row.children.get(row.next_token, NO_PARENT))
        return rows

    def path(self, id: int) -> list[TreeRow]:
        """The rows from the session's first to ``id``, both included."""
        rows = []
        row = self._rows[id]
        while True:
            rows.append(row)
            if row.parent == NO_PARENT:
                return rows[::-1]
            row = self._rows[row.parent]

    def descendants(self, id: int) -> Iterator[TreeRow]:
        """The living rows under ``id``, parents before children, without ``id`` itself."""
        pending = list(self._rows[id].children.values())
        while pending:
            row = self._rows[pending.pop()]
            yield row
            pending.extend(row.children.values())

    def check(self) -> None:
        """Assert the invariants: parents live and are shallower, links are mutual, committed rows form one chain."""
        for row in self._rows.values():
            for token, child in row.children.items():
                assert self._rows[child].token == token and self._rows[child].parent == row.id
            if row.is_committed:
                assert set(row.children) <= {row.next_token}, f"row {row.id} keeps children that cannot live"
            if row.parent != NO_PARENT:
                parent = self._rows[row.parent]
                assert parent.depth + 1 == row.depth
                assert parent.children[row.token] == row.id
                assert parent.is_committed or not row.is_committed, f"row {row.id} is committed under an open parent"

    def _drop(self, ids: Iterable[int]) -> None:
        """Drop these rows and all below them."""
        dropped, rows = list(ids), self._rows
        for id in dropped:  # which grows meanwhile
            if children := rows.pop(id).children:  # most rows have none
                dropped += children.values()
        self._dropped += dropped
