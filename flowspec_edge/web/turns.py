"""How many texts a server writes at a time, how many wait for their turn, and how many one address or key may have."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flowspec_edge.errors import ServerBusyError

RETRY_S = 2.0
"""When whoever is sent away may ask again: a short text takes about that long on a few boards."""


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """Each text that is written takes memory for its cache on every board, each that waits a body and a connection."""

    max_sessions: int = 16
    max_queue: int = 64
    max_per_address: int = 32
    max_per_key: int = 32


class Holder(NamedTuple):
    """Whose texts are counted together: those of an address, or of an API key by its name."""

    name: str
    is_key: bool = False

    def __str__(self) -> str:
        return f"the API key {self.name!r}" if self.is_key else self.name


class Turns:
    """Gives texts their turns, in the order of their coming."""

    def __init__(self, limits: TurnLimits) -> None:
        self.limits = limits
        self._num_placed = 0
        self._num_writing = 0
        self._by_holder: Counter[Holder] = Counter()
        self._free = asyncio.Semaphore(limits.max_sessions)

    @property
    def num_writing(self) -> int:
        """Texts that are written."""
        return self._num_writing

    @property
    def num_waiting(self) -> int:
        """Texts that have a place, and not their turn."""
        return self._num_placed - self._num_writing

    def most_texts(self, *holders: Holder) -> int:
        """How many texts they may have together when nobody else has any."""
        return min(self.limits.max_sessions + self.limits.max_queue, *map(self._most_of, holders))

    def _most_of(self, holder: Holder) -> int:
        return self.limits.max_per_key if holder.is_key else self.limits.max_per_address

    @contextlib.contextmanager
    def place(self, *holders: Holder, num_texts: int = 1) -> Iterator[None]:
        """A place for each of so many texts of those holders, to be written or to wait.

        Raises:
            ServerBusyError: there are too few, or a holder has as many as it may have.
        """
        limits, num = self.limits, self._num_placed
        if num + num_texts > limits.max_sessions + limits.max_queue:
            raise ServerBusyError(
                f"the server has {num} texts to write, and {num_texts} more are too many: it takes "
                f"{limits.max_sessions} at a time (--max-sessions) and {limits.max_queue} waiting (--max-queue); "
                f"ask again in {RETRY_S:.0f} s",
                retry_after_s=RETRY_S,
            )
        for holder in holders:
            if self._by_holder[holder] + num_texts > (most := self._most_of(holder)):
                kind = "key" if holder.is_key else "address"
                raise ServerBusyError(
                    f"{holder} has {self._by_holder[holder]} texts written or waiting and asks for {num_texts}; one "
                    f"{kind} may have {most} (--max-per-{kind}); ask again in {RETRY_S:.0f} s",
                    retry_after_s=RETRY_S,
                    is_crowded_by_one=True,
                )
        self._count(holders, num_texts)
        try:
            yield
        finally:
            self._count(holders, -num_texts)

    def _count(self, holders: Sequence[Holder], num_texts: int) -> None:
        self._num_placed += num_texts
        for holder in holders:
            self._by_holder[holder] += num_texts
            if not self._by_holder[holder]:
                del self._by_holder[holder]

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn of a text that has a place, and keep it as long as it is written."""
        async with self._free:
            self._num_writing += 1
            try:
                yield
            finally:
                self._num_writing -= 1
