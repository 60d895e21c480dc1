"""Whether speculation pays, by what it brought: the last word where measured costs do not tell everything.

Boards get hot, and an origin that drafts may take the processor from a stage on the same board. So tokens are counted
against the time in which single rows, nothing drafted, would have brought as many. Where that would have been less,
speculation pauses, and is tried again later.
"""

from __future__ import annotations

TRIAL_TOKENS = 16
"""Tokens over which speculation shows what it brings."""
FIRST_PAUSE_TOKENS = 32
"""Length of the first pause; every further one is twice as long."""
TOLERANCE = 1.1
"""How much longer than plain decoding it may take: one trial's noise is no reason to stop."""


class Payoff:
    """Counts one generation's tokens."""

    def __init__(self) -> None:
        self.is_on = True
        self._num_tokens = 0
        self._began: float | None = None
        self._pause_tokens = FIRST_PAUSE_TOKENS

    def count(self, num_tokens: int, now: float, plain_token_s: float) -> None:
        """Tokens were accepted at ``now`` (seconds); one token takes ``plain_token_s`` without speculation."""
        if self._began is None:
            self._began = now
            return
        self._num_tokens += num_tokens
        if self._num_tokens < (TRIAL_TOKENS if self.is_on else self._pause_tokens):
            return
        if not self.is_on:
            self.is_on = True
            self._pause_tokens *= 2
        elif now - self._began > self._num_tokens * plain_token_s * TOLERANCE:
            self.is_on = False
        else:
            self._pause_tokens = FIRST_PAUSE_TOKENS
        self._num_tokens, self._began = 0, now
