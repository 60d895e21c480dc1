"""How many texts a server writes at a time, how many wait for their turn, and how many one address may have."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from flowspec_edge.errors import ServerBusyError

RETRY_S = 2.0
"""When whoever is sent away may ask again: a short text takes about that long on a few boards."""


@dataclass(frozen=True, slots=True)
class TurnLimits:
    """Each text that is written takes memory for its cache on every board, each that waits a body and a connection."""

    max_sessions: int = 16
    max_queue: int = 64
    max_per_address: int = 32


class Turns:
    """Gives texts their turns, in the order of their coming."""

    def __init__(self, limits: TurnLimits) -> None:
        self._limits = limits
        self._by_address: Counter[str] = Counter()
        self._free = asyncio.Semaphore(limits.max_sessions)

    @property
    def most_texts(self) -> int:
        """How many texts one address may have when nobody else has any."""
        limits = self._limits
        return min(limits.max_per_address, limits.max_sessions + limits.max_queue)

    @contextlib.contextmanager
    def place(self, address: str, num_texts: int = 1) -> Iterator[None]:
        """A place for each of so many texts of that address, to be written or to wait.

        Raises:
            ServerBusyError: there are too few, or the address has as many as it may have.
        """
        limits, num = self._limits, self._by_address.total()
        if num + num_texts > limits.max_sessions + limits.max_queue:
            raise ServerBusyError(
                f"the server has {num} texts to write, and {num_texts} more are too many: it takes "
                f"{limits.max_sessions} at a time (--max-sessions) and {limits.max_queue} waiting (--max-queue); "
                f"ask again in {RETRY_S:.0f} s",
                retry_after_s=RETRY_S,
            )
        if self._by_address[address] + num_texts > limits.max_per_address:
            raise ServerBusyError(
                f"{address} has {self._by_address[address]} texts written or waiting and asks for {num_texts}; one "
                f"address may have {limits.max_per_address} (--max-per-address); ask again in {RETRY_S:.0f} s",
                retry_after_s=RETRY_S,
                is_crowded_by_one=True,
            )
        self._by_address[address] += num_texts
        try:
            yield
        finally:
            self._by_address[address] -= num_texts
            if not self._by_address[address]:
                del self._by_address[address]

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for the turn of a text that has a place, and keep it as long as it is written."""
        async with self._free:
            yield
