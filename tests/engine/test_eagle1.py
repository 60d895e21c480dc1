"""The draft head: verified pairs stay, drafted ones are forgotten."""

import numpy as np
import pytest

from flowspec_edge.core.events import ExpandDraft, ExtendDraft
from flowspec_edge.core.tree import Row
from flowspec_edge.engine.drafters.eagle1 import Eagle1Drafter
from flowspec_edge.engine.head import Head
from tests.engine.conftest import Session, make_chain


@pytest.fixture
def drafter(bundle):
    drafter = Eagle1Drafter(bundle.directory, bundle.manifest, Head(bundle.directory, bundle.manifest), k=5)
    drafter.open(1, 200)
    return drafter


@pytest.fixture
def pairs(whole, tokens):
    """Rows of a chain from the second on, each with its parent's hidden row."""
    chain = make_chain(tokens[:30])
    return chain[1:], Session(whole).run(chain)[:-1]


def extend(drafter, pairs, start, stop):
    rows, hidden = pairs
    positions = np.arange(start, stop)
    return drafter.run(ExtendDraft(1, tuple(rows[start:stop]), positions, hidden[start:stop]))


def test_extending_in_parts_is_extending_at_once(drafter, pairs):
    whole = extend(drafter, pairs, 0, 29)
    drafter.open(1, 200)
    for start, stop in ((0, 10), (10, 11), (11, 29)):
        parts = extend(drafter, pairs, start, stop)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
    np.testing.assert_array_equal(parts.log_probs, whole.log_probs)
    assert whole.tokens.shape == (1, 5)
    assert (np.diff(whole.log_probs) <= 0).all()


def test_drafted_rows_are_forgotten_at_the_next_verified_pair(drafter, pairs):
    extend(drafter, pairs, 0, 20)
    parent = pairs[0][19]
    for id in (100, 101):
        drafter.run(ExpandDraft(1, (Row(id, parent.id, id),), np.array([20])))
    with_drafts = extend(drafter, pairs, 20, 29)
    drafter.open(1, 200)
    extend(drafter, pairs, 0, 20)
    without = extend(drafter, pairs, 20, 29)
    np.testing.assert_array_equal(with_drafts.log_probs, without.log_probs)


def test_siblings_do_not_see_each_other(drafter, pairs):
    extend(drafter, pairs, 0, 20)
    parent = pairs[0][19]
    siblings = tuple(Row(100 + i, parent.id, 300 + i) for i in range(4))
    together = drafter.run(ExpandDraft(1, siblings, np.full(4, 20)))
    drafter.open(1, 200)
    extend(drafter, pairs, 0, 20)
    alone = [drafter.run(ExpandDraft(1, (row,), np.array([20]))).log_probs[0] for row in siblings]
    np.testing.assert_allclose(together.log_probs, np.stack(alone), atol=1e-4)


def test_a_closed_session_drafts_nothing(drafter, pairs):
    drafter.close(1)
    assert extend(drafter, pairs, 0, 3).tokens.shape == (0, 5)
