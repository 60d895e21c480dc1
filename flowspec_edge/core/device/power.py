"""Energy of a board from what its sensors show: samples of watts, or counters of joules that begin anew. No file is
read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_GAP_S = 5.0
"""Samples further apart than this tell nothing of the time between them: a board that slept, a sensor that was gone."""
MAX_WATTS = 2000.0
"""No machine that serves a stage takes more. A counter that says so was set back, as when its driver is loaded anew."""


@dataclass(frozen=True, slots=True)
class Watts:
    """What a rail takes at a moment."""

    watts: float


@dataclass(frozen=True, slots=True)
class Counted:
    """What a rail has taken since some time, in joules. The counter begins anew once it has reached ``range_j``; where
    that is 0, it is not known when.
    """

    joules: float
    range_j: float


Rail = Watts | Counted


class EnergyMeter:
    """Adds up what a board takes, from samples of its rails that come now and then.

    ``joules`` counts from the first sample on, and is None before it. ``watts`` is what the board takes at present: the
    last sample, or the mean of the last interval where rails are counters; None while that is not known.
    """

    def __init__(self) -> None:
        self.joules: float | None = None
        self.watts: float | None = None
        self._rails: Sequence[Rail] = ()
        self._at = 0.0

    def add(self, rails: Sequence[Rail], now: float) -> None:
        """Take in one sample of all rails; of none where one of them could not be read, since a part is no whole."""
        before, elapsed = self._rails, now - self._at
        self._rails, self._at = rails, now
        self.watts = None
        if not rails:
            return
        self.joules = self.joules or 0.0
        means: list[float | None] = [None] * len(rails)
        if len(before) == len(rails) and 0 < elapsed <= MAX_GAP_S:
            means = [_mean_watts(first, second, elapsed) for first, second in zip(before, rails, strict=True)]
        self.joules += (_whole(means) or 0.0) * elapsed
        self.watts = _whole(
            [rail.watts if isinstance(rail, Watts) else mean for rail, mean in zip(rails, means, strict=True)]
        )


def _whole(parts: Sequence[float | None]) -> float | None:
    """Their sum; None where one is not known."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _mean_watts(before: Rail, now: Rail, elapsed: float) -> float | None:
    """Of a rail between two samples; None where they do not tell."""
    match before, now:
        case Watts(first), Watts(second):
            return (first + second) / 2
        case Counted(first), Counted(second, range_j):
            gained = second - first if second >= first else second - first + range_j
            return gained / elapsed if 0 <= gained <= MAX_WATTS * elapsed else None
    return None
