"""How the sessions of an origin share its ring: whose chunk leaves next.

All chunks go through all stages, in the order in which they leave. So what a session takes from the others is the time
that its chunks take of the slowest stage, and where that is shared fairly, each stage is. The origin knows who waits
with what, so it decides, and stages serve in the order of arrival.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from flowspec_edge.core.speculation.pipeline import RingCosts

CHUNKS_AHEAD = 2
"""By so many chunks of one row a session may be ahead of another one that has a chunk to send. So a new root can wait
for its first drafts while others send what is worth more, and nobody waits for longer."""
CHUNKS_BEHIND = 16
"""A session that had nothing to send for long catches up at most so many chunks of one row: others would stand still
for it."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A chunk that a session could send now.

    It has ``num_rows`` rows: ``ids`` are their draft ids, none where they are the next ones of the prompt. ``worth`` is
    the number of tokens that it is expected to bring.
    """

    num_rows: int
    ids: tuple[int, ...] = ()
    worth: float = math.inf


class Shares:
    """The time of the slowest stage that each session has used."""

    def __init__(self, costs: RingCosts) -> None:
        self._costs = costs
        self._used_s: dict[int, float] = {}  # who has sent nothing for the longest time comes first

    def enter(self, session: int) -> None:
        """A session begins, and has used as much as the one that used the least."""
        self._used_s[session] = min(self._used_s.values(), default=0.0)

    def leave(self, session: int) -> None:
        del self._used_s[session]

    def in_order(self) -> list[int]:
        """All sessions: those first that have used the least."""
        return sorted(self._used_s, key=self._used_s.__getitem__)

    def choose(self, offers: Mapping[int, Offer]) -> int:
        """The session whose chunk leaves now, out of some: of those that are not ahead the one that wins the most.

        A prompt's rows go before others, for a text that begins waits for all of them.
        """
        waiting = [session for session in self._used_s if session in offers]
        most_s = min(self._used_s[session] for session in waiting) + CHUNKS_AHEAD * self._costs.single_row_s
        entitled = [session for session in waiting if self._used_s[session] <= most_s]
        return max(entitled, key=lambda session: offers[session].worth / (self._interval_s(offers[session].num_rows)))

    def charge(self, session: int, num_rows: int) -> None:
        """The session sends a chunk of so many rows."""
        used_s = self._used_s[session] = self._used_s.pop(session) + self._interval_s(num_rows)
        least_s = used_s - CHUNKS_BEHIND * self._costs.single_row_s
        for other, other_s in self._used_s.items():
            self._used_s[other] = max(other_s, least_s)

    def _interval_s(self, num_rows: int) -> float:
        return self._costs.interval_s(num_rows) or 1.0  # before anything is measured all chunks count alike
