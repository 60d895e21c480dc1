"""The chance of acceptance is what was observed, once enough was."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flowspec_edge.core.speculation.acceptance import MATCH_PRIORS, Acceptance
from flowspec_edge.core.speculation.lookup import MAX_MATCH


class Edge(NamedTuple):
    """Why a child was drafted: the draft's log-probability, if a pass has run the parent, and the length of a match."""

    log_prob: float = math.nan
    match: int = 0


DRAFTED, MATCHED, BOTH = Edge(math.log(0.5)), Edge(match=3), Edge(math.log(0.5), 3)
UNLIKELY = Edge(math.log(0.01))
KINDS = pytest.mark.parametrize("edge", [DRAFTED, MATCHED, BOTH], ids=["drafted", "matched", "both"])
EDGES = st.builds(Edge, st.just(math.nan) | st.floats(-200, 0), st.integers(0, MAX_MATCH))


def arrays(edges: Sequence[Edge]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    return np.array([edge.log_prob for edge in edges], np.float64), np.array([edge.match for edge in edges], np.int64)


def log_chances(acceptance: Acceptance, *edges: Edge) -> list[float]:
    return [float(log_chance) for log_chance in acceptance.log_chances(*arrays(edges))]


def chance(acceptance: Acceptance, edge: Edge) -> float:
    (log_chance,) = log_chances(acceptance, edge)
    return math.exp(log_chance)


def teach(acceptance: Acceptance, children: Sequence[tuple[Edge, bool]]) -> None:
    """One verification: the edge of each child, and whether the target took it."""
    acceptance.observe(*arrays([edge for edge, _ in children]), np.array([is_taken for _, is_taken in children], bool))


def observe(acceptance: Acceptance, edge: Edge, num_taken: int, num_times: int = 600) -> None:
    """``num_times`` rounds of ten verifications, in each of which the target takes the child ``num_taken`` times."""
    for _ in range(num_times):
        for number in range(10):
            teach(acceptance, [(edge, number < num_taken)])


def test_what_speaks_for_a_child_counts_until_something_was_observed() -> None:
    assert chance(Acceptance(), DRAFTED) == pytest.approx(0.5)
    assert chance(Acceptance(), UNLIKELY) == pytest.approx(0.01)
    assert chance(Acceptance(), MATCHED) == pytest.approx(MATCH_PRIORS[3])
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
        teach(acceptance, [(DRAFTED, number % 5 == 0), (UNLIKELY, number % 5 != 0)])
    assert chance(acceptance, DRAFTED) == pytest.approx(0.2, abs=0.04)
    assert chance(acceptance, UNLIKELY) == pytest.approx(0.8, abs=0.08)


LESSONS = st.lists(st.tuples(EDGES, st.booleans()), max_size=30)
SOUND_EDGES = EDGES.filter(lambda edge: edge.match > 0 or not math.isnan(edge.log_prob))


@settings(deadline=None)
@given(LESSONS, st.lists(SOUND_EDGES, min_size=1, max_size=20))
def test_many_chances_at_once_are_those_of_each(lessons: list[tuple[Edge, bool]], edges: list[Edge]) -> None:
    acceptance = Acceptance()
    teach(acceptance, lessons)
    assert log_chances(acceptance, *edges) == pytest.approx([*(log_chances(acceptance, edge)[0] for edge in edges)])


@settings(deadline=None)
@given(LESSONS, st.integers(2, MAX_MATCH))
def test_a_match_alone_counts_the_same_by_itself(lessons: list[tuple[Edge, bool]], match: int) -> None:
    acceptance = Acceptance()
    teach(acceptance, lessons)
    assert log_chances(acceptance, Edge(match=match)) == pytest.approx([acceptance.log_chance_of_match(match)])


@settings(deadline=None)
@given(LESSONS, SOUND_EDGES)
def test_a_chance_is_never_certain_and_never_none(lessons: list[tuple[Edge, bool]], edge: Edge) -> None:
    acceptance = Acceptance()
    for _ in range(20):
        teach(acceptance, lessons)
    assert -math.inf < log_chances(acceptance, edge)[0] < 0
