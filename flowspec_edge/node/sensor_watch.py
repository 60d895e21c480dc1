"""Watches a board's sensors, so that its energy is known and its caps are kept.

They are read on a thread of their own: a sensor at the end of an I2C bus takes milliseconds to answer.
"""

from __future__ import annotations

import logging
import threading
import time

from flowspec_edge.core import wire
from flowspec_edge.core.device.caps import MIN_DUTY, Caps, DutyControl
from flowspec_edge.core.device.power import EnergyMeter
from flowspec_edge.errors import BoardError
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.board import Thermometer
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.node.sensors import BoardPower

READ_S = 0.25
"""How often sensors are read: a text of some seconds, on a board that takes power in bursts, needs a dozen samples."""
BURSTS_S = 2.0
"""A board that computed within this time is at work, as far as its watts go."""
STUCK_S = 1.0
"""A sensor takes milliseconds to answer. One that takes so long is not waited for where a node ends."""

_log = logging.getLogger(__name__)


class SensorWatch:
    """Reads what the sensors of a node's board show, from ``start`` until ``close``. Where there is nothing to read, or
    nobody wants it, there is no thread.
    """

    def __init__(self, settings: NodeSettings, activity: Activity) -> None:
        self.caps = settings.caps
        self._machine, self._activity = settings.cores.machine or settings.name, activity
        power = settings.power
        self._power = power if power is not None and power.names else None
        self._thermometer = settings.thermometer if self.caps.max_temperature_c is not None else None
        self._meter, self._control = EnergyMeter(), DutyControl(self.caps)
        self._found: tuple[float, float, float] | None = None  # joules since the start, watts, and when that was
        self._told_j = 0.0
        self._is_warned = False
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    def energy(self) -> wire.EnergyTaken | None:
        """What the board has taken since the start, and takes; None where that is not known."""
        return self.energy_at(time.monotonic())

    def energy_at(self, now: float) -> wire.EnergyTaken | None:
        """At a time behind the last read, with what it may have taken since."""
        if (found := self._found) is None:
            return None
        joules, watts, read_at = found
        self._told_j = max(self._told_j, joules + watts * min(now - read_at, READ_S))  # what is told never shrinks
        return wire.EnergyTaken(self._machine, round(self._told_j, 3), round(watts, 3))

    @property
    def duty(self) -> float:
        """The share of its time in which a stage may compute now."""
        return self._control.duty

    @property
    def slowdown(self) -> float:
        """How many times as long as it could the board takes because of its caps."""
        return self._control.slowdown(time.monotonic())

    def start(self) -> None:
        if self._power is not None or self._thermometer is not None:
            self._thread = threading.Thread(target=self._run, name="sensors", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Waits for what is being read, unless a driver is stuck."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join(STUCK_S)

    def _run(self) -> None:
        while not self._ending.wait(READ_S):
            self.read(time.monotonic())

    def read(self, now: float) -> None:
        """Once."""
        watts = None
        if self._power is not None:
            self._meter.add(self._power.read(), now)
            joules, watts = self._meter.joules, self._meter.watts
            self._found = None if joules is None or watts is None else (joules, watts, now)
        report = None if self._thermometer is None else self._thermometer()
        temperature_c = None if report is None else report.temperature_c
        is_busy = self._activity.ran_within(BURSTS_S)
        self._control.take(now, temperature_c=temperature_c, watts=watts, is_busy=is_busy)
        if self.duty <= MIN_DUTY and not self._is_warned:
            _log.warning("the cap of %s cannot be kept: the board is above it at the slowest pace", self.caps)
        self._is_warned = self.duty <= MIN_DUTY


def check_caps(caps: Caps, power: BoardPower | None, thermometer: Thermometer | None) -> None:
    """Raises BoardError where a board does not show what it is to keep under."""
    if caps.max_watts is not None and (power is None or not power.names):
        fault = power.fault if power is not None and power.fault else "no sensor is there that its profile names"
        raise BoardError(
            f"a cap of {caps.max_watts:g} W (--max-watts) cannot be kept: this board does not tell what it takes, "
            f"since {fault}; power.sensors of a profile names them"
        )
    if caps.max_temperature_c is not None and (thermometer is None or thermometer() is None):
        raise BoardError(
            f"a cap of {caps.max_temperature_c:g} degrees C (--max-temperature) cannot be kept: this board does not "
            "tell how hot it is, since no thermal zone is there that its profile names (thermal.zones)"
        )
