"""Decides by results whether speculation pays, since measured costs do not tell everything.

Boards get hot, and an origin that drafts may take the processor from a stage on the same board. So the time that tokens
took is compared with the time of as many tokens without drafts, one single row after the other. Where that would have
been less, speculation pauses, and is tried again later.
"""

from __future__ import annotations

TRIAL_TOKENS = 16
"""Tokens over which speculation shows what it brings."""
FIRST_PAUSE_TOKENS = 32
"""Length of the first pause; every further one is twice as long."""
TOLERANCE = 1.1
"""How many times as long as plain decoding speculation may take: the noise of one trial is no reason to stop."""


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
