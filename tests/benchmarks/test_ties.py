"""What is counted as a text that differs, and that a run goes on where the last one stopped."""

import asyncio
from pathlib import Path

import pytest

from benchmarks import ties
from benchmarks.ties import Case, Findings, first_difference, prompts_of, summarise
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle

CASES = [Case("int8", 0.0, 0), Case("int8", 0.8, 1)]


@pytest.mark.parametrize(
    ("found", "expected", "place"), [([1, 2], [1, 2], None), ([1, 3], [1, 2], 1), ([1], [1, 2], 1), ([], [], None)]
)
def test_the_first_token_that_differs(found: list[int], expected: list[int], place: int | None) -> None:
    assert first_difference(found, expected) == place


def test_findings_are_kept_by_bundle_and_precision(tmp_path: Path) -> None:
    path = tmp_path / "findings.jsonl"
    Findings(path, "one int8").add(CASES[0], "2", 7)
    Findings(path, "another int8").add(CASES[0], "2", None)
    assert Findings(path, "one int8").found == {(CASES[0], "2"): 7}
    (row,) = summarise(Findings(path, "one int8"))
    assert row == {"precision": "int8", "temperature": 0.0, "nodes": "2", "texts": 1, "differ": 1}


@pytest.mark.slow
def test_rings_write_what_the_unsplit_model_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ties, "NUM_TOKENS", 12)
    bundle = Bundle.load(DEMO_BUNDLE)
    findings = Findings(tmp_path / "findings.jsonl", "demo")
    asyncio.run(ties.compare(bundle, "int8", CASES, prompts_of(bundle, 2), findings))
    assert findings.found == {(case, ring): None for case in CASES for ring in ("1", "2", "4", "replay")}
