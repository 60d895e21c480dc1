"""Decides by results whether speculation pays, since measured costs do not tell everything.

Boards get hot, and an origin that drafts may take the processor from a stage on the same board. So the time that tokens
took is compared with the time of as many tokens without drafts, one single row after the other. What is lost is added
up and what is won is taken off, both in the time of a token without drafts. Where too much is lost, speculation pauses,
and is tried again later. So a loss has a limit, however slowly it comes.
"""

from __future__ import annotations

MOST_LOST = 1.6
"""Tokens that may be lost before speculation pauses: the noise of a few steps is no reason to stop. Of what was won
before no more than this counts, nor of what a single step has lost: so a machine that stood still for a moment is no
reason to stop either."""
FIRST_PAUSE_TOKENS = 32
"""Length of the first pause, and of the first one after speculation has won MOST_LOST; every further one is twice as
long."""


class Payoff:
    """Counts one generation's tokens."""

    def __init__(self) -> None:
        self.is_on = True
        self._counted_at: float | None = None
        self._lost = 0.0
        self._pause_tokens = FIRST_PAUSE_TOKENS
        self._num_left = 0  # tokens of the pause

    def count(self, num_tokens: int, now: float, plain_token_s: float) -> None:
        """Tokens were accepted at ``now`` (seconds); one token takes ``plain_token_s`` without speculation."""
        taken_s = 0.0 if self._counted_at is None else now - self._counted_at
        is_first, self._counted_at = self._counted_at is None, now
        if is_first or plain_token_s <= 0:
            return
        if not self.is_on:
            self._num_left -= num_tokens
            self.is_on = self._num_left <= 0
            return
        lost = min(taken_s / plain_token_s - num_tokens, MOST_LOST)
        self._lost = max(self._lost + lost, -MOST_LOST)
        if self._lost == -MOST_LOST:
            self._pause_tokens = FIRST_PAUSE_TOKENS
        elif self._lost > MOST_LOST:
            self.is_on, self._lost = False, 0.0
            self._num_left, self._pause_tokens = self._pause_tokens, 2 * self._pause_tokens
