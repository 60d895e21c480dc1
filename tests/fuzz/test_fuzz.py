"""A few broken inputs of every kind in every test run; ``python -m tests.fuzz`` tries as many as one likes."""

from __future__ import annotations

import random

import pytest

from tests.fuzz import __main__ as program
from tests.fuzz import many_inputs
from tests.fuzz.inputs import changed, nested
from tests.fuzz.kinds import ACCEPTED, KINDS, REFUSED, TryOne
from tests.fuzz.live import try_http, try_node

NUM = 300


@pytest.mark.parametrize("name", KINDS)
def test_nothing_but_named_errors_comes_of_broken_inputs(name: str) -> None:
    try_one, _ = KINDS[name]
    outcomes = {try_one(random.Random(f"{name}/{number}")) for number in range(NUM)}
    assert outcomes <= {ACCEPTED, REFUSED} and ACCEPTED in outcomes, "or these inputs try nothing"


async def test_a_live_node_refuses_broken_links_while_its_ring_writes_on() -> None:
    tally = await try_node(60, seed=1)
    assert tally.num_texts == 3
    assert tally.counts["refused"] > 30 and tally.counts["a stage ended with its reason"] >= 1


async def test_no_request_is_answered_by_an_internal_error() -> None:
    tally = await try_http(200, seed=1)
    assert {"200", "400"} <= set(tally.counts)


def test_inputs_are_the_same_for_the_same_seed() -> None:
    def make(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [changed(rng, bytes(range(40))) for _ in range(50)] + [nested(rng, b"[", b"]")]

    assert make(3) == make(3) != make(4)


def test_every_input_is_tried_once_by_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_inputs, "LIVE_SHARE", 0.0)
    told: list[int] = []
    report = many_inputs.try_all(600, 5, told.append, num_processes=2)
    assert report["num"] == told[-1] == 600 and report["found"] == 0
    assert set(KINDS) == set(report["kinds"])
    again = many_inputs.try_all(600, 5, told.append, num_processes=1)
    outcomes = [{name: figures.get(ACCEPTED) for name, figures in run["kinds"].items()} for run in (report, again)]
    assert outcomes[0] == outcomes[1]


def test_memory_that_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bytearray] = []

    def leaks(rng: random.Random) -> str:
        kept.append(bytearray(rng.randbytes(8000)))
        return ACCEPTED

    monkeypatch.setattr(many_inputs, "KINDS", {"leaks": (leaks, 1.0)})
    assert many_inputs.try_kind("leaks", 0, many_inputs.WARM_UP + 2500, 1)["found"] == 1


def test_a_find_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(rng: random.Random) -> str:
        raise KeyError(rng.random())

    tried: dict[str, tuple[TryOne, float]] = {"broken": (broken, 1.0)}
    monkeypatch.setattr(many_inputs, "KINDS", tried)
    monkeypatch.setattr(many_inputs, "LIVE_SHARE", 0.0)
    monkeypatch.setattr("sys.argv", ["fuzz", "--num", "20", "--seed", "5", "--processes", "1"])
    assert program.main() == 1
    out, err = capsys.readouterr()
    assert '"found": 20' in out and "input 0 of seed 5" in err and "KeyError" in err
