"""What changes logits before a token is drawn: biases, penalties, and tokens that may not come yet.

The order is that of transformers' processors and vLLM's sampler: bias, repetition, frequency and presence. Temperature,
top-k, top-p and min-p come behind these, in ``verify.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.rows import Before, Floats


def penalised(logits: Floats, options: GenerateOptions, before: Before | None) -> Floats:
    """The logits [vocab_size] as the options change them; themselves where these change nothing.

    ``before`` is what stands before the token, where the options look back. ``options.stop_token_ids`` wait for
    ``options.min_tokens`` to be written.
    """
    if not options.logit_bias and before is None:
        return logits
    changed = logits.copy()
    _change(changed, options, before)
    return changed


def penalised_drafts(
    tokens: NDArray[np.int64], log_probs: Floats, options: GenerateOptions, befores: Sequence[Before | None]
) -> Floats:
    """A draft's log-probabilities [rows, k] of its ``tokens`` [rows, k], changed as if they were logits.

    They are that but for a number that all tokens of a row have in common. The repetition penalty alone depends on it.
    """
    named = [*(token for token, _ in options.logit_bias), *options.stop_token_ids]
    known = [int(before.tokens.max(initial=0)) for before in befores if before is not None]
    values = np.full(max(int(tokens.max()), *named, *known) + 1, -np.inf, np.float32)
    changed = np.empty_like(log_probs)
    for row, before in enumerate(befores):
        values[tokens[row]] = log_probs[row]
        _change(values, options, before)
        changed[row] = values[tokens[row]]
        values[tokens[row]] = -np.inf  # as all others are, whatever has changed them
    return changed


def _change(logits: Floats, options: GenerateOptions, before: Before | None) -> None:
    if options.logit_bias:
        tokens, biases = zip(*options.logit_bias, strict=True)
        logits[list(tokens)] += np.array(biases, np.float32)
    if before is None:
        return
    if options.repetition_penalty != 1:
        found = logits[before.tokens]  # a token that stands here twice gets the same value twice
        penalty = np.float32(options.repetition_penalty)
        logits[before.tokens] = np.where(found < 0, found * penalty, found / penalty)
    if options.frequency_penalty or options.presence_penalty:
        written, counts = np.unique(before.written, return_counts=True)
        logits[written] -= (options.frequency_penalty * counts + options.presence_penalty).astype(np.float32)
    if len(before.written) < options.min_tokens:
        logits[list(options.stop_token_ids)] = -np.inf
