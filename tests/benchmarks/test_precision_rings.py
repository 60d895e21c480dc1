"""Rings of machines alike, each in a precision."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import precision_rings
from benchmarks.precision_rings import main, ring_of
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.testbed import Testbed

ROWS = {"1": 22.0, "4": 28.0, "16": 52.0}  # ms: 20 + 2 n
COSTS: dict[str, Any] = {"num_layers": 8, "hidden_size": 64, "head_ms": 1.0, "draft_ms": 1.0}


def test_machines_share_what_all_layers_take() -> None:
    for number in (1, 4):
        ring = ring_of({"precision": "w8a8", "cpu_ms": ROWS}, number, **COSTS)
        assert len(ring.stages) == number
        for num_rows in (1, 30):
            took_ms = sum(stage.forward_ms(num_rows) for stage in ring.stages)
            assert took_ms == pytest.approx(20 + 2 * num_rows)


def test_a_line_of_the_table_is_that_of_its_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_time(_: Request, rings: Sequence[Testbed]) -> list[dict[str, float]]:
        return [{name: 1000 / ring.trip_ms(1) for name in precision_rings.SCHEDULES} for ring in rings]

    monkeypatch.setattr(precision_rings, "measure", by_time)
    rows = [{"precision": "w8a8", "cpu_ms": ROWS}, {"precision": "fp32", "cpu_ms": dict.fromkeys(ROWS, 90.0)}]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(sys, "argv", ["precision_rings", str(tmp_path / "rows.json"), "--machines", "1"])
    main()
    *_, quick, slow = capsys.readouterr().out.splitlines()
    assert quick.split() == ["|", "`w8a8`", "|", "34.5,", "34.5", "|"]
    assert slow.split() == ["|", "`fp32`", "|", "10.3,", "10.3", "|"]
