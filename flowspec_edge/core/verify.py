"""Drawing the next token from the target's own distribution. This is the one place where a token is chosen.

The draw depends on the seed and the position alone, never on chunking or timing, so the same seed writes the same text on
one board and on eight, with the draft tree and without it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.config import GenerateOptions

Draw = Callable[[NDArray[np.float32], int], int]


def make_draw(options: GenerateOptions) -> Draw:
    """The function ``(logits [vocab_size], position) -> token`` that these options ask for."""
    if options.temperature == 0:
        return lambda logits, position: int(np.argmax(logits))

    def draw(logits: NDArray[np.float32], position: int) -> int:
        probabilities = next_token_distribution(logits, options)
        uniform = np.random.Generator(np.random.Philox(key=options.seed, counter=position)).random()
        cumulative = np.cumsum(probabilities)
        token = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
        return int(min(token, np.flatnonzero(probabilities)[-1]))

    return draw


def next_token_distribution(logits: NDArray[np.float32], options: GenerateOptions) -> NDArray[np.float64]:
    """Probabilities [vocab_size] after temperature, then top-k, then top-p (nucleus: the smallest set that reaches it).

    Ties at a cut go to the smaller token id. ``options.temperature`` must be above 0.
    """
    scaled = logits.astype(np.float64) / options.temperature
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if 0 < options.top_k < len(probabilities) or options.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        kept = len(order) if options.top_k == 0 else min(options.top_k, len(order))
        if options.top_p < 1:
            cumulative = np.cumsum(probabilities[order[:kept]])
            kept = min(kept, int(np.searchsorted(cumulative, options.top_p * cumulative[-1])) + 1)
        probabilities[order[kept:]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities
