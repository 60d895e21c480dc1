"""Log-probabilities of drawn tokens and of the likeliest in their place."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.speculation.logprobs import logprobs_of


@given(st.integers(0, 2**32), st.integers(0, 20), st.integers(1, 50), st.sampled_from([0, 1, 6]))
def test_they_are_those_of_the_softmax_the_likeliest_first(seed: int, num_top: int, vocab: int, digits: int) -> None:
    random = np.random.default_rng(seed)
    logits = np.round(random.standard_normal(vocab) * 5, digits).astype(np.float32)  # few digits make many ties
    drawn = int(random.integers(vocab))
    told = logprobs_of(logits, drawn, num_top)
    exact = logits.astype(np.float64)
    expected = exact - np.log(np.exp(exact).sum())
    order = sorted(range(vocab), key=lambda token: (-logits[token], token))[:num_top]
    assert [one.token for one in (told.drawn, *told.top)] == [drawn, *order]
    np.testing.assert_allclose([one.logprob for one in (told.drawn, *told.top)], expected[[drawn, *order]], atol=1e-12)


def test_huge_logits_and_impossible_tokens_make_no_nan() -> None:
    told = logprobs_of(np.array([1e30, -np.inf, 1e30], np.float32), 1, 3)
    assert told.drawn.logprob == -np.inf
    assert [one.token for one in told.top] == [0, 2, 1]
    np.testing.assert_allclose([one.logprob for one in told.top], [0.0, 0.0, -np.inf], atol=1)
