"""What is measured of a stage, and how it is told; no figure is judged."""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_stage import How, describe_machine, format_table, measure
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.manifest import load_manifest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[2]


def test_a_stage_is_measured_beside_the_machine() -> None:
    rows = list(measure(DEMO_BUNDLE, ["int8"], [1, 16], [16], How(is_cpu_time=True), 1))
    assert [(row["precision"], row["past"], row["n"]) for row in rows] == [("int8", 16, 1), ("int8", 16, 16)]
    weights = sum(block.memory_bytes for block in load_manifest(DEMO_BUNDLE).blocks)
    for row in rows:
        assert row["weight_bytes"] == weights
        assert min(row["bare_ms"], row["step_ms"], row["gigabytes_per_s"], row["gigaflops"]) > 0
        rate = weights / row["bare_ms"] / 1e6  # bytes per ms to GB/s
        assert row["share_of_matrix_vector"] == pytest.approx(rate / row["gigabytes_per_s"])
        assert row["times_the_first"] == pytest.approx(row["bare_ms"] / rows[0]["bare_ms"])
    heading, _, line = format_table([{"shape": "demo", **row} for row in rows]).splitlines()[:3]
    assert heading.startswith("| shape | threads | past | precision | n = 1 | n = 16 |")
    assert line.startswith(f"| demo | 1 | 16 | int8 | {rows[0]['bare_ms']:.1f} | {rows[1]['bare_ms']:.1f} |")


@pytest.mark.skipif(shutil.which("git") is None, reason="the commit is told by git")
def test_figures_name_their_machine_clock_and_commit() -> None:
    machine = describe_machine(How(is_cpu_time=False))
    assert machine["clock"] == "wall" and machine["processor"] and machine["num_cores"] > 0
    assert set(machine) >= {"load_average", "commit", "vector_instructions"}


def test_it_runs_as_a_script() -> None:
    command = [sys.executable, "benchmarks/bench_stage.py", "--help"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "--cpu-time" in done.stdout


def test_the_runtimes_own_product_and_layouts() -> None:
    job = {"products": [2], "threads": 1}
    assert [set(row) for row in run(job)] == [{"product", "rows", "ms", "share_of_matrix_vector"}] * 2
    layouts = {"chained": str(DEMO_BUNDLE), "again": str(DEMO_BUNDLE)}
    (row,) = run({"layouts": layouts, "precisions": ["int8"], "sizes": [2], "threads": 1})
    assert row["n"] == 2 and row["ratio"] > 0


def run(job: Mapping[str, Any]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "benchmarks.stage_measurement", json.dumps(job)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]
