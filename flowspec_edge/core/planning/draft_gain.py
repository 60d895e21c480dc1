"""How much the drafts of a model bring, learned from its texts: one head is right twice as often as another."""

from __future__ import annotations

from dataclasses import dataclass

from flowspec_edge.core.planning.throughput import TYPICAL_DRAFTS, AcceptanceCurve, Throughput
from flowspec_edge.core.speculation.pipeline import RingCosts

ASSUMED_TOKENS = 50
"""What is assumed at first weighs as much as so many tokens of text."""
REMEMBERED_TOKENS = 2000
"""Older texts fade: so many tokens weigh at most as what is known."""
MOST = 3.0
"""The largest gain that is believed: a text that repeats itself says nothing of the next one."""
HALVINGS = 20
"""Of the range up to ``MOST``, for one that is seen: far finer than a text can tell."""


@dataclass(frozen=True, slots=True)
class DraftGain:
    """What a trip brings beyond its first token, over what it would by ``TYPICAL_DRAFTS``; learned from so many tokens
    of text.
    """

    factor: float = 1.0
    num_tokens: int = 0

    @property
    def acceptance(self) -> AcceptanceCurve:
        return TYPICAL_DRAFTS.scaled(self.factor)

    def with_text(self, factor: float, num_tokens: int) -> DraftGain:
        """With what a text of so many tokens brought."""
        known = ASSUMED_TOKENS + self.num_tokens
        mean = (self.factor * known + factor * num_tokens) / (known + num_tokens)
        return DraftGain(mean, min(self.num_tokens + num_tokens, REMEMBERED_TOKENS))


def gain_seen(schedule: str, costs: RingCosts, tokens_per_s: float) -> float | None:
    """The factor of :class:`DraftGain` by which a ring of these costs brought ``tokens_per_s``, at most ``MOST``. None
    where the schedule drafts nothing.
    """
    if schedule == "autoregressive":
        return None
    num_rows = costs.stages[0].mean_size
    trip_s = sum(part.line.at(num_rows) for part in (*costs.stages, costs.hops)) + costs.head.line.at(1)
    draft_ms = 1000 * costs.draft.line.at(costs.draft.mean_size)

    def expected(factor: float) -> float:
        throughput = Throughput(schedule, TYPICAL_DRAFTS.scaled(factor), draft_ms)
        interval_ms = 1000 * costs.interval_s(num_rows)
        return float(throughput.tokens_per_s(num_rows, 1000 * trip_s, interval_ms, len(costs.stages)))

    low, high = 0.0, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if expected(middle) > tokens_per_s else (middle, high)
    return high
