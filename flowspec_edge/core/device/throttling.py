"""Boards get hot: a forward that goes on taking longer than its board's curve says makes the next plan ask less of it."""

from __future__ import annotations

from dataclasses import dataclass

SLOW = 1.15
"""How many times its curve a forward may take before the board counts as slow: caches fill and curves are fitted."""
SLOW_S = 30.0
"""For how long it must be so: a board that swaps or updates itself is not hot."""
COOLED_S = 300.0
"""How long after its last forward a board still counts as slow: one that is left out of rings must get another chance."""
FORGETTING = 0.95
"""Weight of the past at each forward: some twenty of them count."""
MAX_SLOWDOWN = 20.0


@dataclass(frozen=True, slots=True)
class ThermalReport:
    """What a board says of itself: its temperature and the one from which on it throttles, in degrees Celsius, and the share
    of its clock that it may still use.
    """

    temperature_c: float
    limit_c: float
    clock_share: float = 1.0

    @property
    def is_hot(self) -> bool:
        return self.temperature_c >= self.limit_c

    @property
    def slowdown(self) -> float:
        """How many times its curve it takes; a cool board with a low clock was set to it, and is not hot."""
        if not self.is_hot:
            return 1.0
        return min(max(1 / max(self.clock_share, 1 / MAX_SLOWDOWN), 1.0), MAX_SLOWDOWN)


class StepWatch:
    """Holds one stage's forwards against its board's curve."""

    def __init__(self) -> None:
        self._expected_ms = self._ran_ms = 0.0
        self._slow_since: float | None = None
        self._observed_at = 0.0

    def observe(self, expected_ms: float, ran_ms: float, now: float) -> None:
        """A forward has ended at ``now`` (seconds)."""
        self._observed_at = now
        self._expected_ms = self._expected_ms * FORGETTING + expected_ms
        self._ran_ms = self._ran_ms * FORGETTING + ran_ms
        if self._ran_ms <= self._expected_ms * SLOW:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now

    def slowdown(self, now: float, thermal: ThermalReport | None = None) -> float:
        """How many times its curve the board takes; 1 unless its forwards were slow for SLOW_S, or it says that it is hot, and
        then by what its forwards or its clock tell, whichever is more.
        """
        is_hot = thermal is not None and thermal.is_hot
        measured = 1.0
        if self._slow_since is not None and now - self._observed_at <= COOLED_S:
            is_lasting = self._observed_at - self._slow_since >= SLOW_S
            measured = min(self._ran_ms / self._expected_ms, MAX_SLOWDOWN) if is_lasting or is_hot else 1.0
        return max(measured, thermal.slowdown if thermal is not None else 1.0)
