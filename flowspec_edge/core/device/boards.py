"""Recognises a board by what Linux says of it, and chooses threads, cores and memory. No file is read here."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from flowspec_edge.core.device.caps import TEMPERATURE_BOUNDS_C, WATTS_BOUNDS, Caps
from flowspec_edge.errors import BoardError

PRECISIONS = ("fp32", "fp16", "int8", "q8", "w8a8", "int4")
PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider", "ACLExecutionProvider")
MEASURED, MODELLED = "measured", "modelled"
SMALL_CORES = frozenset({"0xd03", "0xd04", "0xd05", "0xd46", "0xd80"})
"""The CPU parts of Arm's small cores: Cortex-A53, A35, A55, A510, A520 (Arm technical reference manuals, MIDR_EL1)."""
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFacts:
    """What Linux says of a machine: /proc/device-tree/model and compatible, /proc/cpuinfo, /proc/meminfo, uname -m."""

    machine: str
    cpuinfo: str = ""
    meminfo: str = ""
    model: str = ""
    compatible: str = ""

    @property
    def model_name(self) -> str:
        """The device tree's model. A container does not see it, but a Raspberry Pi's kernel repeats it in cpuinfo."""
        return self.model.strip("\0\n ") or _last_value(self.cpuinfo, "Model")

    @property
    def compatible_names(self) -> list[str]:
        return [name for name in self.compatible.split("\0") if name.strip()]

    @property
    def core_parts(self) -> dict[int, str]:
        """The CPU part of each processor, by its number; empty on x86, where there are none."""
        parts: dict[int, str] = {}
        number = None
        for key, value in _entries(self.cpuinfo):
            if key == "processor" and value.isdigit():
                number = int(value)
            elif key == "CPU part" and number is not None:
                parts[number] = value.lower()
        return parts

    @property
    def available_bytes(self) -> int:
        """The memory that is available without swapping; 0 where it is unknown."""
        value = _last_value(self.meminfo, "MemAvailable").split()
        return int(value[0]) * 1024 if value and value[0].isdigit() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A published measurement of a board.

    ``date`` is when it was measured, ``seen`` when it was read at its ``source``.
    """

    what: str
    value: float
    unit: str
    source: str
    date: str = ""
    seen: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """The time of a stage on a board: ``fixed_ms + n * row_ms`` for a chunk of ``n`` rows.

    The stage has ``num_layers`` layers of the model that ``what`` names. ``basis`` is MEASURED or MODELLED, and
    ``source`` says by whom it was measured, or how it was modelled.
    """

    what: str
    precision: str
    num_layers: int
    fixed_ms: float
    row_ms: float
    basis: str
    source: str
    date: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardProfile:
    """The contents of one file of ``firmware_configs``, whose README explains the keys.

    ``big_cores`` are the numbers of the big cores, empty where all are alike or where cpuinfo tells them. More threads
    than ``num_threads`` do not make a stage faster. ``power_sensors`` are sums of rails that are the board's input, of
    which the first that is there counts.
    """

    name: str
    title: str
    models: tuple[str, ...]
    compatible: tuple[str, ...]
    machines: tuple[str, ...]
    num_cores: int
    big_cores: tuple[int, ...]
    num_threads: int
    allows_spinning: bool
    memory_share: float
    reserve_mib: int
    providers: tuple[str, ...]
    precisions: tuple[str, ...]
    thermal_zones: tuple[str, ...]
    limit_c: float
    limit_source: str
    power_sensors: tuple[str, ...]
    caps: Caps
    stages: tuple[StageTiming, ...]
    figures: tuple[Figure, ...]
    figures_note: str

    @property
    def is_generic(self) -> bool:
        """Whether the profile is recognised by the kind of processor alone."""
        return not self.models and not self.compatible


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardSettings:
    """What a node uses of this machine: its ``cores``, the threads of each stage, and the memory for layers."""

    profile: BoardProfile | None
    cores: tuple[int, ...]
    num_threads: int
    memory_bytes: int


def recognise(facts: BoardFacts, profiles: Sequence[BoardProfile]) -> BoardProfile | None:
    """The profile of a board; None where there is none.

    A profile that names the model comes first, then one that names what the board is compatible with, then that of the
    kind of processor. The device tree lists the most specific compatible name first.
    """
    here = [profile for profile in profiles if facts.machine in profile.machines]
    for profile in here:
        if any(fnmatchcase(facts.model_name, pattern) for pattern in profile.models):
            return profile
    for name in facts.compatible_names:
        for profile in here:
            if any(fnmatchcase(name, pattern) for pattern in profile.compatible):
                return profile
    return next((profile for profile in here if profile.is_generic), None)


def settings_for(facts: BoardFacts, profile: BoardProfile | None, usable_cores: Sequence[int]) -> BoardSettings:
    """Choose settings among ``usable_cores``, on which this process may run.

    Where some are big, only those are used.
    """
    big = set(profile.big_cores) if profile is not None and profile.big_cores else _big_by_part(facts.core_parts)
    cores = tuple(sorted(core for core in usable_cores if core in big) or sorted(usable_cores))
    num_threads = len(cores) if profile is None else min(len(cores), profile.num_threads)
    available = facts.available_bytes
    memory = int(available * (0.8 if profile is None else profile.memory_share))
    if profile is not None:
        memory = min(memory, available - profile.reserve_mib * MIB)
    return BoardSettings(profile=profile, cores=cores, num_threads=max(num_threads, 1), memory_bytes=max(memory, 0))


def _big_by_part(parts: Mapping[int, str]) -> set[int]:
    big = {core for core, part in parts.items() if part not in SMALL_CORES}
    return big or set(parts)


def parse_profile(name: str, text: str) -> BoardProfile:
    """A profile from the text of its file.

    Raises:
        BoardError: a key is missing, unknown, of the wrong kind or out of range; with the file's name and the key.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as cause:
        raise BoardError(f"{name}.toml: not readable as TOML ({cause})") from cause
    reader = _Reader(name, data)
    profile = BoardProfile(
        name=name,
        title=reader.text("", "title"),
        models=reader.texts("recognise", "models"),
        compatible=reader.texts("recognise", "compatible"),
        machines=reader.texts("recognise", "machines"),
        num_cores=int(reader.number("cpu", "num_cores", 1, 1024)),
        big_cores=reader.cores("cpu", "big_cores"),
        num_threads=int(reader.number("cpu", "num_threads", 1, 1024)),
        allows_spinning=reader.flag("cpu", "allows_spinning"),
        memory_share=reader.number("memory", "share", 0.1, 1.0),
        reserve_mib=int(reader.number("memory", "reserve_mib", 0, 65536)),
        providers=reader.texts("engine", "providers", PROVIDERS),
        precisions=reader.texts("engine", "precisions", PRECISIONS),
        thermal_zones=reader.texts("thermal", "zones"),
        limit_c=reader.number("thermal", "limit_c", 40, 110),
        limit_source=reader.text("thermal", "limit_source"),
        power_sensors=reader.texts("power", "sensors") if reader.has("power", "sensors") else (),
        caps=reader.caps(),
        stages=reader.stages(),
        figures=reader.figures(),
        figures_note=reader.text("", "figures_note"),
    )
    reader.finish()
    if any(core >= profile.num_cores for core in profile.big_cores):
        raise BoardError(f"{name}.toml: cpu.big_cores names a core beyond the {profile.num_cores} there are")
    if not profile.machines or "CPUExecutionProvider" not in profile.providers or not profile.precisions:
        raise BoardError(f"{name}.toml: machines, precisions and the CPUExecutionProvider must be named")
    return profile


_Entry = TypeVar("_Entry", Figure, StageTiming)


class _Reader:
    """Takes keys out of a file's tables and checks their values. Keys that nobody takes are refused in the end."""

    def __init__(self, name: str, data: dict[str, Any]) -> None:
        self._name = name
        self._data = data

    def text(self, table: str, key: str) -> str:
        value = self._take(table, key)
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(table, key, value, "a text")
        return value

    def texts(self, table: str, key: str, known: Sequence[str] | None = None) -> tuple[str, ...]:
        value = self._take(table, key)
        if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
            raise self._wrong(table, key, value, "a list of texts")
        for text in value:
            if known is not None and text not in known:
                raise self._wrong(table, key, text, f"one of {', '.join(known)}")
        return tuple(value)

    def cores(self, table: str, key: str) -> tuple[int, ...]:
        value = self._take(table, key)
        if not isinstance(value, list) or not all(type(core) is int and core >= 0 for core in value):
            raise self._wrong(table, key, value, "a list of processor numbers")
        return tuple(value)

    def number(self, table: str, key: str, low: float, high: float) -> float:
        value = self._take(table, key)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self._wrong(table, key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, table: str, key: str) -> bool:
        value = self._take(table, key)
        if type(value) is not bool:
            raise self._wrong(table, key, value, "true or false")
        return value

    def has(self, table: str, key: str) -> bool:
        """Whether a key that may be left out is there."""
        return isinstance(found := self._data.get(table), dict) and key in found

    def caps(self) -> Caps:
        watts, heat = (
            self.number("pacing", key, *bounds) if self.has("pacing", key) else None
            for key, bounds in (("max_watts", WATTS_BOUNDS), ("max_temperature_c", TEMPERATURE_BOUNDS_C))
        )
        return Caps(watts, heat)

    def stages(self) -> tuple[StageTiming, ...]:
        stages = self._entries("stages", StageTiming)
        for stage in stages:
            has_texts = all(isinstance(text, str) and text for text in (stage.what, stage.source, stage.date))
            has_times = all(type(ms) in (int, float) and ms >= 0 for ms in (stage.fixed_ms, stage.row_ms))
            if not has_texts or not has_times or stage.fixed_ms + stage.row_ms <= 0:
                raise BoardError(f"{self._name}.toml: stages: {stage.what!r:.60} lacks milliseconds, source or date")
            known = stage.precision in PRECISIONS and stage.basis in (MEASURED, MODELLED)
            if not known or type(stage.num_layers) is not int or stage.num_layers < 1:
                raise BoardError(
                    f"{self._name}.toml: stages: {stage.what!r:.60}: precision is one of {', '.join(PRECISIONS)}, "
                    f"basis {MEASURED} or {MODELLED}, num_layers at least 1"
                )
        return stages

    def figures(self) -> tuple[Figure, ...]:
        figures = self._entries("figures", Figure)
        for figure in figures:
            is_complete = all(isinstance(text, str) for text in (figure.what, figure.unit, figure.source, figure.date))
            if not is_complete or type(figure.value) not in (int, float) or not figure.source.startswith("https://"):
                raise BoardError(
                    f"{self._name}.toml: figures: {figure.what!r:.60} lacks a value or the address of its source"
                )
            if not (figure.date or figure.seen):
                raise BoardError(f"{self._name}.toml: figures: {figure.what!r:.60} has neither date nor seen")
        return figures

    def _entries(self, table: str, kind: type[_Entry]) -> tuple[_Entry, ...]:
        try:
            return tuple(kind(**entry) for entry in self._data.pop(table, []))
        except TypeError as cause:
            raise BoardError(f"{self._name}.toml: {table}: a key is missing or unknown ({cause})") from cause

    def finish(self) -> None:
        """Raise BoardError where a key was not taken, so that no mistyped key is ignored."""
        left = [key for key, value in self._data.items() if value or not isinstance(value, dict)]
        if left:
            inner = self._data[left[0]]
            more = f".{next(iter(inner))}" if isinstance(inner, dict) else ""
            raise BoardError(f"{self._name}.toml: unknown key {left[0]}{more}")

    def _take(self, table: str, key: str) -> Any:
        place = self._data.get(table) if table else self._data
        if not isinstance(place, dict) or key not in place:
            raise BoardError(f"{self._name}.toml: {f'{table}.' if table else ''}{key} is missing")
        return place.pop(key)

    def _wrong(self, table: str, key: str, value: Any, wanted: str) -> BoardError:
        return BoardError(
            f"{self._name}.toml: {f'{table}.' if table else ''}{key} is {value!r:.60}; it must be {wanted}"
        )


def _entries(text: str) -> list[tuple[str, str]]:
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return [(key.strip(), value.strip()) for key, value in pairs]


def _last_value(text: str, key: str) -> str:
    return next((value for name, value in reversed(_entries(text)) if name == key), "")


def describe(settings: BoardSettings, facts: BoardFacts) -> str:
    """The line about its board that a node prints when it starts."""
    profile = settings.profile
    title = "a machine of no known kind" if profile is None else profile.title
    name = f" ({facts.model_name})" if facts.model_name and profile is not None and not profile.is_generic else ""
    cores = _ranges(settings.cores)
    memory = f"{settings.memory_bytes / MIB:.0f} MiB for layers"
    return f"board: {title}{name}; {settings.num_threads} threads on cores {cores}, {memory}"


def _ranges(cores: Sequence[int]) -> str:
    """``0-3,6`` for 0, 1, 2, 3, 6."""
    texts: list[str] = []
    start = last = None
    for core in [*cores, None]:
        if start is not None and core != (last or 0) + 1:
            texts.append(f"{start}" if start == last else f"{start}-{last}")
            start = None
        if start is None:
            start = core
        last = core
    return ",".join(texts)
