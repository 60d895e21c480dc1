"""A node's sensors are read on a thread, which tells its energy and how much its stages have to rest."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence

import pytest

from flowspec_edge.core import wire
from flowspec_edge.core.device.caps import MIN_DUTY, Caps
from flowspec_edge.core.device.power import Rail, Watts
from flowspec_edge.core.device.throttling import ThermalReport
from flowspec_edge.core.planning.shared_cores import Cores
from flowspec_edge.errors import BoardError
from flowspec_edge.node import sensor_watch
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.node import Node, ask_nodes
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.node.sensor_watch import SensorWatch, check_caps
from flowspec_edge.node.sensors import BoardPower


class Meter(BoardPower):
    """Shows what the test says."""

    def __init__(self, *rails: Rail) -> None:
        super().__init__([])
        self.rails: Sequence[Rail] = rails
        self.is_read = threading.Event()

    @property
    def names(self) -> list[str]:
        return ["meter"]

    def read(self) -> list[Rail]:
        self.is_read.set()
        return list(self.rails)


def settings_of(**options: object) -> NodeSettings:
    return NodeSettings(name="pi", cluster="x", is_announced=False, **options)  # type: ignore[arg-type]


def test_energy_is_told_once_it_is_known_up_to_now_and_never_less_than_before() -> None:
    meter = Meter(Watts(8))
    watch = SensorWatch(settings_of(power=meter, cores=Cores("boot")), Activity())
    assert watch.energy() is None
    watch.read(10.0)
    watch.read(12.0)
    assert watch.energy_at(12.125) == wire.EnergyTaken("boot", 17.0, 8.0)
    assert watch.energy_at(99.0) == wire.EnergyTaken("boot", 18.0, 8.0), "as far as the next read, which is late"
    meter.rails = [Watts(0)]
    watch.read(12.25)
    assert watch.energy_at(12.25) == wire.EnergyTaken("boot", 18.0, 0.0)
    meter.rails = ()
    watch.read(13.0)
    assert watch.energy() is None
    assert watch.duty == watch.slowdown == 1.0


def test_a_cap_slows_a_board_that_works_and_one_that_cannot_be_kept_is_told(caplog: pytest.LogCaptureFixture) -> None:
    activity = Activity()
    watch = SensorWatch(settings_of(power=Meter(Watts(9)), caps=Caps(max_watts=5.0)), activity)
    for number in range(200):
        watch.read(number / 4)
    assert watch.duty == 1.0, "it did not compute"
    with activity.busy(), caplog.at_level(logging.WARNING):
        for number in range(200, 400):
            watch.read(number / 4)
    assert watch.duty == MIN_DUTY
    (said,) = [record.message for record in caplog.records]
    assert said == "the cap of 5 W cannot be kept: the board is above it at the slowest pace"


def test_a_board_cannot_be_kept_under_what_it_does_not_show() -> None:
    check_caps(Caps(), None, None)
    check_caps(Caps(5.0, 70.0), Meter(Watts(1)), lambda: ThermalReport(50.0, 80.0))
    with pytest.raises(BoardError, match=r"a cap of 5 W \(--max-watts\) cannot be kept: .* no sensor is there"):
        check_caps(Caps(max_watts=5.0), None, None)
    unreadable = BoardPower([])
    unreadable.fault = "package-0 cannot be read (Permission denied)"
    with pytest.raises(BoardError, match=r"since package-0 cannot be read \(Permission denied\)"):
        check_caps(Caps(max_watts=5.0), unreadable, None)
    for blind in (None, lambda: None):
        with pytest.raises(BoardError, match=r"70 degrees C \(--max-temperature\) cannot be kept"):
            check_caps(Caps(max_temperature_c=70.0), None, blind)


async def test_a_node_reads_its_sensors_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensor_watch, "READ_S", 0.001)
    meter = Meter(Watts(7.5))
    node = await Node.start(settings_of(power=meter, thermometer=lambda: ThermalReport(61.4, 80.0)))
    try:
        assert await asyncio.to_thread(meter.is_read.wait, 10)
        while node.energy() is None:
            await asyncio.sleep(0.001)
        (board,) = await ask_nodes([node.announcement], "x")
        assert (board["temperature_c"], board["watts"], board["state"]) == (61, 7.5, "ready")
        assert board["joules"] >= 0
        monkeypatch.setattr(SensorWatch, "slowdown", property(lambda watch: 3.0))
        assert await node.measurements.slowdown() == 3.0, "so plans know it"
    finally:
        await node.close()
    assert "sensors" not in {thread.name for thread in threading.enumerate()}


def test_a_board_without_sensors_and_caps_has_no_thread() -> None:
    for power in (None, BoardPower(["VDD_IN"])):  # a Jetson's rail, which this machine has not
        watch = SensorWatch(settings_of(power=power, thermometer=lambda: ThermalReport(61.4, 80.0)), Activity())
        watch.start()
        assert "sensors" not in {thread.name for thread in threading.enumerate()}
        watch.close()
    hot = SensorWatch(settings_of(thermometer=lambda: ThermalReport(99.0, 80.0), caps=Caps(None, 70.0)), Activity())
    for number in range(200):
        hot.read(number / 4)
    assert hot.duty == MIN_DUTY and hot.energy() is None
