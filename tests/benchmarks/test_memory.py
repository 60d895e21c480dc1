"""What is told of memory, and that plans reckon with what layers, head and drafter take."""

import re
import subprocess
import sys

import pytest

from benchmarks.memory import HEADING, format_row, rows_of
from benchmarks.precisions import PROJECT
from flowspec_edge.bundle import DEMO_BUNDLE

pytestmark = pytest.mark.slow


def test_the_demo_bundle_takes_what_is_planned_however_it_is_used() -> None:
    layer, origin = rows_of(DEMO_BUNDLE, num_threads=1)
    assert (layer["part"], origin["part"]) == ("a layer, `int8`", "head and draft head, `int8`")
    for row in (layer, origin):
        assert row["file_bytes"] < row["loaded_bytes"]
        assert row["used_bytes"] == pytest.approx(row["planned_bytes"], rel=0.2)
        assert row["text_bytes"] == pytest.approx(row["planned_text_bytes"], rel=0.3)
    assert layer["used_bytes"] < layer["loaded_bytes"] + 500_000, "of 128 rows a layer keeps nothing but their cache"
    assert len({line.count("|") for line in (*HEADING.splitlines(), format_row(layer))}) == 1


def test_operators_are_counted_by_themselves() -> None:
    command = [sys.executable, "-m", "benchmarks.memory", "--operators"]
    said = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    few, more, many = map(int, re.findall(r"operators: (\d+) KB", said))
    assert few < more < many
