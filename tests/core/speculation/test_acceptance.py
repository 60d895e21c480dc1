"""The chance of acceptance is what was observed, once enough was."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.speculation.acceptance import MATCH_PRIOR, Acceptance, Edge
from flowspec_edge.core.speculation.lookup import MAX_MATCH

DRAFTED, MATCHED, BOTH = Edge(math.log(0.5)), Edge(None, 3), Edge(math.log(0.5), 3)
UNLIKELY = Edge(math.log(0.01))
KINDS = pytest.mark.parametrize("edge", [DRAFTED, MATCHED, BOTH], ids=["drafted", "matched", "both"])
LOG_PROBS = st.none() | st.floats(-200, 0)
MATCHES = st.integers(0, MAX_MATCH)
EDGES = st.builds(Edge, LOG_PROBS, MATCHES)


def chance(acceptance: Acceptance, edge: Edge) -> float:
    return math.exp(acceptance.log_chance(edge))


def observe(acceptance: Acceptance, edge: Edge, num_taken: int, num_times: int = 600) -> None:
    """``num_times`` rounds of ten verifications, in each of which the target takes the child ``num_taken`` times."""
    for _ in range(num_times):
        for number in range(10):
            acceptance.observe([(edge, number < num_taken)])


def test_what_speaks_for_a_child_counts_until_something_was_observed() -> None:
    assert chance(Acceptance(), DRAFTED) == pytest.approx(0.5)
    assert chance(Acceptance(), UNLIKELY) == pytest.approx(0.01)
    assert chance(Acceptance(), MATCHED) == pytest.approx(MATCH_PRIOR[3])
    assert chance(Acceptance(), BOTH) > max(chance(Acceptance(), DRAFTED), chance(Acceptance(), MATCHED))


@KINDS
@pytest.mark.parametrize("num_taken", [1, 3, 5, 8])
def test_it_comes_to_the_observed_frequency(edge: Edge, num_taken: int) -> None:
    acceptance = Acceptance()
    observe(acceptance, edge, num_taken)
    assert chance(acceptance, edge) == pytest.approx(num_taken / 10, abs=0.04)


@KINDS
def test_it_forgets(edge: Edge) -> None:
    acceptance = Acceptance()
    observe(acceptance, edge, 9)
    observe(acceptance, edge, 2)
    assert chance(acceptance, edge) == pytest.approx(0.2, abs=0.04)


def test_one_draft_probability_teaches_nothing_about_a_distant_one() -> None:
    acceptance = Acceptance()
    observe(acceptance, DRAFTED, 1)
    assert chance(acceptance, UNLIKELY) == pytest.approx(0.01)


def test_siblings_are_counted_each_for_itself() -> None:
    acceptance = Acceptance()
    for number in range(2000):
        acceptance.observe([(DRAFTED, number % 5 == 0), (UNLIKELY, number % 5 != 0)])
    assert chance(acceptance, DRAFTED) == pytest.approx(0.2, abs=0.04)
    assert chance(acceptance, UNLIKELY) == pytest.approx(0.8, abs=0.08)


@given(st.lists(st.tuples(EDGES, st.booleans()), max_size=30), st.lists(st.floats(-200, 0, width=32), min_size=1))
def test_many_chances_at_once_are_those_of_each(children: list[tuple[Edge, bool]], log_probs: Sequence[float]) -> None:
    acceptance = Acceptance()
    acceptance.observe(children)
    many = acceptance.log_chances(np.array(log_probs, np.float32))
    assert many.tolist() == pytest.approx([acceptance.log_chance(Edge(log_prob)) for log_prob in log_probs])


@given(st.lists(st.tuples(EDGES, st.booleans()), max_size=30), EDGES)
def test_a_chance_is_never_certain_and_never_none(children: list[tuple[Edge, bool]], edge: Edge) -> None:
    acceptance = Acceptance()
    for _ in range(20):
        acceptance.observe(children)
    assert -math.inf < acceptance.log_chance(edge) < 0
