"""Drawing the next token from the target's own distribution. This is the one place where a token is chosen.

The draw depends on the seed, the position and the tokens before it alone, never on chunking or timing, so the same seed
writes the same text on one board and on eight, with the draft tree and without it.

Each position has its own noise, one value per token of the vocabulary, and the token drawn is the one whose
log-probability and noise add up to most (the Gumbel-max trick). So the noise is known before the target's distribution
is, and drafts can be ranked by what the target would draw with this noise, not only by what is likely. This coupling is
that of Daliri, Musco and Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv
2408.07978. The text is the same with it and without it.

All that is as long as the vocabulary is done here, by ``draw_tokens`` and ``rank_drafts``. Whoever runs head and
drafter calls them right behind these, off the event loop. The origin's core is told tokens and a draft's few proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.config import GenerateOptions, TokenLogprobs
from flowspec_edge.core.events import DraftFinished, HeadFinished, RunDraft, RunHead
from flowspec_edge.core.rows import Before, Floats
from flowspec_edge.core.speculation.constraint import Constraint, forced_behind, only_allowed, prune_drafts
from flowspec_edge.core.speculation.logprobs import logprobs_of
from flowspec_edge.core.speculation.penalties import penalised, penalised_drafts
from flowspec_edge.errors import GrammarError

Noise = Callable[[int, int], Floats]
"""The exponential times [vocab_size] of a seed and a position."""

NUM_KEPT_POSITIONS = 64
"""Positions whose noise is kept at hand, of all sessions together: most draft trees are up to 16 rows deep. They take
38 MB with a vocabulary of 150,000 tokens."""
SHARPNESS = 1.5
"""The exponent that turns a draft's probability into the chance that its token is drawn.

The demo model's head foretells tokens best with 1.5 at temperature 0 and with 1.2 at 0.6. On the virtual clock 1.5
brings 1 to 4 % more tokens/s than 1 at both temperatures, and 3 brings fewer."""
MIN_REST = 1e-9
"""The least probability of all tokens together that a draft does not propose."""
MIN_LOG_PROB = -1e4
"""What minus infinity counts as where all of a row's proposals may have it."""


def noise_of(vocab_size: int) -> Noise:
    """The noise of draws from a vocabulary of that size. What was asked for last is kept."""
    return lru_cache(NUM_KEPT_POSITIONS)(partial(_exponential_times, vocab_size))


def _exponential_times(vocab_size: int, seed: int, position: int) -> Floats:
    """Drawn in double precision, for none may be 0."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=position))
    return generator.standard_exponential(vocab_size).astype(np.float32)


def draw_tokens(job: RunHead, logits: Floats, noise: Noise, constraint: Constraint | None = None) -> HeadFinished:
    """Draw the tokens after the rows of ``job`` from their ``logits`` [rows, vocab_size].

    ``constraint`` is the grammar of the job's options, where they have one.

    A row below another one gets no token where the draw after that one went elsewhere. So on the whole not many more
    tokens are drawn than the text takes.
    """
    try:
        return _draw_tokens(job, logits, Sampler(job.options, noise, constraint), constraint)
    except GrammarError as cause:
        return HeadFinished((None,) * len(job.rows), refusal=str(cause))


def _draw_tokens(job: RunHead, logits: Floats, sampler: Sampler, constraint: Constraint | None) -> HeadFinished:
    drawn: dict[int, int | None] = {}
    logprobs: list[TokenLogprobs | None] = []
    forced: list[tuple[int, ...]] = []
    for place, (row, position, values) in enumerate(zip(job.rows, job.positions, logits, strict=True)):
        is_dead = row.parent in drawn and drawn[row.parent] != row.token
        before = None if is_dead or job.paths is None else job.paths.before(place)
        token = drawn[row.id] = None if is_dead else sampler.draw(values, position + 1, before)
        if (num_top := job.options.num_logprobs) is not None:
            logprobs.append(None if token is None else logprobs_of(values, token, num_top))
        if constraint is not None:
            forced.append(
                () if before is None or token is None else forced_behind(np.append(before.written, token), constraint)
            )
    return HeadFinished(tuple(drawn[row.id] for row in job.rows), tuple(logprobs), tuple(forced))


def rank_drafts(
    job: RunDraft, drafts: DraftFinished, noise: Noise, constraint: Constraint | None = None
) -> DraftFinished:
    """What the drafter proposed in ``job``, the proposals of each row in the order in which they are likely drawn.

    ``constraint`` is the job's grammar, where it has one: what that does not allow comes last, with minus infinity.
    Where the job has no options, drafts are ranked without the noise of the draw.
    """
    if not len(drafts.tokens):
        return drafts
    befores = [] if job.paths is None else [job.paths.before(place) for place in range(len(drafts.tokens))]
    if constraint is not None and befores:  # none behind a part of a prompt, where nothing is drafted
        try:
            drafts = prune_drafts(drafts, befores, constraint)
        except GrammarError:  # the head will say so
            return DraftFinished(drafts.tokens, np.full_like(drafts.log_probs, -np.inf))
    log_probs = drafts.log_probs
    if job.options is not None:
        first = max(len(job.hidden) - 1, 0)
        positions = [position + 2 for position in job.positions[first:].tolist()]  # a pair's, its row's, its children's
        log_probs = Sampler(job.options, noise).foresee(drafts.tokens, log_probs, positions, befores)
    elif constraint is None:
        return drafts
    order = np.argsort(-log_probs, axis=1, kind="stable")
    return DraftFinished(np.take_along_axis(drafts.tokens, order, 1), np.take_along_axis(log_probs, order, 1))


class Sampler:
    """Chooses tokens as the options of a session ask (``GenerateOptions.for_drawing``).

    Where these look back, each draw has to be told what stands ``before`` it. Where they have a grammar,
    ``constraint`` is that.
    """

    def __init__(self, options: GenerateOptions, noise: Noise, constraint: Constraint | None = None) -> None:
        self._options = options
        self._noise = noise
        self._constraint = constraint

    def draw(self, logits: Floats, position: int, before: Before | None = None) -> int:
        """Draw the token at ``position`` from its logits [vocab_size]. Raises GrammarError where none can be drawn."""
        logits = penalised(logits, self._options, self._looking_back(before))
        if self._options.grammar is not None:
            assert before is not None and self._constraint is not None, (
                "a grammar needs what it says of what is written"
            )
            logits = only_allowed(logits, before, self._constraint)
        if self._options.temperature == 0:
            return int(np.argmax(logits))
        probabilities = next_token_distribution(logits, self._options)
        kept = np.flatnonzero(probabilities)
        # The smallest of exponential times / probabilities is the largest of log-probabilities + Gumbel noise.
        with np.errstate(over="ignore"):  # hardly possible tokens take infinitely long
            times = self._noise(self._options.seed, position)[kept] / probabilities[kept]
        return int(kept[np.argmin(times)])

    def foresee(
        self,
        tokens: NDArray[np.int64],
        log_probs: Floats,
        positions: Sequence[int],
        befores: Sequence[Before | None] = (),
    ) -> Floats:
        """Log-chances [rows, k] that each of a draft's ``tokens`` [rows, k] will be drawn, given its position's noise.

        ``log_probs`` [rows, k] are the draft's own, at temperature 1; at temperature ``t`` the target ranks tokens by
        about ``log_prob + t * noise``. A draft hedges between the ways in which a text may go on, and the target takes
        one of them. So the first in rank is drawn more often than its probability says, and chances are sharpened by
        SHARPNESS. All tokens that the draft does not propose count as one more.
        """
        if not len(positions):
            return log_probs
        rest = np.log(np.maximum(1 - np.exp(log_probs).sum(axis=1, keepdims=True), MIN_REST))
        if self._options.logit_bias or self._options.looks_back:
            known = [self._looking_back(before) for before in befores or [None] * len(tokens)]
            log_probs = penalised_drafts(tokens, log_probs, self._options, known)
        ranks = SHARPNESS * np.concatenate([log_probs + self._luck(tokens, log_probs, positions), rest], axis=1)
        highest = ranks.max(axis=1, keepdims=True)
        totals = highest + np.log(np.exp(ranks - highest).sum(axis=1, keepdims=True))
        return (ranks - totals)[:, :-1].astype(np.float32)  # type: ignore[no-any-return]

    def _looking_back(self, before: Before | None) -> Before | None:
        assert before is not None or not self._options.looks_back, "the options ask for what stands before a token"
        return before if self._options.looks_back else None

    def _luck(self, tokens: NDArray[np.int64], log_probs: Floats, positions: Sequence[int]) -> Floats | float:
        """What the noise adds to the rank of each of ``tokens``, [rows, k]; nothing at temperature 0."""
        temperature = self._options.temperature
        if temperature == 0:
            return 0.0
        seed = self._options.seed
        times = np.stack([self._noise(seed, position)[row] for position, row in zip(positions, tokens, strict=True)])
        noise: Floats = -temperature * np.log(times)
        if self._options.cuts_off:  # noise does not help a token that is cut off
            known = np.maximum(log_probs, MIN_LOG_PROB)
            is_kept = np.stack([next_token_distribution(row, self._options) > 0 for row in known])
            noise = np.where(is_kept, noise, np.minimum(noise, 0))
        return noise


def next_token_distribution(logits: Floats, options: GenerateOptions) -> NDArray[np.float64]:
    """Probabilities [vocab_size] after temperature, then top-k, then top-p (nucleus: the smallest set that reaches it),
    then min-p (tokens with at least that share of the likeliest one's probability).

    Ties at a cut go to the smaller token id. ``options.temperature`` must be above 0.
    """
    scaled = logits.astype(np.float64) / options.temperature
    probabilities: NDArray[np.float64] = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    num_tokens = len(probabilities)
    if 0 < options.top_k < num_tokens or options.top_p < 1:
        num_kept, least = _cut(probabilities, options)
        if num_kept < num_tokens:
            is_kept = probabilities > least
            ties = np.flatnonzero(probabilities == least)
            is_kept[ties[: num_kept - np.count_nonzero(is_kept)]] = True
            probabilities[~is_kept] = 0.0
        probabilities /= probabilities.sum()
    if options.min_p > 0:
        probabilities[probabilities < options.min_p * probabilities.max()] = 0.0
        probabilities /= probabilities.sum()
    return probabilities


def _cut(probabilities: NDArray[np.float64], options: GenerateOptions) -> tuple[int, float]:
    """How many of the likeliest tokens top-k and top-p leave, and the probability of the last of them.

    Sorting a whole vocabulary would take longer than all else that a draw does. Which tokens top-p leaves depends on
    the sum over all of them in their order, and that is 1 but for rounding. So it is enough to sort those that may be
    left, unless the cut falls so close to a token that rounding decides.
    """
    num_tokens = len(probabilities)
    if 0 < options.top_k < num_tokens:
        ranked = -np.sort(np.partition(-probabilities, options.top_k - 1)[: options.top_k])
        num_kept = len(ranked)
        if options.top_p < 1:
            cumulative = np.cumsum(ranked)
            num_kept = int(np.searchsorted(cumulative, options.top_p * cumulative[-1])) + 1
    else:
        # All tokens of at most half the mean of what top-p cuts off stand behind its cut.
        ranked = -np.sort(-probabilities[probabilities > (1 - options.top_p) / (2 * num_tokens)])
        cumulative = np.cumsum(ranked)
        slack = 4 * num_tokens * np.finfo(np.float64).eps
        first, last = np.searchsorted(cumulative, [options.top_p * (1 - slack), options.top_p * (1 + slack)])
        if first < last or last == len(ranked):
            ranked = -np.sort(-probabilities)
            cumulative = np.cumsum(ranked)
            first = np.searchsorted(cumulative, options.top_p * cumulative[-1])
        num_kept = int(first) + 1
    num_kept = min(num_kept, len(ranked))
    return num_kept, float(ranked[num_kept - 1])
