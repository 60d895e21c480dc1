"""What ``make chaos`` consists of: each part tries one thing many times, and says what it found and in figures how it
went."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.chaos import many_rounds, outsiders, rounds
from tests.fuzz import many_inputs
from tests.interleavings import many_cases
from tests.interleavings.cases import FAULTS
from tests.lan import why_not

OUTSIDERS_S = 10.0
"""For each kind of misbehaviour."""
REST_S = 60.0
"""After this long without outsiders the node's memory is what it was."""

Tell = Callable[[float, str], None]
"""Hears which share of a part is done, and what is to be shown of it; an empty text is nothing to show."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """``found`` are sentences on what is wrong, ``summary`` one on what was tried; ``figures`` has all of it."""

    found: list[str]
    summary: str
    figures: dict[str, Any]
    markdown: str


@dataclass(frozen=True, slots=True)
class Part:
    """``num`` is how often it tries what it tries, by default; ``usual_s`` what that takes on two cores,
    with all others.

    Where it ``yields``, it runs beside others, in the time that they leave: no figure of it is a time to compare.
    """

    num: int
    usual_s: float
    run: Callable[..., Outcome]
    """Takes that number, a seed and a ``Tell``; and ``yields``, whether others run beside it, where it may."""
    needs_lan: bool = False
    yields: bool = False

    def why_not(self) -> str | None:
        """Why it cannot be run on this machine, or None."""
        return why_not() if self.needs_lan else None


def _rounds(num: int, seed: int, tell: Tell, fault: str | None = None) -> Outcome:
    figures = many_rounds.try_rounds(num, seed, lambda done, told: tell(done / num, told), fault)
    texts = [(figures["equal"], figures["texts"]), (figures["asked_again_equal"], figures["asked_again"])]
    wrong = sum(of - equal for equal, of in texts)
    found = [f"{wrong} texts are not the undisturbed ones: {figures['errors'] or 'no error was given'}"] * (wrong > 0)
    summary = f"{figures['rounds']} faults; {figures['equal']} of {figures['texts']} texts equal"
    return Outcome(found, summary, figures, rounds.as_markdown(figures))


def _interleavings(num: int, seed: int, tell: Tell, *, yields: bool = False) -> Outcome:
    figures = many_cases.play_many(num, seed, lambda done: tell(done / num, ""), yields=yields)
    met = figures["met"]
    found = [*figures["found"], *(f"was never met: {name}" for name in figures["missed"])]
    ends = {name.removeprefix("text: "): count for name, count in met.items() if name.startswith("text: ")}
    summary = f"{figures['cases']:,} cases, {met.get('rings lost', 0):,} rings lost; texts: " + ", ".join(
        f"{count:,} {name}" for name, count in ends.items()
    )
    lines = ["| what befell a ring | times |", "|---|---|"]
    lines += [f"| {name} | {met.get(name, 0):,} |" for name in FAULTS]
    return Outcome(found, summary, figures, "\n".join(lines))


def _outsiders(num: int, seed: int, tell: Tell) -> Outcome:
    told: list[str] = []
    num_steps = len(outsiders.KINDS) + 2

    def hear(what: str) -> None:
        tell(len(told) / num_steps, what)
        told.append(what)

    figures = asyncio.run(outsiders.try_outsiders(num, REST_S, seed, tell=hear))
    memory, worst = figures["memory"], figures["by_kind"]["all at once"]
    summary = (
        f"all at once: a member comes in within {worst['greeting_s'][2]:.3f} s, gaps of its text up to "
        f"{worst['gap_s'][2]:.3f} s; memory {memory['before_mb']:.0f} -> {memory['most_mb']:.0f} -> "
        f"{memory['after_mb']:.0f} MB; {figures['lines_printed']} lines printed"
    )
    return Outcome(figures["found"], summary, figures, outsiders.as_markdown(figures))


def _fuzz(num: int, seed: int, tell: Tell, *, yields: bool = False) -> Outcome:
    figures = many_inputs.try_all(num, seed, lambda done: tell(done / num, ""), yields=yields)
    found = [
        f"{name}: {report['found']} found, see above"
        for name, report in figures["kinds"].items()
        if report.get("found")
    ]
    if (tried := figures["num"]) < num:
        found.append(f"{tried:,} of {num:,} inputs were tried")
    grown = max(report.get("grown_mb", 0.0) for report in figures["kinds"].values())
    witness = sum(report.get("witness_texts", 0) for report in figures["kinds"].values())
    summary = f"{tried:,} inputs; memory grew by {grown} MB at most; {witness} texts of a witness were right"
    lines = ["| input | tried | slowest, ms |", "|---|---|---|"]
    for name, report in figures["kinds"].items():
        lines.append(f"| {name} | {report['num']:,} | {report.get('slowest_ms', '-')} |")
    return Outcome(found, summary, figures, "\n".join(lines))


PARTS: Mapping[str, Part] = {
    "rounds": Part(200, 900.0, _rounds, needs_lan=True),
    "interleavings": Part(10_000, 660.0, _interleavings, yields=True),
    "outsiders": Part(int(OUTSIDERS_S), 150.0, _outsiders, needs_lan=True),
    "fuzz": Part(1_000_000, 200.0, _fuzz, yields=True),
}
"""By name. The number of ``outsiders`` is that of seconds for each kind."""
