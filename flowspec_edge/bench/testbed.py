"""Testbeds: descriptions of boards and networks on which schedules are compared, one TOML file each.

A file has the tables ``[model]``, ``[network]``, ``[origin]`` and one or more ``[[stages]]``; units are in the names of
the keys. Every table says in ``source`` where its values come from: measured, published, or modelled and how.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec_edge.bench.known_testbeds import TESTBEDS, known_testbeds
from flowspec_edge.core.line import Line
from flowspec_edge.core.rows import Chunk
from flowspec_edge.core.speculation.prefill import RingTimes
from flowspec_edge.core.wire import ROW_BYTES
from flowspec_edge.errors import TestbedError

DRAFT_PASS_ROWS = 10
"""``draft_pass_ms`` is the time of a pass of the draft head over this many rows, the width of the paper's drafts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """What a stage costs: a forward of its ``num_layers`` layers over ``n`` rows takes ``fixed_ms + n * row_ms``.

    ``memory_bytes`` is what the board may use for its layers, 0 where that is not given.
    """

    fixed_ms: float
    row_ms: float
    num_layers: int
    device: str = ""
    memory_bytes: int = 0

    def layer_ms(self, num_rows: float) -> float:
        """The time of one layer.

        A cancelled forward goes on for no longer, since it ends with the layer that is running.
        """
        return self.forward_ms(num_rows) / self.num_layers

    def forward_ms(self, num_rows: float) -> float:
        return self.fixed_ms + num_rows * self.row_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    """Described devices and their network.

    A hop takes ``hop_ms``, and the time of its bytes at ``rate_mbit_per_s``, one chunk after another; a hidden row has
    ``hidden_bytes`` on the wire. Small messages (credits, Advances) take ``hop_ms``. The origin computes one thing at a
    time: a run of the head takes ``head_ms``, and a pass of the draft head ``draft_pass_ms`` for up to ten rows, with
    ``draft_row_ms`` for each row more. ``layer_bytes`` is a layer's weights in memory, 0 where that is not given.
    """

    __test__ = False  # tells pytest that this is no test, whatever its name

    name: str
    stages: tuple[StageCost, ...]
    hop_ms: float
    rate_mbit_per_s: float
    hidden_bytes: int
    head_ms: float
    draft_pass_ms: float
    draft_row_ms: float
    summary: str = ""
    layer_bytes: int = 0

    @property
    def num_layers(self) -> int:
        return sum(stage.num_layers for stage in self.stages)

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """The blocks of each stage, behind each of which a forward may be given up: its layers."""
        return tuple(stage.num_layers for stage in self.stages)

    @property
    def ring_times(self) -> RingTimes:
        """What a plan would know of the ring."""
        row_ms = self.transfer_ms(self.hidden_bytes)
        return RingTimes(
            tuple(Line(stage.fixed_ms, stage.row_ms).scaled(1e-3) for stage in self.stages),
            (Line(self.hop_ms, row_ms).scaled(1e-3),) * len(self.stages),
        )

    def forward_ms(self, stage: int, num_rows: int) -> float:
        return self.stages[stage].forward_ms(num_rows)

    def chunk_bytes(self, chunk: Chunk) -> int:
        """Bytes of a chunk on the wire."""
        return len(chunk.rows) * (ROW_BYTES + (self.hidden_bytes if chunk.hidden is not None else 0))

    def transfer_ms(self, num_bytes: float) -> float:
        """Time that bytes take on the wire, without the hop's latency."""
        return num_bytes * 8 / (self.rate_mbit_per_s * 1000)

    def draft_ms(self, num_rows: int) -> float:
        return self.draft_pass_ms + max(num_rows - DRAFT_PASS_ROWS, 0) * self.draft_row_ms

    def trip_ms(self, num_rows: float) -> float:
        """Time of a chunk of ``num_rows`` from the origin around the ring and through the head, without any waiting."""
        num_stages = len(self.stages)
        forwards = sum(stage.forward_ms(num_rows) for stage in self.stages)
        transfers = num_stages * self.transfer_ms(num_rows * self.hidden_bytes)
        return forwards + (num_stages + 1) * self.hop_ms + transfers + self.head_ms


def load_testbed(name: str) -> Testbed:
    """Load a testbed of the package by its name, or any other by the path of its file, which ends in ``.toml``.

    Raises:
        TestbedError: there is no such testbed, or its file is not as this module describes.
    """
    path = Path(name) if name.endswith(".toml") else TESTBEDS / f"{name}.toml"
    try:
        return parse_testbed(path.read_text(encoding="utf-8"), path.stem, str(path))
    except OSError as cause:
        if name.endswith(".toml"):
            raise TestbedError(f"testbed {name}: cannot be read ({cause.strerror})") from cause
        known = ", ".join(known_testbeds())
        raise TestbedError(
            f"testbed {name!r} is not known; choose one of {known}, or the path of a .toml file"
        ) from cause


def parse_testbed(text: str, name: str, where: str) -> Testbed:
    """Read a testbed from the text of a file, which errors call ``where``.

    Raises:
        TestbedError: the text is not TOML; a key is missing or unknown; a value has the wrong type or sign.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as cause:
        raise TestbedError(f"{where}: not a TOML file ({cause})") from cause
    root = _Table(data, where, "")
    summary = root.text("summary")
    model, network, origin = root.table("model"), root.table("network"), root.table("origin")
    stages = [stage for entry in root.tables("stages") for stage in _stages(entry)]
    root.finish()
    testbed = Testbed(
        name=name,
        summary=summary,
        stages=tuple(stages),
        hop_ms=network.number("hop_ms"),
        rate_mbit_per_s=network.number("rate_mbit_per_s", is_positive=True),
        hidden_bytes=model.count("hidden_size") * model.count("bytes_per_value"),
        head_ms=origin.number("head_ms"),
        draft_pass_ms=origin.number("draft_pass_ms"),
        draft_row_ms=origin.number("draft_row_ms"),
        layer_bytes=model.count("layer_mib") * 2**20 if "layer_mib" in model else 0,
    )
    for table in (model, network, origin):
        table.text("source")
        table.finish()
    return testbed


def describe_testbed(testbed: Testbed, source: str) -> str:
    """The text of a file that describes the testbed."""
    lines = [
        f"summary = {json.dumps(testbed.summary or testbed.name)}",
        "",
        "[model]",
        f"hidden_size = {testbed.hidden_bytes}",
        "bytes_per_value = 1",
        f"source = {json.dumps(source)}",
        "",
        "[network]",
        f"hop_ms = {testbed.hop_ms!r}",
        f"rate_mbit_per_s = {testbed.rate_mbit_per_s!r}",
        f"source = {json.dumps(source)}",
        "",
        "[origin]",
        f"head_ms = {testbed.head_ms!r}",
        f"draft_pass_ms = {testbed.draft_pass_ms!r}",
        f"draft_row_ms = {testbed.draft_row_ms!r}",
        f"source = {json.dumps(source)}",
    ]
    for stage in testbed.stages:
        lines += ["", "[[stages]]", f"device = {json.dumps(stage.device or 'a board')}"]
        lines += [f"num_layers = {stage.num_layers}", f"fixed_ms = {stage.fixed_ms!r}", f"row_ms = {stage.row_ms!r}"]
        lines += [f"source = {json.dumps(source)}"]
    return "\n".join(lines) + "\n"


def _stages(entry: _Table) -> list[StageCost]:
    stage = StageCost(
        device=entry.text("device"),
        num_layers=entry.count("num_layers"),
        fixed_ms=entry.number("fixed_ms", is_positive=True),
        row_ms=entry.number("row_ms"),
        memory_bytes=entry.count("memory_mib") * 2**20 if "memory_mib" in entry else 0,
    )
    count = entry.count("count") if "count" in entry else 1
    entry.text("source")
    entry.finish()
    return [stage] * count


class _Table:
    """One table of a file. Values are taken out by name and type, and none may remain."""

    def __init__(self, values: dict[str, Any], where: str, name: str) -> None:
        self._values = dict(values)
        self._known: list[str] = []
        self._where = f"{where}: [{name}]" if name else where

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def text(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str) or not value.strip():
            raise TestbedError(f"{self._where}: {key} is {value!r}; it must be a text")
        return value

    def number(self, key: str, *, is_positive: bool = False) -> float:
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise TestbedError(f"{self._where}: {key} is {value!r}; it must be a number of at least 0")
        if is_positive and not value:
            raise TestbedError(f"{self._where}: {key} is {value!r}; it must be above 0")
        return float(value)

    def count(self, key: str) -> int:
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise TestbedError(f"{self._where}: {key} is {value!r}; it must be a whole number of at least 1")
        return value

    def table(self, key: str) -> _Table:
        value = self._take(key)
        if not isinstance(value, dict):
            raise TestbedError(f"{self._where}: {key} must be a table, [{key}]")
        return _Table(value, self._where, key)

    def tables(self, key: str) -> Sequence[_Table]:
        value = self._take(key)
        if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
            raise TestbedError(f"{self._where}: {key} must be one or more tables, [[{key}]]")
        return [_Table(entry, self._where, f"{key} {number}") for number, entry in enumerate(value)]

    def finish(self) -> None:
        """Raise TestbedError where a key was not asked for, so that no misspelt key silently becomes a default."""
        for key in self._values:
            raise TestbedError(f"{self._where}: key {key!r} is not known; the keys here are {', '.join(self._known)}")

    def _take(self, key: str) -> Any:
        self._known.append(key)
        if key not in self._values:
            raise TestbedError(f"{self._where}: {key} is missing")
        return self._values.pop(key)
