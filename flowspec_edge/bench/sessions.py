"""Compares numbers of sessions on one ring: what several clients get together, and what is left to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from flowspec_edge.bench.compare import Bench, Plan, Task, check_text
from flowspec_edge.bench.report import format_table
from flowspec_edge.bench.side_by_side import AskedText, SharedTime, SideBySide
from flowspec_edge.bench.testbed import Testbed

Row = dict[str, Any]


def measure_sessions(
    bench: Bench, plan: Plan, tasks: Sequence[Task], numbers: Sequence[int], on_finish: Callable[[], None]
) -> list[dict[str, Any]]:
    """A report for each testbed: every schedule and temperature with each of these numbers of clients, 1 among them.

    All clients ask for the texts of all tasks, one after the other. Each begins with another one, so that at any time
    they have different texts, and in the end the same. ``on_finish`` is called after each run.

    Raises:
        BenchError: a prompt leaves no room in the model's context.
        LosslessError: a text is another one than the target's.
    """
    temperatures = sorted({task.temperature for task in tasks})
    reports: list[dict[str, Any]] = [
        {"testbed": one.name, "summary": one.summary, "max_new_tokens": plan.max_new_tokens, "rows": []}
        for one in plan.testbeds
    ]
    for temperature in temperatures:
        asked = [
            AskedText(bench.record(task, options), options)
            for task in tasks
            if task.temperature == temperature
            for options in [task.options(plan)]
        ]
        for testbed, report in zip(plan.testbeds, reports, strict=True):
            for schedule in plan.schedules:
                rows: list[Row] = []
                for number in numbers:
                    shared = _run(bench, testbed, asked, schedule, number)
                    rows.append(_row(shared, schedule, temperature, rows[0] if rows else None))
                    on_finish()
                report["rows"] += rows
    return reports


def _run(bench: Bench, testbed: Testbed, asked: Sequence[AskedText], schedule: str, number: int) -> SharedTime:
    texts = [replace(text, options=replace(text.options, schedule=schedule)) for text in asked]
    firsts = [client * len(texts) // number for client in range(number)]
    clients = [[*texts[first:], *texts[:first]] for first in firsts]
    shared = SideBySide(testbed, clients, bench.drafter, bench.limits).run()
    for wanted, written in zip(clients, shared.texts, strict=True):
        for text, one in zip(wanted, written, strict=False):  # the last one may be unfinished
            right = text.tape.continuation[: len(one.tokens)]
            check_text(one.tokens, right, f"{schedule} on {testbed.name} with {number} sessions")
    return shared


def _row(shared: SharedTime, schedule: str, temperature: float, alone: Row | None) -> Row:
    return {
        "schedule": schedule,
        "temperature": temperature,
        **row_of(shared, alone),
        "stage_busy": [busy_s / shared.seconds for busy_s in shared.busy_s[:-1]],
        "origin_busy": shared.busy_s[-1] / shared.seconds,
    }


def row_of(shared: SharedTime, alone: Row | None) -> Row:
    """What some clients got, beside the row of one alone.

    The share of a client is its tokens/s times the number of clients, over those of all together.
    """
    rate, number = shared.tokens_per_s, len(shared.texts)
    begun = [text for texts in shared.texts for text in texts if text.tokens]
    return {
        "sessions": number,
        "tokens_per_s": rate,
        "over_one_session": rate / alone["tokens_per_s"] if alone else 1.0,
        "lowest_share": min(shared.num_tokens(client) * number / (rate * shared.seconds) for client in range(number)),
        "first_token_s": fmean(text.first_token_s for text in begun),
        "longest_pause_s": max(text.longest_pause_s for text in begun),
    }


HEADER = ["sessions", "tokens/s", "over one", "lowest share", "first token, s", "longest pause, s"]


def cells_of(row: Row) -> list[str]:
    """The cells below HEADER."""
    return [
        str(row["sessions"]),
        f"{row['tokens_per_s']:.2f}",
        f"{row['over_one_session']:.2f}x",
        f"{row['lowest_share']:.2f}",
        f"{row['first_token_s']:.2f}",
        f"{row['longest_pause_s']:.2f}",
    ]


def format_sessions(report: dict[str, Any]) -> str:
    """The table of one testbed, as Markdown."""
    header = ["schedule", "temperature", *HEADER, "busiest stage", "origin"]
    lines = [
        [
            row["schedule"],
            f"{row['temperature']:g}",
            *cells_of(row),
            f"{max(row['stage_busy']):.0%}",
            f"{row['origin_busy']:.0%}",
        ]
        for row in report["rows"]
    ]
    return f"### {report['testbed']}: {report['summary']}\n\n{format_table(header, lines)}"
