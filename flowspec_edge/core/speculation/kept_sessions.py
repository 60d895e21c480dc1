"""Ended sessions whose rows stay at the stages and in the drafter, for a prompt that begins like one of their texts.

Such a prompt takes one of them over: of its rows those stay that both have in common, and the others are computed. The
rows have the bits that the prompt's own would have, for these do not depend on the chunk that a row was computed in.

A session belongs to the owner of its text. Others' prompts do not learn of it, not even by the time that they take.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from flowspec_edge.core.limits import MAX_KEPT_SESSIONS, SLOTS_PER_STEP
from flowspec_edge.core.rows import Floats
from flowspec_edge.core.speculation.radix_tree import RadixTree

MIN_ROWS = 32
"""Fewer are computed about as soon as they are found: a forward over so many takes little longer than over one."""
MIN_SHARE = 0.5
"""Of a kept session's rows that a prompt must have in common with it. Who takes it over loses the others, and whoever
goes on with a long text needs them."""
KEEP_S = 900.0
"""How long: a quarter of an hour is longer than most people think about their next question."""


@dataclass(frozen=True, slots=True, eq=False)
class EndedText:
    """What there is of a session that has ended. At each stage are rows of all ``tokens``.

    The drafter has taken the first ``num_taken`` pairs. ``hidden`` has the rows with which it can take the next ones.
    """

    tokens: tuple[int, ...]
    num_taken: int = 0
    hidden: tuple[Floats, ...] = ()

    @property
    def num_pairs(self) -> int:
        """Those that the drafter has taken, or can take."""
        return self.num_taken + len(self.hidden)


class Reuse(NamedTuple):
    """A kept session that is taken over, and how many of its rows."""

    session: int
    num_rows: int
    text: EndedText


class _Kept(NamedTuple):
    owner: str
    text: EndedText
    until: float

    @property
    def num_slots(self) -> int:
        """Slots of its cache: those of its rows, and of the drafts that were behind them."""
        return -(-len(self.text.tokens) // SLOTS_PER_STEP) * SLOTS_PER_STEP + SLOTS_PER_STEP


class KeptSessions:
    """The kept sessions of one ring, with ``max_slots`` slots of their caches together; where that is 0, none is kept.

    Each method that may let go of sessions returns them, and the stages are to be told.
    """

    def __init__(self, max_slots: int) -> None:
        self._max_slots = max_slots
        self._kept: dict[int, _Kept] = {}  # the oldest first
        self._trees: dict[str, RadixTree] = {}  # by owner

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_slots(self) -> int:
        """The slots of all of them."""
        return sum(kept.num_slots for kept in self._kept.values())

    @property
    def is_on(self) -> bool:
        """Whether sessions are kept at all."""
        return self._max_slots > 0

    def keep(self, session: int, owner: str, text: EndedText, now: float) -> list[int]:
        """Keep a session that ends, and let go of those that it stands for: their texts are beginnings of its own.

        The oldest make room. The session itself is let go of where there is none for it.
        """
        new = _Kept(owner, text, now + KEEP_S)
        if len(text.tokens) < MIN_ROWS or new.num_slots > self._max_slots:
            return [session]
        alike = self._common(owner, text.tokens)
        gone = [other for other, num_common in alike if num_common == len(self._kept[other].text.tokens)]
        for other in gone:
            self._remove(other)
        while len(self._kept) >= MAX_KEPT_SESSIONS or self.num_slots + new.num_slots > self._max_slots:
            gone.append(oldest := next(iter(self._kept)))
            self._remove(oldest)
        self._kept[session] = new
        self._trees.setdefault(owner, RadixTree()).add(session, text.tokens)
        return gone

    def take(self, owner: str, prompt: tuple[int, ...], *, has_drafts: bool) -> Reuse | None:
        """The session with the most rows for a prompt of that owner, which is kept no longer; None where none has
        enough.

        The last row in common is computed in any case. The next token is drawn from it where the prompt ends there, and
        else it makes a pair of the drafter's with a token that the texts do not have in common.
        """
        best: Reuse | None = None
        for session, num_common in self._common(owner, prompt):
            text = self._kept[session].text
            num_rows = min(num_common - 1, text.num_pairs) if has_drafts else num_common - 1
            if num_rows >= max(MIN_ROWS, MIN_SHARE * len(text.tokens), best.num_rows + 1 if best else 0):
                best = Reuse(session, num_rows, text)
        if best is not None:
            self._remove(best.session)
        return best

    def expire(self, now: float) -> list[int]:
        """Let go of those that have been kept for long enough."""
        gone = [session for session, kept in self._kept.items() if kept.until <= now]
        for session in gone:
            self._remove(session)
        return gone

    def next_deadline(self) -> float | None:
        """When ``expire`` has something to do."""
        return next((kept.until for kept in self._kept.values()), None)

    def stop(self) -> None:
        """The stages are gone, and with them all that they kept."""
        self._max_slots, self._kept, self._trees = 0, {}, {}

    def check(self) -> None:
        """Assert the invariants: all are in their owners' trees, within the limits."""
        for tree in self._trees.values():
            tree.check()
        assert sum(map(len, self._trees.values())) == len(self._kept) <= MAX_KEPT_SESSIONS
        assert self.num_slots <= self._max_slots

    def _common(self, owner: str, tokens: tuple[int, ...]) -> Iterable[tuple[int, int]]:
        """The owner's sessions; see ``RadixTree.common``."""
        return self._trees[owner].common(tokens) if owner in self._trees else ()

    def _remove(self, session: int) -> None:
        owner = self._kept.pop(session).owner
        self._trees[owner].remove(session)
        if not len(self._trees[owner]):
            del self._trees[owner]
