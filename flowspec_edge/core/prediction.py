"""A plan's prediction, held against what a generation brought."""

from __future__ import annotations

from dataclasses import dataclass

from flowspec_edge.core.pipeline import RingCosts
from flowspec_edge.core.placement import Plan

TOLERANCE = 0.2
"""A difference up to this is not worth a word: it is what the prediction is good for (core/throughput.py)."""
NOTABLE_SHARE = 0.05
"""Of a trip: what a stage or a link must take beyond its measurement to be named as a cause."""
MIN_TOKENS = 16
"""A shorter text says nothing of tokens/s."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """``cause`` says which part was off, where the difference is large."""

    predicted_per_s: float
    measured_per_s: float
    cause: str | None = None

    @property
    def difference(self) -> float:
        return self.measured_per_s / self.predicted_per_s - 1


def hold_against(plan: Plan, costs: RingCosts, tokens_per_s: float, num_tokens: int) -> Outcome | None:
    """None where the generation was too short to tell."""
    if num_tokens < MIN_TOKENS or tokens_per_s <= 0 or not costs.is_measured or len(costs.stages) != len(plan.stages):
        return None
    outcome = Outcome(plan.tokens_per_s, tokens_per_s)
    if abs(outcome.difference) <= TOLERANCE:
        return outcome
    return Outcome(plan.tokens_per_s, tokens_per_s, _cause(plan, costs, is_slower=outcome.difference < 0))


def _cause(plan: Plan, costs: RingCosts, *, is_slower: bool) -> str:
    num_rows = costs.stages[0].mean_size
    rows = f"{num_rows:.0f} rows"
    stages_ms = sum(stage.time.at(plan.num_rows) for stage in plan.stages)
    hops_ms = plan.trip_ms - plan.head_ms - stages_ms
    parts = [
        (f"node {stage.node}", line.at(num_rows) * 1000, stage.time.at(num_rows))
        for stage, line in zip(plan.stages, costs.stages, strict=True)
    ]
    parts.append(("the network, all hops together,", costs.hops.at(num_rows) * 1000, hops_ms))
    parts.append(("the head at the origin", costs.head.at(1) * 1000, plan.head_ms))
    sign = 1 if is_slower else -1
    name, took_ms, expected_ms = max(parts, key=lambda part: sign * (part[1] - part[2]))
    if sign * (took_ms - expected_ms) < NOTABLE_SHARE * plan.trip_ms:
        more = "fewer" if is_slower else "more"
        return f"all parts took what was measured; drafts brought {more} tokens than expected of this text"
    word = "slower" if is_slower else "quicker"
    return f"{name} was {word} than measured: {took_ms:.0f} ms for {rows}, {expected_ms:.0f} expected"
