"""Compares a plan's prediction with what a generation brought, and names what differed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flowspec_edge.core.planning.draft_gain import gain_seen
from flowspec_edge.core.planning.placement import Hop, Plan
from flowspec_edge.core.speculation.pipeline import RingCosts

TOLERANCE = 0.2
"""A relative difference up to this is not reported: predictions are not more exact (core/planning/throughput.py)."""
NOTABLE_SHARE = 0.05
"""The share of a trip by which a stage or a link must differ from its measurement to be named as the cause."""
MIN_TOKENS = 16
"""A shorter text says nothing about tokens/s."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Predicted and measured tokens/s of a generation, whose chunks had ``num_rows`` on average.

    Where the difference is large, ``cause`` says which part differed from its measurement. ``is_network`` says that it
    was the hops: only a new measurement of the links tells which one. ``gain`` is what drafts brought (``gain_seen``).
    """

    predicted_per_s: float
    measured_per_s: float
    cause: str | None = None
    is_network: bool = False
    num_rows: float = 1.0
    gain: float | None = None

    @property
    def difference(self) -> float:
        return self.measured_per_s / self.predicted_per_s - 1

    def to_report(self) -> dict[str, Any]:
        """A JSON object: predicted tokens/s, the relative difference of what was measured, and the cause."""
        return {
            "predicted_tokens_per_s": round(self.predicted_per_s, 3),
            "difference": round(self.difference, 3),
            "cause": self.cause,
        }


def hold_against(plan: Plan, costs: RingCosts, tokens_per_s: float, num_tokens: int) -> Outcome | None:
    """Compare a plan with a generation. Returns None where the generation was too short to tell."""
    if num_tokens < MIN_TOKENS or tokens_per_s <= 0 or not costs.is_measured or len(costs.stages) != len(plan.stages):
        return None
    gain = gain_seen(plan.schedule, costs, tokens_per_s) if plan.acceptance.has_drafts else None
    outcome = Outcome(plan.tokens_per_s, tokens_per_s, gain=gain)
    if abs(outcome.difference) <= TOLERANCE:
        return outcome
    num_rows = costs.stages[0].mean_size
    cause, is_network = _cause(plan, costs, num_rows, is_slower=outcome.difference < 0)
    return replace(outcome, cause=cause, is_network=is_network, num_rows=num_rows)


def name_link(outcome: Outcome, plan: Plan, measured: Mapping[tuple[str, str], Hop]) -> Outcome:
    """The outcome, with the link that has changed most since the plan was made as its cause.

    ``measured`` has the ring's links as they are now, by their two ends.
    """
    found = []
    for hop in plan.hops:
        link = measured.get((hop.start, hop.end)) or measured.get((hop.end, hop.start))
        if link is not None:
            found.append((hop, hop.ms(outcome.num_rows, link) - hop.ms(outcome.num_rows)))
    sign = 1 if outcome.difference < 0 else -1
    notable = [pair for pair in found if sign * pair[1] >= NOTABLE_SHARE * plan.trip_ms]
    if not notable:
        return replace(outcome, cause=f"{outcome.cause}; by now each link is as it was measured")
    hop, off_ms = max(notable, key=lambda pair: sign * pair[1])
    took_ms, expected_ms = hop.ms(outcome.num_rows) + off_ms, hop.ms(outcome.num_rows)
    name = f"the link between {hop.start} and {hop.end}"
    return replace(outcome, cause=_compare(name, took_ms, expected_ms, outcome.num_rows))


def _compare(name: str, took_ms: float, expected_ms: float, num_rows: float) -> str:
    word = "slower" if took_ms > expected_ms else "quicker"
    return f"{name} was {word} than measured: {took_ms:.0f} ms for {num_rows:.0f} rows, {expected_ms:.0f} expected"


class _Part(NamedTuple):
    """A part of a trip, by what it took and by what was expected of it, in milliseconds."""

    name: str
    took_ms: float
    expected_ms: float
    is_network: bool = False


def _cause(plan: Plan, costs: RingCosts, num_rows: float, *, is_slower: bool) -> tuple[str, bool]:
    """Which part was off, in a sentence, and whether that was the network."""
    stages_ms = sum(stage.time.at(plan.num_rows) for stage in plan.stages)
    hops_ms = plan.trip_ms - plan.head_ms - stages_ms
    parts = [
        _Part(f"node {stage.node}", fit.line.at(num_rows) * 1000, stage.time.at(num_rows))
        for stage, fit in zip(plan.stages, costs.stages, strict=True)
    ]
    hops_took_ms = costs.hops.line.at(num_rows) * 1000
    parts.append(_Part("the network, all hops together,", hops_took_ms, hops_ms, is_network=True))
    parts.append(_Part("the head at the origin", costs.head.line.at(1) * 1000, plan.head_ms))
    sign = 1 if is_slower else -1
    worst = max(parts, key=lambda part: sign * (part.took_ms - part.expected_ms))
    if sign * (worst.took_ms - worst.expected_ms) < NOTABLE_SHARE * plan.trip_ms:
        more = "fewer" if is_slower else "more"
        return f"all parts took what was measured; drafts brought {more} tokens than expected of this text", False
    return _compare(worst.name, worst.took_ms, worst.expected_ms, num_rows), worst.is_network
