"""A board's power sensors, as Linux shows them. ``core/device/power.py`` adds up what their files say.

A rail has the name of its label, or that of its chip where the chip has no other rail. Profiles name the rails that
are the board's input (``power.sensors``), since only they know which rails feed which: a sum of all would count some
twice. What no profile names is not counted; a USB-C port, for example, shows what its source may give, and not what is
taken.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flowspec_edge.core.device.boards import BoardProfile
from flowspec_edge.core.device.power import Counted, Rail, Watts
from flowspec_edge.errors import system_words
from flowspec_edge.node.firmware_mailbox import VCIO, ask_firmware, read_rails_w

SYS = Path("/sys")
MICRO, MILLI = 1e-6, 1e-3
FIRMWARE_NAME = "pmic"
"""The name of the sum that the firmware of a Raspberry Pi 5 tells."""
SEARCH_AGAIN_S = 10.0
"""How often sensors that are gone are looked for: a driver that is loaded anew has other files."""

_FILE = re.compile(r"(?:energy|power|curr)(\d+)_(?:average|input)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sensor:
    """A rail by its name. ``read`` raises OSError or ValueError where it cannot be read."""

    name: str
    read: Callable[[], Rail]


class BoardPower:
    """The rails that are a board's input: the first of the ``wanted`` sums, as ``A + B``, all of whose rails are there
    and can be read. ``fault`` says why none is used where one is there.
    """

    def __init__(self, wanted: Sequence[str], sys: Path = SYS, vcio: Path = VCIO) -> None:
        self._wanted, self._places = wanted, (sys, vcio)
        self._sensors: Sequence[Sensor] = ()
        self._searched_at = 0.0
        self.fault = ""
        self._search()

    @property
    def names(self) -> list[str]:
        """Of the rails that are added up; none where the board does not tell what it takes."""
        return [sensor.name for sensor in self._sensors]

    def read(self) -> list[Rail]:
        """All of them, or none where one cannot be read now; that may take some milliseconds."""
        if not self._sensors and time.monotonic() - self._searched_at > SEARCH_AGAIN_S:
            self._search()
        try:
            return [sensor.read() for sensor in self._sensors]
        except (OSError, ValueError) as cause:
            _log.warning("power sensors %s are gone: %s", " + ".join(self.names), system_words(cause))
            self._sensors, self._searched_at = (), time.monotonic()
            return []

    def _search(self) -> None:
        self._searched_at, self.fault = time.monotonic(), ""
        known = {sensor.name: sensor for sensor in find_sensors(*self._places)} if self._wanted else {}
        for wanted in self._wanted:
            names = [name.strip() for name in wanted.split("+")]
            if not all(name in known for name in names):
                continue
            found = [known[name] for name in names]
            try:
                for sensor in found:
                    sensor.read()
            except (OSError, ValueError) as cause:
                self.fault = self.fault or f"{wanted} cannot be read ({system_words(cause)})"
                continue
            self._sensors, self.fault = found, ""
            return


def power_of(profile: BoardProfile | None) -> BoardPower | None:
    """The input of a board of that profile; None where no profile says what that is."""
    return BoardPower(profile.power_sensors) if profile is not None and profile.power_sensors else None


def find_sensors(sys: Path = SYS, vcio: Path = VCIO) -> list[Sensor]:
    """All power sensors of this machine, readable or not, but those whose name is not theirs alone."""
    found = [*_hwmon(sys), *_iio(sys), *_powercap(sys)]
    if vcio.exists():
        found.append(Sensor(FIRMWARE_NAME, partial(_firmware, vcio)))
    times = Counter(sensor.name for sensor in found)
    return [sensor for sensor in found if times[sensor.name] == 1]


def _hwmon(sys: Path) -> Iterator[Sensor]:
    """Linux, Documentation/hwmon/sysfs-interface.rst: microwatts, microjoules, millivolts and milliamperes."""
    for chip in sorted(sys.glob("class/hwmon/hwmon*")):
        with contextlib.suppress(OSError):
            numbers = {int(match[1]) for file in chip.iterdir() if (match := _FILE.fullmatch(file.name))}
            rails = [(number, read) for number in sorted(numbers) if (read := _hwmon_rail(chip, number)) is not None]
            for number, read in rails:
                name = _label(chip, number) or (_text(chip / "name") if len(rails) == 1 else "")
                if name:
                    yield Sensor(name, read)


def _hwmon_rail(chip: Path, number: int) -> Callable[[], Rail] | None:
    """How a rail is read: a counter tells most, volts and amperes by themselves least."""
    energy = chip / f"energy{number}_input"
    average, power = chip / f"power{number}_average", chip / f"power{number}_input"
    volts, amperes = chip / f"in{number}_input", chip / f"curr{number}_input"
    if energy.exists():
        return partial(_counted, energy)
    if average.exists() or power.exists():
        return partial(_watts, MICRO, average if average.exists() else power)
    if volts.exists() and amperes.exists():
        return partial(_watts, MICRO, volts, amperes)
    return None


def _label(chip: Path, number: int) -> str:
    for kind in ("energy", "power", "in", "curr"):
        with contextlib.suppress(OSError):
            return _text(chip / f"{kind}{number}_label")
    return ""


def _iio(sys: Path) -> Iterator[Sensor]:
    """The INA3221 of a Jetson under Jetson Linux 32, whose driver is NVIDIA's own: milliwatts."""
    for label in sorted(sys.glob("bus/iio/devices/iio:device*/rail_name_*")):
        power = label.with_name(label.name.replace("rail_name_", "in_power") + "_input")
        with contextlib.suppress(OSError):
            yield Sensor(_text(label), partial(_watts, MILLI, power))


def _powercap(sys: Path) -> Iterator[Sensor]:
    """RAPL (Linux, Documentation/power/powercap/powercap.rst): ``package-0``, and within it ``package-0/dram``."""
    for zone in sorted(sys.glob("class/powercap/intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            name, around = _text(zone / "name"), zone.name.rpartition(":")[0]
            if ":" in around:
                name = f"{_text(zone.with_name(around) / 'name')}/{name}"
            range_j = int(_text(zone / "max_energy_range_uj")) * MICRO
            yield Sensor(name, partial(_counted, zone / "energy_uj", range_j))


def _watts(unit: float, *factors: Path) -> Watts:
    """A chip that measures both ways shows a rail that takes nothing as a little less than that."""
    return Watts(max(math.prod(int(_text(factor)) for factor in factors) * unit, 0.0))


def _counted(energy: Path, range_j: float = 0.0) -> Counted:
    return Counted(int(_text(energy)) * MICRO, range_j)


def _firmware(vcio: Path) -> Watts:
    if (watts := read_rails_w(ask_firmware("pmic_read_adc", vcio))) is None:
        raise ValueError("the firmware tells no rails, as on boards before the Raspberry Pi 5")
    return Watts(watts)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()
