"""Whether a node computes for a ring, so that what can wait waits until it does not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator


class Activity:
    """The forwards of all stages of a node."""

    def __init__(self) -> None:
        self._num_running = 0
        self._ended_at = float("-inf")
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """A forward runs."""
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            self._ended_at = time.monotonic()
            if not self._num_running:
                self._idle.set()

    def ran_within(self, past_s: float) -> bool:
        """Whether a forward runs, or one has ended since. Any thread may ask."""
        return self._num_running > 0 or time.monotonic() - self._ended_at <= past_s

    async def wait_quiet(self, quiet_s: float) -> None:
        """Until no forward has run for so long."""
        while True:
            await self._idle.wait()
            left_s = self._ended_at + quiet_s - time.monotonic()
            if left_s <= 0:
                return
            await asyncio.sleep(left_s)
