"""What the cores of a real ring were told is written down, and runs again to the same actions."""

import contextlib
from pathlib import Path

import pytest

from flowspec_edge.bench.replay import RecordedCore, read_journal, replay
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.errors import StageFailedError
from flowspec_edge.origin.opening import open_ring
from tests.ring.conftest import answer_of, found_of, nodes_of, ring_of, tokens_of


def journals_in(directory: Path) -> list[RecordedCore]:
    return [read_journal(path.read_bytes()) for path in sorted(directory.glob("*.journal"))]


@pytest.mark.parametrize("has_text", [True, False])
async def test_a_recorded_ring_runs_again(
    int8_bundle: Bundle, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_text: bool
) -> None:
    monkeypatch.setenv("FLOWSPEC_RECORD", str(tmp_path))
    monkeypatch.setenv("FLOWSPEC_RECORD_TEXT", str(int(has_text)))
    async with ring_of(2, int8_bundle) as ring:
        tokens = tokens_of(await answer_of(ring, prompts[0], GenerateOptions(max_new_tokens=8)))
    assert len(tokens) == 8
    journals = journals_in(tmp_path)
    assert [journal.kind for journal in journals] == ["origin", "stage", "stage"]
    assert [journal.has_text for journal in journals] == [has_text] * 3
    assert sorted(journal.arguments["is_last"] for journal in journals[1:]) == [False, True]
    for journal in journals if has_text else journals[1:]:  # an origin needs what was written to run again
        steps = list(replay(journal))
        assert len(steps) > 10 and all(step.is_same for step in steps)


async def test_a_recorded_ring_that_loses_a_node_runs_again(
    int8_bundle: Bundle, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWSPEC_RECORD", str(tmp_path))
    monkeypatch.setenv("FLOWSPEC_RECORD_TEXT", "1")
    async with nodes_of(int8_bundle) as (serving, origin), open_ring(origin, int8_bundle, found_of(serving)) as ring:
        answer = ring.generate(prompts[0], GenerateOptions(max_new_tokens=200))
        with pytest.raises(StageFailedError):
            async with contextlib.aclosing(answer) as pieces:
                async for _ in pieces:
                    await serving[1].close()
    journals = journals_in(tmp_path)
    assert [journal.kind for journal in journals] == ["origin", "stage", "stage", "stage"]
    steps = [list(replay(journal)) for journal in journals]
    assert all(step.is_same for core in steps for step in core)
    assert any("RingLost" in step.event for step in steps[0])
