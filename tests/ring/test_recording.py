"""What the cores of a real ring were told is written down, and runs again to the same actions."""

import pytest

from flowspec_edge.bench.replay import read_journal, replay
from flowspec_edge.config import GenerateOptions
from tests.ring.conftest import answer_of, ring_of, tokens_of

OPTIONS = GenerateOptions(max_new_tokens=8)


@pytest.mark.parametrize("has_text", [True, False])
async def test_a_recorded_ring_runs_again(int8_bundle, prompts, tmp_path, monkeypatch, has_text):
    monkeypatch.setenv("FLOWSPEC_RECORD", str(tmp_path))
    monkeypatch.setenv("FLOWSPEC_RECORD_TEXT", str(int(has_text)))
    async with ring_of(2, int8_bundle) as ring:
        tokens = tokens_of(await answer_of(ring, prompts[0], OPTIONS))
    assert len(tokens) == 8
    journals = [read_journal(path.read_bytes()) for path in sorted(tmp_path.glob("*.journal"))]
    assert [journal.kind for journal in journals] == ["origin", "stage", "stage"]
    assert [journal.has_text for journal in journals] == [has_text] * 3
    assert sorted(journal.arguments["is_last"] for journal in journals[1:]) == [False, True]
    for journal in journals if has_text else journals[1:]:  # an origin needs what was written to run again
        steps = list(replay(journal))
        assert len(steps) > 10 and all(step.is_same for step in steps)
