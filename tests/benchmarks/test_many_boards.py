"""The same work over more boards, and what is told of it."""

import pytest

from benchmarks import many_boards
from benchmarks.many_boards import WHOLE, measure, over_boards
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.testbed import load_testbed


def test_all_boards_together_compute_what_the_described_ones_do() -> None:
    whole = load_testbed(WHOLE)
    for number in (4, 12, 32):
        boards = over_boards(whole, number)
        assert len(boards.stages) == number
        for num_rows in (0, 10):
            took_ms = sum(stage.forward_ms(num_rows) for stage in boards.stages)
            assert took_ms == pytest.approx(sum(stage.forward_ms(num_rows) for stage in whole.stages))


@pytest.mark.slow
def test_drafts_are_held_against_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_boards, "MAX_NEW_TOKENS", 24)
    request = Request(WHOLE, "flowspec", "functions", "0.6", num_prompts=1)
    (row,) = measure(request, [16])
    assert row["boards"] == 16 and row["over_plain"] > 2
    assert row["over_plain"] == row["tokens_per_s"] / row["plain_tokens_per_s"]
