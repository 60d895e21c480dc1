"""This machine's board profile: reads what Linux says, and sets what the profile asks for."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from flowspec_edge.core.device.boards import (
    MIB,
    BoardFacts,
    BoardProfile,
    BoardSettings,
    describe,
    parse_profile,
    recognise,
    settings_for,
)
from flowspec_edge.core.device.throttling import ThermalReport
from flowspec_edge.core.planning.shared_cores import Cores
from flowspec_edge.errors import BoardError, system_words

Thermometer = Callable[[], ThermalReport | None]
"""How hot the board is; None where it does not say."""

PROC, THERMAL, CPUS = Path("/proc"), Path("/sys/class/thermal"), Path("/sys/devices/system/cpu")


def load_profiles() -> list[BoardProfile]:
    """All profiles that come with the package, by name.

    Raises:
        BoardError: one of them cannot be used.
    """
    files = [file for file in resources.files("firmware_configs").iterdir() if file.name.endswith(".toml")]
    files.sort(key=lambda file: file.name)
    return [parse_profile(file.name.removesuffix(".toml"), file.read_text(encoding="utf-8")) for file in files]


def read_facts(proc: Path = PROC) -> BoardFacts:
    """What this machine says of itself; what it does not say is empty."""
    return BoardFacts(
        machine=platform.machine(),
        cpuinfo=_read(proc / "cpuinfo"),
        meminfo=_read(proc / "meminfo"),
        model=_read(proc / "device-tree/model"),
        compatible=_read(proc / "device-tree/compatible"),
    )


def find_profile(wanted: str | None, facts: BoardFacts) -> BoardProfile | None:
    """The profile of that name or file, or the one that fits this machine.

    Raises:
        BoardError: there is none of that name, or it cannot be used.
    """
    if wanted is None:
        return recognise(facts, load_profiles())
    if wanted.endswith(".toml"):
        path = Path(wanted)
        try:
            return parse_profile(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as cause:
            raise BoardError(f"--board {wanted}: cannot be read ({system_words(cause)})") from cause
    profiles = {profile.name: profile for profile in load_profiles()}
    if wanted not in profiles:
        raise BoardError(f"--board {wanted}: no such profile; there are {', '.join(profiles)}, or give a .toml file")
    return profiles[wanted]


def use_board(
    name: str | None = None,
    *,
    num_threads: int | None = None,
    memory_mib: int | None = None,
    keeps_all_cores: bool = False,
) -> tuple[BoardSettings, BoardFacts]:
    """What to do on this machine; from here on this process keeps to the board's big cores.

    ``name`` is a profile's name or TOML file; without one the board is recognised. A user's own ``num_threads`` and
    ``memory_mib`` come before the profile's. With the former, or where it ``keeps_all_cores``, all cores are used.

    Raises:
        BoardError: see :func:`find_profile`.
    """
    facts = read_facts()
    settings = settings_for(facts, find_profile(name, facts), sorted(os.sched_getaffinity(0)))
    if num_threads is None and not keeps_all_cores:
        with contextlib.suppress(OSError):  # a container may forbid it; then the system places the threads
            os.sched_setaffinity(0, settings.cores)
    memory_bytes = settings.memory_bytes if memory_mib is None else memory_mib * MIB
    return replace(settings, num_threads=num_threads or settings.num_threads, memory_bytes=memory_bytes), facts


def describe_board(settings: BoardSettings, facts: BoardFacts) -> str:
    """For the start of a node, with the temperature where there is one to read."""
    profile = settings.profile
    temperature = None if profile is None else read_temperature_c(profile)
    if profile is None or temperature is None:
        return describe(settings, facts)
    return f"{describe(settings, facts)}, {temperature:.0f} of {profile.limit_c:.0f} degrees C"


def cores_of(num_threads: int, proc: Path = PROC) -> Cores:
    """What this process may run on, and the machine: containers on it have other names, and the same kernel."""
    machine = _read(proc / "sys/kernel/random/boot_id").strip()
    return Cores(machine, frozenset(os.sched_getaffinity(0)), num_threads)


def board_report(settings: BoardSettings) -> dict[str, Any]:
    """The same for scripts."""
    return {
        "board": None if settings.profile is None else settings.profile.name,
        "threads": settings.num_threads,
        "cores": list(settings.cores),
        "memory_bytes": settings.memory_bytes,
    }


def read_temperature_c(profile: BoardProfile, thermal: Path = THERMAL) -> float | None:
    """Of the first of the profile's zones that this machine has; None where it has none."""
    found: dict[str, float] = {}
    for zone in sorted(thermal.glob("thermal_zone*")):
        with contextlib.suppress(ValueError):
            found.setdefault(_read(zone / "type").strip(), int(_read(zone / "temp")) / 1000)
    return next((found[name] for name in profile.thermal_zones if name in found), None)


def read_thermal(
    profile: BoardProfile, cores: Sequence[int], thermal: Path = THERMAL, cpus: Path = CPUS
) -> ThermalReport | None:
    """How hot the board is, and how much of their clock it leaves to ``cores``; None where it has no such zone."""
    temperature = read_temperature_c(profile, thermal)
    if temperature is None:
        return None
    shares = [share for core in cores if (share := _clock_share(cpus / f"cpu{core}" / "cpufreq")) is not None]
    return ThermalReport(temperature, profile.limit_c, min(shares, default=1.0))


def thermometer_of(settings: BoardSettings) -> Thermometer | None:
    """Reads the board's heat whenever it is asked; None where the board's zones are not known."""
    if settings.profile is None:
        return None
    return functools.partial(read_thermal, settings.profile, settings.cores)


def _clock_share(policy: Path) -> float | None:
    """What a core may run at of what it can: the kernel lowers the former while the board is hot, whatever the load is
    (Linux, Documentation/admin-guide/pm/cpufreq.rst, scaling_max_freq and cpuinfo_max_freq).
    """
    allowed, highest = _read(policy / "scaling_max_freq").strip(), _read(policy / "cpuinfo_max_freq").strip()
    return int(allowed) / int(highest) if allowed.isdigit() and highest.isdigit() and int(highest) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
