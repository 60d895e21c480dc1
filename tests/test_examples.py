"""Every example runs as it stands, from any folder, in seconds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_every_example_is_run_here_and_told_of() -> None:
    tested = set(re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text()))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())) == tested


@pytest.mark.slow
def test_a_text_is_streamed_and_another_left(tmp_path: Path) -> None:
    lines = run("stream.py", tmp_path).splitlines()
    assert re.fullmatch(r"[\d.]+ tokens/s, ended by length", lines[-2])
    assert lines[-1].startswith("left after")


@pytest.mark.slow
def test_a_program_that_does_not_await_asks_too(tmp_path: Path) -> None:
    out = run("synchronous.py", tmp_path)
    assert out.startswith("def main(argv):")
    assert re.search(r"Usage\(prompt_tokens=\d+, completion_tokens=24, cached_tokens=0\), \d+ trips$", out)


def test_a_schedule_of_ones_own_is_compared(tmp_path: Path) -> None:
    out = run("own_schedule.py", tmp_path, "pi5x4-3b-int4")
    rates = {name: float(rate) for name, rate in re.findall(r"^(\w+) +([\d.]+) tokens/s", out, re.MULTILINE)}
    assert list(rates) == ["autoregressive", "chunked", "eager", "flowspec"]
    assert rates["flowspec"] > rates["eager"] > rates["autoregressive"]


@pytest.mark.slow
def test_one_program_holds_nodes_and_origin(tmp_path: Path) -> None:
    out = run("inside_asyncio.py", tmp_path)
    assert "left has layers [0, 4)" in out
    assert "right has layers [4, 8)" in out
    bundle = Bundle.load(DEMO_BUNDLE)
    tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
    model = UnsplitModel(bundle.directory, bundle.manifest)
    for prompt in ("def main(argv):", "class Stack:"):
        tokens = model.generate(tokenizer.encode(prompt), GenerateOptions(max_new_tokens=32))
        assert prompt + tokenizer.decode(list(tokens)) in out


def test_described_boards_are_planned(tmp_path: Path) -> None:
    out = run("plan_my_boards.py", tmp_path)
    assert out.startswith("flowspec: ")
    assert "4: Pi 4      left out: would slow the ring" in out
    assert "one more board like 1: mini-PC" in out
