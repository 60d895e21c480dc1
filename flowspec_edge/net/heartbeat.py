"""Finds out whether a peer that says nothing is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LATE_S = 0.25
"""A timer that is later than this means that this process itself stood still. What came meanwhile is read first."""


class Heartbeat:
    """A peer from which nothing came for ``quiet_s`` is asked, and one that says nothing for ``answer_s`` after that is
    lost; later where this process stood still meanwhile, or the peer has told that it would.
    """

    def __init__(self, quiet_s: float, answer_s: float, ask: Callable[[], None], lose: Callable[[str], None]) -> None:
        self._quiet_s, self._answer_s = quiet_s, answer_s
        self._ask, self._lose = ask, lose
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._excused_until = float("-inf")
        self._asked_at: float | None = None  # where nothing came since
        self._timer = self._loop.call_later(quiet_s, self._look)

    def hear(self) -> None:
        """Something has come."""
        self._heard_at = self._loop.time()
        if self._asked_at is not None:  # the next question is due long before this one's answer was
            self._asked_at = None
            self._timer.cancel()
            self._timer = self._loop.call_at(self._heard_at + self._quiet_s, self._look)

    def excuse(self, seconds: float) -> None:
        """The peer may say nothing for so long from now on, and is asked only then."""
        self._excused_until = self._loop.time() + seconds
        self._asked_at = None
        self._timer.cancel()
        self._timer = self._loop.call_at(self._due, self._look)

    @property
    def is_excused(self) -> bool:
        """Whether the peer has told that it stands still now."""
        return self._loop.time() < self._excused_until

    @property
    def _due(self) -> float:
        """When the peer is to be asked, or its answer is to be there."""
        if self._asked_at is not None:
            return self._asked_at + self._answer_s
        return max(self._heard_at + self._quiet_s, self._excused_until)

    def stop(self) -> None:
        self._timer.cancel()
        self._asked_at = None
        self._ask = self._lose = _nothing  # they lead back to the link

    def _look(self) -> None:
        now = self._loop.time()
        is_late = now - self._timer.when() > LATE_S
        if self._asked_at is None and now >= self._due:
            self._asked_at = now
            self._ask()
        due = self._due
        if due <= now:
            if not is_late:
                self._lose(f"No PONG received after {self._answer_s:g} seconds")
                return
            due = now + LATE_S
        self._timer = self._loop.call_at(due, self._look)


def _nothing(*_: object) -> None:
    pass
