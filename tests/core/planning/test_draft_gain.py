"""What the drafts of a model bring is learned from its texts, and counted by the next plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.planning.draft_gain import MOST, REMEMBERED_TOKENS, DraftGain, gain_seen
from flowspec_edge.core.planning.planner import plan_ring
from flowspec_edge.core.planning.throughput import TYPICAL_DRAFTS, Throughput
from flowspec_edge.core.rows import Passage
from flowspec_edge.core.speculation.pipeline import RingCosts
from tests.core.planning.test_planner import LAN, make_device, make_model

STAGE_MS, ROW_MS, HOPS_MS, HEAD_MS, DRAFT_MS = 40.0, 1.0, 6.0, 4.0, 9.0
SCHEDULES = ("flowspec", "pipedec", "chunked", "lockstep")


def costs_of(num_stages: int, num_rows: int) -> RingCosts:
    """Of a ring whose chunks had so many rows."""
    costs = RingCosts(num_stages)
    for size in (num_rows - 1, num_rows, num_rows + 1):
        passages = [Passage(size, 0.0, (STAGE_MS + ROW_MS * size) / 1000)] * num_stages
        costs.add_trip(sum(passage.ran_s for passage in passages) + HOPS_MS / 1000, passages)
    costs.head.add(1, HEAD_MS / 1000)
    costs.draft.add(10, DRAFT_MS / 1000)
    return costs


def expected_per_s(schedule: str, factor: float, num_stages: int, num_rows: int) -> float:
    stage_ms = STAGE_MS + ROW_MS * num_rows
    throughput = Throughput(schedule, TYPICAL_DRAFTS.scaled(factor), DRAFT_MS)
    return float(throughput.tokens_per_s(num_rows, num_stages * stage_ms + HOPS_MS + HEAD_MS, stage_ms, num_stages))


@given(st.sampled_from(SCHEDULES), st.floats(0.1, 1.3), st.integers(2, 6), st.integers(12, 40))
def test_what_drafts_brought_is_told_from_the_rate(
    schedule: str, factor: float, num_stages: int, num_rows: int
) -> None:
    rate = expected_per_s(schedule, factor, num_stages, num_rows)
    seen = gain_seen(schedule, costs_of(num_stages, num_rows), rate)
    assert seen == pytest.approx(factor, rel=0.02)


def test_what_is_seen_is_never_beyond_belief() -> None:
    costs = costs_of(4, 16)
    assert gain_seen("flowspec", costs, 1e6) == MOST
    assert gain_seen("flowspec", costs, 0.01) == pytest.approx(0.0, abs=1e-3)
    assert gain_seen("autoregressive", costs, 10.0) is None, "it drafts nothing"


def test_one_short_text_is_not_believed_whole_and_many_are() -> None:
    first = DraftGain().with_text(0.4, 50)
    assert first.factor == pytest.approx(0.7), "as much as what was assumed"
    gain = first
    for _ in range(40):
        gain = gain.with_text(0.4, 50)
    assert gain.factor == pytest.approx(0.4, abs=0.02) and gain.num_tokens == REMEMBERED_TOKENS
    for _ in range(40):
        gain = gain.with_text(0.8, 50)
    assert gain.factor > 0.6, "older texts fade"
    assert gain.acceptance.at(64) == pytest.approx(1 + (TYPICAL_DRAFTS.at(64) - 1) * gain.factor)


def test_a_plan_for_weak_drafts_expects_less_and_sends_fewer_rows() -> None:
    devices = [make_device(name) for name in ("attic", "cellar", "hall", "yard")]
    usual, weak = (
        plan_ring(devices, LAN, make_model(32), Throughput("flowspec", DraftGain(factor, 100).acceptance))
        for factor in (1.0, 0.3)
    )
    assert weak.tokens_per_s < usual.tokens_per_s and weak.num_rows <= usual.num_rows
    assert weak.schedule == "flowspec" and weak.acceptance.at(64) < usual.acceptance.at(64)
