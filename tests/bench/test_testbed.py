"""Testbed files: those of the package are sound, and a wrong one is refused with a sentence that names the fault."""

from pathlib import Path

import pytest

from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.bench.testbed import Testbed, load_testbed, parse_testbed
from flowspec_edge.errors import TestbedError

SOUND = """
summary = "one board"

[model]
hidden_size = 512
bytes_per_value = 2
source = "a model"

[network]
hop_ms = 1
rate_mbit_per_s = 100.0
source = "a cable"

[origin]
head_ms = 2.0
draft_pass_ms = 3.0
draft_row_ms = 0.5
source = "a guess"

[[stages]]
count = 3
device = "a board"
num_layers = 4
fixed_ms = 10.0
row_ms = 0.5
source = "a stopwatch"
"""


def parse(text: str) -> Testbed:
    return parse_testbed(text, "mine", "mine.toml")


def test_the_packages_testbeds() -> None:
    names = known_testbeds()
    assert {
        *("jetson4-7b-fp16-1gbit", "jetson4-7b-fp16-150mbit", "jetson4-7b-int4-1gbit", "jetson4-7b-int4-150mbit"),
        *("jetson4-13b-4bit", "jetson8-7b-fp16", "pi5x4-3b-int4", "mixed"),
    } <= set(names)
    assert [load_testbed(name).name for name in names] == names


def test_values_and_times() -> None:
    testbed = parse(SOUND)
    assert (len(testbed.stages), testbed.num_layers, testbed.hidden_bytes) == (3, 12, 1024)
    assert testbed.forward_ms(0, 4) == 12.0
    assert testbed.draft_ms(10) == 3.0
    assert testbed.draft_ms(14) == 5.0
    assert testbed.transfer_ms(12_500) == 1.0
    # Three forwards of 12 ms, four hops of 1 ms, three transfers of 4 KiB at 100 Mbit/s, the head.
    assert testbed.trip_ms(4) == pytest.approx(36 + 4 + 3 * 4096 * 8 / 1e5 + 2)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(SOUND)
    assert load_testbed(str(path)) == parse(SOUND)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hop_ms = 1", "hop_ms = -1", r"\[network\]: hop_ms is -1"),
        ("hop_ms = 1", "hop = 1", r"\[network\]: hop_ms is missing"),
        ("hop_ms = 1", "hop_ms = 1\nhops = 1", "'hops' is not known; the keys here are hop_ms"),
        ("rate_mbit_per_s = 100.0", "rate_mbit_per_s = 0", "rate_mbit_per_s is 0; it must be above 0"),
        ("fixed_ms = 10.0", 'fixed_ms = "10"', r"\[stages 0\]: fixed_ms is '10'"),
        ("fixed_ms = 10.0", "fixed_ms = nan", "fixed_ms is nan"),
        ("num_layers = 4", "num_layers = 4.5", "num_layers is 4.5; it must be a whole number"),
        ("count = 3", "count = true", "count is True"),
        ('source = "a cable"', "", r"\[network\]: source is missing"),
        ('source = "a stopwatch"', 'source = " "', r"\[stages 0\]: source is ' '; it must be a text"),
        ("[[stages]]", "[stages]", r"stages must be one or more tables, \[\[stages\]\]"),
        ("[origin]", "[home]", "origin is missing"),
        ("[model]", "[model", "not a TOML file"),
    ],
)
def test_a_fault_is_named(old: str, new: str, said: str) -> None:
    with pytest.raises(TestbedError, match=said) as caught:
        parse(SOUND.replace(old, new, 1))
    assert str(caught.value).startswith("mine.toml")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(TestbedError, match=r"'nope' is not known; choose one of .*mixed"):
        load_testbed("nope")
    with pytest.raises(TestbedError, match="cannot be read"):
        load_testbed("/nowhere/mine.toml")
