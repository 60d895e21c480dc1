"""Chains of drafts that a grammar has not been asked about yet, or is being asked about."""

from __future__ import annotations

from collections.abc import Sequence

from flowspec_edge.core.speculation.lookup_drafts import LookupRow


class Unchecked:
    """What lookup has proposed of one session, until it is known how much of it may come.

    One question is under way at a time. What is proposed meanwhile waits for the next one.
    """

    def __init__(self) -> None:
        self._waiting: list[LookupRow] = []
        self._asked: list[LookupRow] = []

    def begin(self, proposed: Sequence[LookupRow]) -> None:
        """The root has moved, and this is proposed now: what has not been asked about is out of date."""
        self._waiting = [*proposed]

    def add(self, proposed: Sequence[LookupRow]) -> None:
        """This is proposed as well, below other rows."""
        self._waiting += proposed

    def next_chains(self) -> dict[int, tuple[int, ...]]:
        """The tokens to ask about now, by the row that each chain begins below; none where nothing is to be asked."""
        if self._asked or not self._waiting:
            return {}
        self._asked, self._waiting = self._waiting, []
        return {seed: tuple(row.token for row in chain) for seed, chain in _chains(self._asked).items()}

    def take_checked(self, num_allowed: Sequence[int]) -> list[LookupRow]:
        """So many rows of each chain may come. Returns these, the likeliest first as they were proposed."""
        asked, self._asked = self._asked, []
        left = dict(zip(_chains(asked), num_allowed, strict=True))
        allowed = []
        for row in asked:
            if left[row.seed] > 0:
                allowed.append(row)
            left[row.seed] -= 1
        return allowed


def _chains(rows: Sequence[LookupRow]) -> dict[int, list[LookupRow]]:
    chains: dict[int, list[LookupRow]] = {}
    for row in rows:
        chains.setdefault(row.seed, []).append(row)
    return chains
