"""The draft head: a row's draft depends on its path alone, however and how often it was run."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.core.rows import Row
from flowspec_edge.engine.drafters.eagle1 import PASS_ROWS, Eagle1Drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from tests.engine.conftest import Session, make_chain

NO_HIDDEN = np.zeros((0, 0), np.float32)
TOLERANCE: dict[str, Any] = {"atol": 1e-4}
"""Attention sums over slots in their order, which depends on when a row was run."""


@pytest.fixture
def drafter(bundle: Bundle) -> Eagle1Drafter:
    drafter = Eagle1Drafter(bundle.directory, bundle.manifest, Head(bundle.directory, bundle.manifest), k=5)
    drafter.open(1, 200)
    return drafter


@pytest.fixture
def pairs(whole: StageRunner, tokens: list[int]) -> tuple[list[Row], np.ndarray]:
    """Rows of a chain from the second on, each with its parent's hidden row."""
    chain = make_chain(tokens[:30])
    return chain[1:], Session(whole).run(chain)[:-1]


def verify(
    drafter: Eagle1Drafter,
    pairs: tuple[Sequence[Row], np.ndarray],
    start: int,
    stop: int,
    drafted: Sequence[tuple[Row, int]] = (),
    dropped: tuple[int, ...] = (),
) -> DraftFinished:
    """One pass over pairs ``start`` to ``stop`` and over drafted rows, each given with its position."""
    rows, hidden = pairs
    positions = np.array([*range(start, stop), *(at for _, at in drafted)])
    hidden = hidden[start:stop] if stop > start else NO_HIDDEN
    return drafter.run(RunDraft(1, (*rows[start:stop], *(row for row, _ in drafted)), positions, hidden, dropped))


def draft(drafter: Eagle1Drafter, *drafted: tuple[Row, int], dropped: tuple[int, ...] = ()) -> DraftFinished:
    return verify(drafter, ((), NO_HIDDEN), 0, 0, drafted, dropped)


def test_pairs_in_parts_are_pairs_at_once(drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]) -> None:
    whole = verify(drafter, pairs, 0, 29)
    drafter.open(1, 200)
    for start, stop in ((0, 10), (10, 11), (11, 29)):
        parts = verify(drafter, pairs, start, stop)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_array_equal(parts.log_probs, whole.log_probs)
    assert whole.tokens.shape == (1, 5)
    assert (np.diff(whole.log_probs) <= 0).all()


def test_the_last_pair_comes_before_the_drafted_rows_in_the_answer(
    drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]
) -> None:
    verify(drafter, pairs, 0, 20)
    taken = pairs[0][20]
    draft(drafter, (taken, 20))
    both = verify(drafter, pairs, 20, 21, [(Row(100, taken.id, 7), 21)])
    assert both.tokens.shape == (2, 5)
    drafter.open(1, 200)
    alone = verify(drafter, pairs, 0, 21)
    np.testing.assert_allclose(both.log_probs[0], alone.log_probs[0], **TOLERANCE)


def test_a_drafted_row_that_is_verified_is_as_if_it_had_never_been_drafted(
    drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]
) -> None:
    verify(drafter, pairs, 0, 20)
    draft(drafter, (pairs[0][20], 20))
    draft(drafter, (pairs[0][21], 21))
    drafted_before = verify(drafter, pairs, 20, 29)
    drafter.open(1, 200)
    np.testing.assert_allclose(drafted_before.log_probs, verify(drafter, pairs, 0, 29).log_probs, **TOLERANCE)


def test_dropped_rows_leave_no_trace_and_their_slots_are_used_anew(
    drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]
) -> None:
    verify(drafter, pairs, 0, 20)
    last = pairs[0][19]
    for id in range(100, 600):
        draft(drafter, (Row(id, last.id, id), 20), dropped=(id - 1,))
    with_drafts = verify(drafter, pairs, 20, 29, dropped=(599,))
    drafter.open(1, 200)
    np.testing.assert_allclose(with_drafts.log_probs, verify(drafter, pairs, 0, 29).log_probs, **TOLERANCE)


def test_a_row_that_is_run_again_is_the_same_row(drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]) -> None:
    verify(drafter, pairs, 0, 20)
    row = (Row(100, pairs[0][19].id, 7), 20)
    first = draft(drafter, row)
    np.testing.assert_allclose(draft(drafter, row).log_probs, first.log_probs, **TOLERANCE)


def test_siblings_do_not_see_each_other(drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]) -> None:
    verify(drafter, pairs, 0, 20)
    siblings = [(Row(100 + i, pairs[0][19].id, 300 + i), 20) for i in range(4)]
    together = draft(drafter, *siblings)
    alone = []
    for sibling in siblings:
        drafter.open(1, 200)
        verify(drafter, pairs, 0, 20)
        alone.append(draft(drafter, sibling).log_probs[0])
    np.testing.assert_allclose(together.log_probs, np.stack(alone), **TOLERANCE)


def test_a_long_text_leaves_features_of_living_rows_only(bundle: Bundle, whole: StageRunner, tokens: list[int]) -> None:
    drafter = Eagle1Drafter(bundle.directory, bundle.manifest, Head(bundle.directory, bundle.manifest), k=5)
    capacity = PASS_ROWS + 200
    chain = make_chain((tokens * 10)[: PASS_ROWS + 100])
    pairs = chain[1:], Session(whole, capacity=capacity).run(chain)[:-1]
    drafter.open(1, capacity)
    verify(drafter, pairs, 0, len(chain) - 20)
    draft(drafter, (Row(1000, chain[-20].id, 7), len(chain) - 20))
    session = drafter._sessions[1]
    assert set(session.features) == {chain[-20].id, 1000}
    in_parts = verify(drafter, pairs, len(chain) - 20, len(chain) - 1, dropped=(1000,))
    assert set(session.features) == {chain[-1].id}
    drafter.open(1, capacity)
    at_once = verify(drafter, pairs, 0, len(chain) - 1)
    np.testing.assert_allclose(in_parts.log_probs, at_once.log_probs, **TOLERANCE)


def test_a_closed_session_drafts_nothing(drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]) -> None:
    drafter.close(1)
    assert verify(drafter, pairs, 0, 3).tokens.shape == (0, 5)


@pytest.mark.parametrize("num_rows", [5, 20, 25])
def test_a_session_goes_on_from_the_pairs_of_an_ended_one(
    drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray], num_rows: int
) -> None:
    """It takes as many as there are; the first one's slots were not in the order of its text."""
    expected = verify(drafter, pairs, 0, 29)
    drafter.open(1, 200)
    verify(drafter, pairs, 0, 10)
    draft(drafter, (Row(100, pairs[0][9].id, 7), 10))
    verify(drafter, pairs, 10, 20, dropped=(100,))
    drafter.keep(1, [row.id for row in pairs[0][:20]])
    drafter.open(1, 300)
    drafter._kept[7] = drafter._kept.pop(1)
    drafter.take_over(1, 7, num_rows)
    assert not drafter._kept
    found = verify(drafter, pairs, min(num_rows, 20), 29)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, **TOLERANCE)
    drafter._sessions[1].slots.check()


def test_kept_pairs_go_with_their_session(drafter: Eagle1Drafter, pairs: tuple[list[Row], np.ndarray]) -> None:
    verify(drafter, pairs, 0, 5)
    drafter.keep(1, [1, 2, 3])
    drafter.take_over(2, 1, 3)
    assert not drafter._kept, "nobody is there to take them"
    drafter.keep(1, [1, 2, 3])
    assert not drafter._kept, "it is closed"
    drafter.open(3, 200)
    drafter.keep(3, [])
    drafter.close(3)
    assert not drafter._kept
