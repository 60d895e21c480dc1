"""A longer trip or interval never pays, more drafts never cost, and speculation is never expected to lose."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.planning.throughput import (
    CHUNK_ROWS,
    NO_DRAFTS,
    TYPICAL_DRAFTS,
    AcceptanceCurve,
    Throughput,
    tokens_of_best_rows,
)
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.errors import RequestError


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(SCHEDULES)),
    st.sampled_from(CHUNK_ROWS),
    st.floats(1, 5000),
    st.floats(0.001, 1),
    st.floats(1, 3),
    st.integers(1, 16),
    st.floats(0, 3),
)
def test_it_falls_where_trip_or_interval_grow(
    schedule: str, num_rows: int, trip_ms: float, share: float, factor: float, num_stages: int, scale: float
) -> None:
    throughput = Throughput(schedule, TYPICAL_DRAFTS.scaled(scale), 5.0)
    interval_ms = trip_ms * share
    rate = throughput.tokens_per_s(num_rows, trip_ms, interval_ms, num_stages)
    assert throughput.tokens_per_s(num_rows, trip_ms * factor, interval_ms, num_stages) <= rate * (1 + 1e-12)
    assert throughput.tokens_per_s(num_rows, trip_ms, interval_ms * factor, num_stages) <= rate * (1 + 1e-12)


def test_without_drafts_a_token_takes_a_trip() -> None:
    assert Throughput("flowspec", NO_DRAFTS).tokens_per_s(1, 250.0, 60.0, 4) == pytest.approx(4.0)
    assert Throughput("autoregressive", TYPICAL_DRAFTS).tokens_per_s(1, 250.0, 60.0, 4) == pytest.approx(4.0)


def test_a_curve_is_counted_from_the_rows_that_the_target_took() -> None:
    places = [(1, 3), (1,), ()]  # rows 1 and 3 of the first tree, in score order
    assert tokens_of_best_rows(places, 1) == 1.0, "the root alone"
    assert tokens_of_best_rows(places, 2) == pytest.approx(1 + 2 / 3)
    assert tokens_of_best_rows(places, 4) == pytest.approx(1 + 3 / 3)
    curve = AcceptanceCurve.from_places(places)
    assert curve.at(2) == pytest.approx(1 + 2 / 3) and curve.at(1000) == pytest.approx(2.0)


def test_a_tree_never_brings_more_tokens_than_it_has_rows() -> None:
    curve = TYPICAL_DRAFTS.scaled(5)
    assert all(tokens <= rows for rows, tokens in zip(curve.rows, curve.tokens, strict=True))


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(RequestError, match="fastest"):
        Throughput("fastest", NO_DRAFTS)
