"""One command for all parts: what it runs, what it prints and writes down, and when it fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from tests.chaos import __main__ as program
from tests.chaos import parts
from tests.chaos.asking import Text
from tests.chaos.parts import Outcome, Part, Tell
from tests.chaos.rounds import Round, as_markdown, summary
from tests.yielding import yield_to_others

GOOD = Outcome([], "7 things were tried", {"things": 7}, "| thing |\n|---|\n| 7 |")


def good(num: int, seed: int, tell: Tell) -> Outcome:
    tell(0.5, f"half of {num} with seed {seed}")
    return GOOD


def bad(num: int, seed: int, tell: Tell) -> Outcome:
    return Outcome(["thing 3 is wrong"], "7 things were tried", {}, "")


def broken(num: int, seed: int, tell: Tell) -> Outcome:
    raise KeyError("no such thing")


def run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tried: dict[str, Part], *arguments: str
) -> tuple[int, dict[str, dict[str, object]]]:
    monkeypatch.setattr(program, "PARTS", tried)
    monkeypatch.setattr("sys.argv", ["chaos", "--json", str(tmp_path / "chaos.json"), *arguments])
    status = program.main()
    return status, json.loads((tmp_path / "chaos.json").read_text())["parts"]


def test_all_parts_are_run_and_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, told = run(monkeypatch, tmp_path, {"one": Part(10, 60.0, good), "two": Part(5, 600.0, good)}, "--seed", "4")
    out, err = capsys.readouterr()
    assert status == 0 and [part["passed"] for part in told.values()] == [True, True]
    assert "one   passed  0:00  7 things were tried" in out
    assert "0:00, 11:00 left: one 0% begins" in err and "one 50% half of 10 with seed 4" in err


def test_parts_that_yield_run_beside_the_others_and_hear_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    has_begun, told_that_it_yields = threading.Event(), list[bool]()

    def waits(num: int, seed: int, tell: Tell) -> Outcome:
        assert has_begun.wait(10), "nothing runs beside it"
        return GOOD

    def yields(num: int, seed: int, tell: Tell, *, yields: bool = False) -> Outcome:
        told_that_it_yields.append(yields)
        has_begun.set()
        return GOOD

    tried = {"one": Part(10, 60.0, waits), "two": Part(10, 60.0, yields, yields=True), "three": Part(10, 60.0, good)}
    status, told = run(monkeypatch, tmp_path, tried)
    assert status == 0 and list(told) == ["one", "two", "three"] and told_that_it_yields == [True]
    assert run(monkeypatch, tmp_path, tried, "--only", "two")[0] == 0 and told_that_it_yields == [True, False]


def test_whoever_is_interrupted_waits_for_nothing_beside_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ended = threading.Event()
    has_begun = threading.Event()

    def interrupted(num: int, seed: int, tell: Tell) -> Outcome:
        assert has_begun.wait(10)
        raise KeyboardInterrupt

    def endless(num: int, seed: int, tell: Tell, *, yields: bool) -> Outcome:
        has_begun.set()
        try:
            while True:
                tell(0.5, "")
        finally:
            ended.set()

    tried = {"one": Part(10, 60.0, interrupted), "two": Part(10, 60.0, endless, yields=True)}
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, tried)
    assert ended.is_set()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such class")
def test_processes_that_yield_have_the_lowest_class(monkeypatch: pytest.MonkeyPatch) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), yield_to_others) as pool:
        assert pool.submit(os.sched_getscheduler, 0).result() == os.SCHED_IDLE


def test_what_is_found_fails_it_and_the_other_parts_are_run_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = {"one": Part(10, 60.0, broken), "two": Part(10, 60.0, bad), "three": Part(10, 60.0, good)}
    status, told = run(monkeypatch, tmp_path, tried)
    out, err = capsys.readouterr()
    assert status == 1 and [part["passed"] for part in told.values()] == [False, False, True]
    assert "FAILED (1)" in out and "two: thing 3 is wrong" in err and "KeyError" in str(told["one"]["found"])


def test_a_part_that_cannot_be_run_here_fails_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parts, "why_not", lambda: "network namespaces need root")
    status, told = run(monkeypatch, tmp_path, {"one": Part(10, 60.0, good, needs_lan=True)})
    assert status == 1 and told["one"]["found"] == ["network namespaces need root"]


def test_one_part_is_run_alone_as_often_as_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = {"one": Part(10, 60.0, bad), "two": Part(10, 60.0, good)}
    arguments = ("--only", "two", "--two", "3", "--seed", "9", "--markdown")
    status, told = run(monkeypatch, tmp_path, tried, *arguments)
    out, err = capsys.readouterr()
    assert status == 0 and list(told) == ["two"] and told["two"]["num"] == 3 and "half of 3" in err
    assert out.startswith("`python -m tests.chaos --only two --seed 9` (0:00 min): 7 things were tried.\n\n| thing |")


def test_the_parts_that_need_no_lan_say_in_a_sentence_and_a_table_what_they_tried() -> None:
    shares: list[float] = []

    def tell(share: float, what: str) -> None:
        shares.append(share)

    fuzzed = parts.PARTS["fuzz"].run(300, 1, tell)
    assert fuzzed.found == [] and fuzzed.summary.startswith("300 inputs; ") and "| frames | " in fuzzed.markdown
    played = parts.PARTS["interleavings"].run(6, 1, tell)
    assert all(found.startswith("was never met: ") for found in played.found), "six cases cannot meet everything"
    assert played.summary.startswith("6 cases, ") and "| link lost | " in played.markdown
    assert 0 < shares[0] <= 1 and shares[-1] == 1.0


def test_the_table_of_rounds_has_a_dash_where_nothing_was_measured() -> None:
    text = Text(is_equal=True, end="length", pause_s=0.1, flowing_s=None, error="")
    unseen = Round(
        fault="killed",
        node=0,
        num_nodes=3,
        is_memory_short=False,
        struck_at_s=0.1,
        seen_s=None,
        texts=(text,),
        again=text,
        again_s=0.2,
        back_s=None,
    )
    assert "| killed | 1 | 0 | - | - | 0.10 / 0.10 | 0.20 / 0.20 | - |" in as_markdown(summary([unseen], 1))
