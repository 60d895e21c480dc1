"""What is counted as planning, and that a recorded text is run again as it was."""

import pytest

from benchmarks.planning import Cost, format_summary, measure, record_texts, summarise
from flowspec_edge.bench.compare import Bench
from flowspec_edge.bench.request import Request
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core import events as ev

COSTS = [
    Cost(ev.DraftFinished, num_rows=90, num_tokens=0, seconds=100e-6),
    Cost(ev.DraftFinished, num_rows=420, num_tokens=0, seconds=300e-6),
    Cost(ev.HeadFinished, num_rows=100, num_tokens=2, seconds=200e-6),
    Cost(ev.CreditArrived, num_rows=100, num_tokens=0, seconds=400e-6),
]


def test_passes_and_verifications_plan_and_all_events_count_for_a_token() -> None:
    summary = summarise(COSTS)
    assert summary["us_per_token"] == pytest.approx(500)
    assert summary["planning"]["events"] == 3
    assert summary["planning"]["p50_us"] == pytest.approx(200)
    assert {size: spread["events"] for size, spread in summary["by_rows"].items()} == {
        "0 to 99": 1,
        "100 to 199": 1,
        "400 or more": 1,
    }
    assert "500 us per token (2 tokens)" in format_summary(summary)


@pytest.mark.slow
def test_a_recorded_text_is_run_again_as_it_was() -> None:
    request = Request("jetson4-7b-int4-1gbit", "flowspec", "tables", "0.6", num_prompts=1, max_new_tokens=12)
    (journal,) = record_texts(Bench(Bundle.load(DEMO_BUNDLE)), request, "flowspec")
    costs = measure(journal)
    assert 8 <= sum(cost.num_tokens for cost in costs) < 12, "the first tokens belong to the prompt"
    assert all(cost.seconds > 0 for cost in costs)
    assert {ev.DraftFinished, ev.HeadFinished} <= {cost.kind for cost in costs}
