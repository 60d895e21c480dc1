"""The log-probabilities of a token that was drawn, and of the likeliest in its place."""

from __future__ import annotations

import numpy as np

from flowspec_edge.config import Logprob, TokenLogprobs
from flowspec_edge.core.rows import Floats


def logprobs_of(logits: Floats, drawn: int, num_top: int) -> TokenLogprobs:
    """By the target's own distribution, the softmax of ``logits`` [vocab_size].

    Of equally likely tokens the one with the smaller id comes first.
    """
    values = logits.astype(np.float64)
    highest = values.max()
    total = highest + np.log(np.exp(values - highest).sum())

    def logprob(token: int) -> Logprob:
        return Logprob(token, float(values[token] - total))

    num_top = min(num_top, len(values))
    if num_top == 0:
        return TokenLogprobs(logprob(drawn), ())
    least = np.partition(values, -num_top)[-num_top]
    likeliest = np.flatnonzero(values >= least)
    likeliest = likeliest[np.argsort(-values[likeliest], kind="stable")][:num_top]
    return TokenLogprobs(logprob(drawn), tuple(map(logprob, likeliest.tolist())))
