"""Notices boards that get hot, by forwards that keep taking longer than was measured, and boards that were measured
while they were busy, by forwards that keep being quicker. The next plan gives them less, or more.
"""

from __future__ import annotations

from dataclasses import dataclass

SLOW = 1.15
"""How many times as long as measured a forward may take before the board counts as slow."""
SLOW_S = 30.0
"""How long forwards must be slow, since a board that swaps or updates itself for a moment is not hot."""
QUICK = 0.75
"""Forwards that take less than this share of what was measured show that the board was busy then. Behind a short text
they take a tenth less as it is, since there is less to attend to."""
QUICK_FORWARDS = 20
"""How many forwards must be quick in a row. No time is waited for, since no board is quicker than it can be."""
COOLED_S = 300.0
"""How long a board counts as slow after its last forward. A board that is left out of rings must get another chance."""
FORGETTING = 0.95
"""The weight of the past at each forward: about the last twenty forwards count."""
MAX_SLOWDOWN = 20.0
"""The largest slowdown that is reported."""


@dataclass(frozen=True, slots=True)
class ThermalReport:
    """What a board reports: its temperature and the one from which it throttles, in degrees Celsius, and its clock.

    ``clock_share`` is the share of its full clock that it may still use.
    """

    temperature_c: float
    limit_c: float
    clock_share: float = 1.0

    @property
    def is_hot(self) -> bool:
        return self.temperature_c >= self.limit_c

    @property
    def slowdown(self) -> float:
        """How many times as long as measured the board takes.

        A cool board with a low clock was set to that clock, and is not hot.
        """
        if not self.is_hot:
            return 1.0
        return min(max(1 / max(self.clock_share, 1 / MAX_SLOWDOWN), 1.0), MAX_SLOWDOWN)


class StepWatch:
    """Compares a stage's forwards with what was measured of its board."""

    def __init__(self) -> None:
        self._expected_ms = self._ran_ms = 0.0
        self._slow_since: float | None = None
        self._num_quick = 0
        self._observed_at = 0.0

    def observe(self, expected_ms: float, ran_ms: float, now: float) -> None:
        """Take note of a forward that ended at ``now``, in seconds."""
        self._observed_at = now
        self._expected_ms = self._expected_ms * FORGETTING + expected_ms
        self._ran_ms = self._ran_ms * FORGETTING + ran_ms
        if self._ran_ms <= self._expected_ms * SLOW:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now
        self._num_quick = self._num_quick + 1 if self._ran_ms < self._expected_ms * QUICK else 0

    @property
    def quick_share(self) -> float | None:
        """The share of what was measured that forwards take, where they have long been quick."""
        return self._ran_ms / self._expected_ms if self._num_quick >= QUICK_FORWARDS else None

    def slowdown(self, now: float, thermal: ThermalReport | None = None) -> float:
        """How many times as long as measured the board takes, by its forwards or by its clock, whichever says more.

        Forwards count once they were slow for SLOW_S, or at once where the board reports that it is hot. Otherwise 1.
        """
        is_hot = thermal is not None and thermal.is_hot
        measured = 1.0
        if self._slow_since is not None and now - self._observed_at <= COOLED_S:
            is_lasting = self._observed_at - self._slow_since >= SLOW_S
            measured = min(self._ran_ms / self._expected_ms, MAX_SLOWDOWN) if is_lasting or is_hot else 1.0
        return max(measured, thermal.slowdown if thermal is not None else 1.0)
