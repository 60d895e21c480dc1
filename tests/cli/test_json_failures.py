"""What fails with ``--json`` prints one JSON object as well, of what it has done and why it ended; statuses stay."""

import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.cli import run_bench
from flowspec_edge.cli.main import main
from flowspec_edge.config import Piece
from flowspec_edge.errors import BenchError, PlacementError
from flowspec_edge.origin.service import GenerationService


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The object on standard output, and the last line on standard error."""
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    return json.loads(line), err.splitlines()[-1]


def test_a_text_that_ends_in_an_error_is_told_as_far_as_it_came(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def generate(self: GenerationService, *asked: object) -> AsyncGenerator[Piece, None]:
        yield Piece(text="a", token_ids=[5])
        yield Piece(text="", token_ids=[], notice="waiting for boards")
        yield Piece(text="b", token_ids=[6, 7])
        raise PlacementError("layers [4, 8) have no home")

    monkeypatch.setattr(GenerationService, "generate", generate)
    report, last = failed(capsys, "generate", "x", "--host", "127.0.0.1", "--json")
    assert report.pop("drafts")
    assert report == {
        "prompt": "x",
        "text": "ab",
        "token_ids": [5, 6, 7],
        "finish_reason": None,
        "ring": [],
        "error": {"type": "PlacementError", "message": "layers [4, 8) have no home"},
    }
    assert last == "flowspec generate: layers [4, 8) have no home"


FAILING: Sequence[tuple[tuple[str, ...], str]] = [
    (("demo", "--nodes", "0"), "RequestError"),
    (("plan", "--testbed", "nowhere"), "TestbedError"),
    (("doctor", "--bundle", "/nowhere"), "BundleError"),
    (("devices", "--host", "127.0.0.1", "--wait", "0.1", "--cluster", "nobody-is-here"), "NodeUnavailableError"),
    (("bench", "--virtual", "--testbed", "nowhere"), "TestbedError"),
    (("key", "show"), "ClusterKeyError"),
    (("key", "set", "fsk1-wrong"), "KeyTextError"),
    (("cache", "prune", "--limit", "-1"), "RequestError"),
    (("node", "--port", "70000"), "RequestError"),
]


@pytest.mark.parametrize(("arguments", "kind"), FAILING, ids=[" ".join(arguments) for arguments, _ in FAILING])
def test_every_command_tells_its_error(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], kind: str
) -> None:
    report, last = failed(capsys, *arguments, "--json")
    assert list(report) == ["error"] and report["error"]["type"] == kind
    assert last == f"flowspec {arguments[0]}: {report['error']['message']}"


def test_a_picture_that_cannot_be_drawn_does_not_cost_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(path: Path, text: str) -> None:
        raise BenchError(f"{path}: cannot be written")

    async def run_nothing(*arguments: object, **more: object) -> list[object]:
        return []

    monkeypatch.setattr(run_bench, "_write", refuse)
    monkeypatch.setattr(run_bench, "run_tasks", run_nothing)
    monkeypatch.setattr(run_bench, "draw_bars", lambda report: "<svg/>")
    monkeypatch.setattr(run_bench, "build_report", lambda testbed, *_: {"testbed": testbed.name})
    quick = ("--virtual", "--testbed", "pi5x4-3b-int4", "--prompts", "quick", "--plot", str(tmp_path / "plots"))
    report, _ = failed(capsys, "bench", *quick, "--json")
    assert report["reports"] == [{"testbed": "pi5x4-3b-int4"}]
    assert report["error"]["type"] == "BenchError"


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], port: str) -> None:
    for command in ("node", "serve"):
        assert main([command, "--port", port]) == 1
        assert f"--port is {port}" in capsys.readouterr().err
