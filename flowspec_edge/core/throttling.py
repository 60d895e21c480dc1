"""Boards get hot: a forward that goes on taking longer than its board's curve says makes the next plan ask less of it."""

from __future__ import annotations

from dataclasses import dataclass

SLOW = 1.15
"""How many times its curve a forward may take before the board counts as slow: caches fill and curves are fitted."""
SLOW_S = 30.0
"""For how long it must be so: a board that swaps or updates itself is not hot."""
FORGETTING = 0.95
"""Weight of the past at each forward: some twenty of them count."""
MAX_SLOWDOWN = 20.0


@dataclass(frozen=True, slots=True)
class ThermalReport:
    """What a board says of itself: its temperature, the one from which on it throttles, and the share of its clock left."""

    temperature_c: float
    limit_c: float
    clock_share: float = 1.0

    @property
    def slowdown(self) -> float:
        """How many times its curve it takes; a cool board with a low clock is idle, not slow."""
        if self.temperature_c < self.limit_c:
            return 1.0
        return min(max(1 / max(self.clock_share, 1 / MAX_SLOWDOWN), 1.0), MAX_SLOWDOWN)


class StepWatch:
    """Holds one stage's forwards against its board's curve."""

    def __init__(self) -> None:
        self._expected_ms = self._ran_ms = 0.0
        self._slow_since: float | None = None

    def observe(self, expected_ms: float, ran_ms: float, now: float) -> None:
        """A forward has ended at ``now`` (seconds)."""
        self._expected_ms = self._expected_ms * FORGETTING + expected_ms
        self._ran_ms = self._ran_ms * FORGETTING + ran_ms
        if self._ran_ms <= self._expected_ms * SLOW:
            self._slow_since = None
        elif self._slow_since is None:
            self._slow_since = now

    def slowdown(self, now: float, thermal: ThermalReport | None = None) -> float:
        """How many times its curve the board takes; 1 unless it was slow for SLOW_S, or says that it throttles."""
        measured = 1.0
        if self._slow_since is not None and now - self._slow_since >= SLOW_S:
            measured = min(self._ran_ms / self._expected_ms, MAX_SLOWDOWN)
        return max(measured, thermal.slowdown if thermal is not None else 1.0)
