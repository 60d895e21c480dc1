"""Two texts of described boards: what is seen of them, and what came of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.cli.main import main
from flowspec_edge.cli.show_boards_demo import ColumnsDisplay, PlainDisplay, Writing, conclusions, display_of
from flowspec_edge.config import Piece
from tests.bench.test_emulate import FAST


def finished(title: str, schedule: str, rate: float, text: str, late: float = 0.0) -> Writing:
    writing = Writing(title, schedule, late=late)
    writing.add(Piece(text=text, token_ids=[1, 2], statistics={"tokens_per_s": rate}))
    return writing


def both(late: float = 0.0) -> list[Writing]:
    text = "class A:\n\tpass\n"
    return [
        finished("without drafts", "autoregressive", 5.0, text),
        finished("with drafts", "flowspec", 11.0, text, late),
    ]


def test_the_rate_is_that_of_tokens_after_the_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.5, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    writing = Writing("with drafts", "flowspec")
    assert writing.tokens_per_s == 0
    for tokens in ([1, 2], [3], [4, 5]):
        writing.add(Piece(text="x", token_ids=tokens))
    assert (writing.tokens_per_s, writing.text, writing.token_ids) == (3.0, "xxx", [1, 2, 3, 4, 5])
    writing.add(Piece(text="", token_ids=[], statistics={"tokens_per_s": 2.5}))
    assert writing.tokens_per_s == 2.5, "the figures of the answer itself are more exact"


def test_columns_stand_side_by_side_and_fit_the_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, height=12, force_terminal=True, color_system=None)
    writings = [both()[0], Writing("with drafts", "flowspec")]
    with ColumnsDisplay("four boards", "def f", writings, console) as display:
        writings[0].text = "line\n" * 30 + "the end of it\n"
        display.show(writings[0])
        shown = file.getvalue()
        assert "its turn comes" not in shown.splitlines()[0] and "reads the prompt" in shown
        assert "the end of it" in shown and shown.count("line") < 12, "only the end fits"
        writings[1].add(Piece(text="line\n", token_ids=[1], statistics={"tokens_per_s": 10.0}))
        display.show(writings[1])
    last = file.getvalue().rpartition("without drafts (autoregressive)")[2]
    assert "5.0 tokens/s" in last and "10.0 tokens/s, 2.0 times as many" in last
    assert last.count("line") == 31, "in the end all is there"
    assert max(len(line.rstrip()) for line in last.splitlines()) <= 80


def test_without_a_terminal_one_text_comes_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    writings = both()
    with display_of("four boards", "def f", writings, is_quiet=False) as display:
        assert isinstance(display, PlainDisplay) and not isinstance(display, ColumnsDisplay)
        for writing in writings:
            display.show(writing)
    display.conclude(is_identical=True, late_limit=0.05)
    out = capsys.readouterr().out
    assert "without drafts (autoregressive):\nclass A:\n\tpass\n\n5.0 tokens/s\n" in out
    assert "With drafts 11.0 tokens/s, without 5.0: 2.2 times as many" in out and "token for token" in out
    with display_of("four boards", "def f", writings, is_quiet=True) as display:
        display.show(writings[0])
    assert capsys.readouterr().out == ""


def test_what_is_not_as_it_should_be_is_said() -> None:
    assert "NO" in conclusions(both(), is_identical=False, late_limit=0.05)[1]
    assert not [line for line in conclusions(both(0.04), is_identical=True, late_limit=0.05) if "behind" in line]
    assert "20% behind" in conclusions(both(0.2), is_identical=True, late_limit=0.05)[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--boards", "pi9"], ", ".join(known_testbeds())),
        (["--boards", "unequal", "--nodes", "4"], "as many nodes as the testbed has boards"),
        (["--boards", "unequal", "--chat"], "not for --chat"),
        (["--boards", "unequal", "--schedule", "autoregressive"], "name another one"),
    ],
)
def test_wrong_options_are_one_sentence(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *options]) == 1
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1 and said in printed.err and "starting" not in printed.out


@pytest.mark.slow
def test_boards_write_the_text_without_drafts_and_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    testbed = tmp_path / "two.toml"
    testbed.write_text(FAST)
    assert main(["demo", "--boards", str(testbed), "--max-new-tokens", "24", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    without, drafted = report["without_drafts"], report["with_drafts"]
    assert (report["boards"], report["identical"]) == ("two", True)
    assert (without["schedule"], drafted["schedule"]) == ("autoregressive", "flowspec")
    assert without["text"] == drafted["text"] and len(without["token_ids"]) == 24
    assert without["trips"] > drafted["verifications"] > 0
    assert report["gain"] == pytest.approx(drafted["tokens_per_s"] / without["tokens_per_s"], abs=0.01)
