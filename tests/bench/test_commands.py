"""``flowspec bench`` and ``flowspec trace`` as commands: what they refuse, and the files that they write."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flowspec_edge.bench.sessions import format_sessions
from flowspec_edge.bench.testbed import parse_testbed
from flowspec_edge.cli.main import main

BENCH = ("bench", "--virtual")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*BENCH, "--testbed", "nope"), "choose one of"),
        ((*BENCH, "--schedules", "fast"), "schedule 'fast' is not known"),
        ((*BENCH, "--schedules", "chunked,"), "--schedules is 'chunked,'"),
        ((*BENCH, "--prompts", "poems"), "choose quick, all, or some of functions"),
        ((*BENCH, "--temperature", "warm"), "as in 0,0.6,1"),
        ((*BENCH, "--temperature", "-1"), "temperature is -1.0"),
        ((*BENCH, "--num-prompts", "0"), "--num-prompts is 0"),
        ((*BENCH, "--max-new-tokens", "0"), "max_new_tokens is 0"),
        ((*BENCH, "--processes", "0"), "--processes is 0"),
        ((*BENCH, "--sessions", "0"), "--sessions is '0'; give numbers from 1 to 64, as in 1,2,4"),
        ((*BENCH, "--sessions", "2,many"), "--sessions is '2,many'"),
        ((*BENCH, "--sessions", "2", "--ablate"), "--sessions goes with --virtual"),
        (("bench", "--emulate", "--sessions", "2"), "--sessions goes with --virtual"),
        (("bench", "--calibrate", "--threads", "0"), "--threads is 0"),
        (("bench", "--calibrate", "--chunk-sizes", "4,none"), "--chunk-sizes is '4,none'; give numbers of rows from 1"),
        (("bench", "--calibrate", "--chunk-sizes", "0"), "--chunk-sizes is '0'; give numbers of rows from 1 to 512"),
        (("trace", "--out", "x.png"), "ends in .svg"),
        (("trace", "--out", "x.svg", "--index", "99"), "prompts 0 to 23"),
        (("trace", "--out", "x.svg", "--schedule", "galaxy"), "schedule 'galaxy' is not known"),
        (("trace", "--out", "/nowhere/x.svg", "--max-new-tokens", "2"), "/nowhere/x.svg: cannot be written"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    assert printed[0].startswith(f"flowspec {arguments[0]}: ") and said in printed[0]


def test_a_mode_must_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench"])
    assert "--virtual --emulate --calibrate" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["flowspec", "lockstep"])
def test_trace_draws_every_stage(schedule: str, tmp_path: Path) -> None:
    out = tmp_path / "trace.svg"
    arguments = ["trace", "--schedule", schedule, "--testbed", "mixed", "--max-new-tokens", "12", "--out", str(out)]
    assert main(arguments) == 0
    picture = out.read_text()
    ElementTree.fromstring(picture)
    for text in ("origin", "stage 0", "stage 3", "layers [20, 24)", schedule):
        assert text in picture


@pytest.mark.slow
def test_bench_prints_the_same_digits_twice_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*BENCH, "--testbed", "mixed", "--prompts", "functions,tables", "--num-prompts", "1", "--json"]
    arguments += ["--max-new-tokens", "12", "--plot", str(tmp_path)]
    printed = []
    for _ in range(2):
        assert main(arguments) == 0
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out
    report = json.loads(printed[0].out)
    schedules = {"mega-lm", "galaxy", "autoregressive", "chunked", "pruned", "pipedec", "lockstep", "flowspec"}
    assert {row["schedule"] for row in report["rows"]} == schedules == set(report["mean"])
    assert "2 of 2 prompts" in printed[0].err
    ElementTree.fromstring((tmp_path / "mixed.svg").read_text())


@pytest.mark.slow
def test_bench_compares_numbers_of_sessions(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--prompts", "functions", "--num-prompts", "3", "--max-new-tokens", "8"]
    assert main([*BENCH, "--sessions", "3", *few, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    one, three = report["rows"]
    assert (one["sessions"], one["over_one_session"], three["sessions"]) == (1, 1.0, 3)
    assert three["tokens_per_s"] == pytest.approx(three["over_one_session"] * one["tokens_per_s"])
    assert 1 < three["over_one_session"] <= 3
    assert 0 < three["lowest_share"] <= 1
    table = format_sessions(report)
    assert f"| {three['tokens_per_s']:.2f} |" in " ".join(table.split()) and "lowest share" in table


def test_calibration_prints_a_testbed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--calibrate"]) == 0
    testbed = parse_testbed(capsys.readouterr().out, "here", "here")
    assert testbed.stages[0].num_layers == 8
    assert testbed.stages[0].fixed_ms > 0
    assert main(["bench", "--calibrate", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) >= {"fixed_ms", "row_ms", "head_ms", "draft_pass_ms", "forward_ms"}
