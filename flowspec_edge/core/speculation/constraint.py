"""What a grammar allows of a text, and what that leaves of logits and of drafts.

The grammar itself is read elsewhere (``engine/grammar.py``). What it allows follows from the tokens of the text alone,
so it is the same on every ring, in the unsplit model and after a loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flowspec_edge.core.events import CheckDrafts, DraftFinished, DraftsChecked
from flowspec_edge.core.rows import Before, Floats
from flowspec_edge.errors import GrammarError

MAX_FORCED = 16
"""Tokens in a row that are told of as forced at once: as deep as most draft trees are."""


class Constraint(Protocol):
    """One grammar. A text that follows it ends with one of the tokens in ``ends``."""

    @property
    def ends(self) -> frozenset[int]: ...

    def allowed(self, written: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which tokens [vocab_size] may come behind ``written`` [n], a text so far without its prompt. There is always
        one.

        Raises:
            GrammarError: the text has become too complex for the grammar.
        """

    def num_allowed(self, written: NDArray[np.int64], tokens: Sequence[int]) -> int:
        """How many of the ``tokens`` may come behind ``written``, one after the other, before the text's end. That is
        what ``allowed`` says of each, for less time. It is over where that would raise.
        """


def forced_behind(written: NDArray[np.int64], constraint: Constraint) -> tuple[int, ...]:
    """The tokens behind ``written``, up to MAX_FORCED, as long as one alone is allowed, and does not end the text."""
    forced: list[int] = []
    while len(forced) < MAX_FORCED:
        try:
            allowed = np.flatnonzero(constraint.allowed(np.append(written, forced).astype(np.int64)))
        except GrammarError:  # whoever draws there will say so
            break
        if len(allowed) > 1 or int(allowed[0]) in constraint.ends:
            break
        forced.append(int(allowed[0]))
    return tuple(forced)


def check_drafts(job: CheckDrafts, constraint: Constraint) -> DraftsChecked:
    """How much of each chain of drafts may come."""
    num_allowed = [
        constraint.num_allowed(job.paths.before(place).written, chain) for place, chain in enumerate(job.chains)
    ]
    return DraftsChecked(job.session, tuple(num_allowed))


def only_allowed(logits: Floats, before: Before, constraint: Constraint) -> Floats:
    """The logits [vocab_size] with minus infinity for tokens that may not come."""
    return np.where(constraint.allowed(before.written), logits, np.float32(-np.inf))


def prune_drafts(drafts: DraftFinished, befores: Sequence[Before], constraint: Constraint) -> DraftFinished:
    """Proposals that may not come get a log-probability of minus infinity, and the others share what these had.

    Where a single token may come, it is proposed, whatever the drafter proposes.
    """
    tokens, log_probs = drafts.tokens.copy(), drafts.log_probs.copy()
    for row, before in enumerate(befores):
        allowed = constraint.allowed(before.written)
        is_allowed = allowed[tokens[row]]
        if np.count_nonzero(allowed) == 1:
            place = int(np.argmax(is_allowed))  # the first one where it is not proposed
            tokens[row, place], log_probs[row, place] = np.argmax(allowed), 0.0
            is_allowed[place] = True
        elif is_allowed.any():
            chances = np.exp(log_probs[row])
            log_probs[row] += np.log(chances.sum() / chances[is_allowed].sum())
        log_probs[row, ~is_allowed] = -np.inf
    return DraftFinished(tokens, log_probs)
