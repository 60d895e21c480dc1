"""Keeps a board under the watts and the temperature that its user allows, by rests between the steps of its stages.

How much of its time a stage may compute follows from what sensors show (``DutyControl``), and how long it has to rest
from how long it has computed (``RestDebt``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flowspec_edge.core.device.throttling import COOLED_S, MAX_SLOWDOWN, SLOW, SLOW_S

MIN_DUTY = 1 / MAX_SLOWDOWN
"""The least share of its time in which a stage computes. A board that is too hot even so goes on, and says so."""
MIN_REST_S = 0.001
"""Shorter rests are put off and added up: to sleep takes about a tenth of that."""
MAX_REST_S = 4.0
"""The longest rest in one forward. Ten stages that all rest so long are still within the minute after which an origin
takes a silent ring for lost."""
MAX_DEBT_S = 60.0
"""The most that is owed, since a prompt that is long over says nothing about the text now."""
MAX_STEP_S = 2.0
"""An interval between two readings counts as this at most: after a pause the duty does not jump."""

WATTS_BOUNDS, TEMPERATURE_BOUNDS_C = (0.5, 1000.0), (30.0, 110.0)
"""Between which caps may lie: the least that a board of ours takes idle, and what a room may have."""

UNDER_C = 1.0
"""How far below its cap a board is kept: the noise of a thermal zone, and what it rises by until that is noticed."""
UNDER_WATTS = 0.97
"""The share of its cap at which a board is kept, for the same reason."""
HEAT_GAIN, HEAT_RESET_S, HEAT_SMOOTHING_S = 0.05, 15.0, 1.0
"""Duty per degree; how far ahead a rise is seen; the noise of a zone. Tried on boards with time constants from half a
second (a die) to ten minutes (a case), whose die alone heats up by 30 degrees."""
WATTS_GAIN, WATTS_RESET_S = 0.5, 2.0
"""Duty per share of the cap, and the time over which watts are averaged: a board that rests takes them in bursts."""


@dataclass(frozen=True, slots=True)
class Caps:
    """What a user allows a board: watts of its input in the mean, and the temperature of its thermal zone."""

    max_watts: float | None = None
    max_temperature_c: float | None = None

    def __bool__(self) -> bool:
        return self.max_watts is not None or self.max_temperature_c is not None

    def __str__(self) -> str:
        parts = [
            f"{value:g} {unit}"
            for value, unit in ((self.max_watts, "W"), (self.max_temperature_c, "degrees C"))
            if value is not None
        ]
        return " and ".join(parts)


NO_CAPS = Caps()


@dataclass(slots=True)
class _Loop:
    """Keeps one value at its target: a proportional and integral controller in its velocity form, whose output, limited
    to what a duty may be, does not wind up.
    """

    target: float
    gain: float
    reset_s: float
    smoothing_s: float
    duty: float = 1.0
    _value: float | None = field(default=None, init=False)
    _at: float = field(default=0.0, init=False)

    def observe(self, value: float, now: float) -> None:
        before, elapsed = self._value, min(now - self._at, MAX_STEP_S)
        self._at = now
        if before is None:
            self._value = value
            return
        self._value = before + (value - before) * (1 - math.exp(-elapsed / self.smoothing_s))
        error = (self.target - self._value) * elapsed / self.reset_s
        self.duty = min(max(self.duty + self.gain * (before - self._value + error), MIN_DUTY), 1.0)

    def skip(self, now: float) -> None:
        """Nothing is learned of the time until now."""
        self._at = now


class DutyControl:
    """Chooses ``duty``, the share of its time in which a stage may compute, from what a board's sensors show.

    While a sensor shows nothing, the duty stays as it is.
    """

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self._heat = self._power = None
        if (limit := caps.max_temperature_c) is not None:
            self._heat = _Loop(limit - UNDER_C, HEAT_GAIN, HEAT_RESET_S, HEAT_SMOOTHING_S)
        if (watts := caps.max_watts) is not None:
            self._power = _Loop(UNDER_WATTS * watts, WATTS_GAIN / watts, WATTS_RESET_S, WATTS_RESET_S)
        self._mean = 1.0  # of the duty, over SLOW_S of work
        self._seen_at = 0.0
        self._slowed_at = -math.inf

    @property
    def duty(self) -> float:
        return min((loop.duty for loop in (self._heat, self._power) if loop is not None), default=1.0)

    def take(
        self, now: float, *, temperature_c: float | None = None, watts: float | None = None, is_busy: bool
    ) -> None:
        """What the sensors show, of a board that ``is_busy`` with computing and with rests, or has nothing to do.

        It cools down in either case. But the watts of an idle board say nothing about those of a busy one.
        """
        if self._heat is not None and temperature_c is not None:
            self._heat.observe(temperature_c, now)
        if self._power is not None and watts is not None:
            if is_busy:
                self._power.observe(watts, now)
            else:
                self._power.skip(now)
        if is_busy:
            elapsed = min(now - self._seen_at, MAX_STEP_S)
            self._mean += (self.duty - self._mean) * (1 - math.exp(-elapsed / SLOW_S))
            self._slowed_at = now if self.duty < 1 else self._slowed_at
        self._seen_at = now

    def slowdown(self, now: float) -> float:
        """How many times as long as it could the board takes when it works, for plans; 1 where that is little.

        It counts for a while after the board was last slowed, since it would be as hot again at its full pace.
        """
        found = 1 / self._mean
        return found if found >= SLOW and now - self._slowed_at <= COOLED_S else 1.0


class RestDebt:
    """How long one stage still has to rest for what it has computed. Time in which it has nothing to do counts."""

    def __init__(self) -> None:
        self._owed_s = 0.0
        self._at = 0.0

    def add(self, ran_s: float, duty: float, now: float) -> None:
        """The stage has computed for ``ran_s`` until ``now``, which may be ``duty`` of its time."""
        self._rest_until(now - ran_s)
        self._owed_s = min(self._owed_s + ran_s * (1 / duty - 1), MAX_DEBT_S)
        self._at = now

    def left_s(self, now: float) -> float:
        """What is left of it; 0 where that is too little to rest for now."""
        self._rest_until(now)
        return self._owed_s if self._owed_s >= MIN_REST_S else 0.0

    def _rest_until(self, now: float) -> None:
        self._owed_s = max(self._owed_s - (now - self._at), 0.0)
        self._at = now
