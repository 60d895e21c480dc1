"""Makes the paper's table of a comparison's outcomes, as JSON and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from statistics import fmean
from typing import Any

from flowspec_edge.bench.compare import YARDSTICK, Figures, Outcome
from flowspec_edge.bench.tensor_parallel import MODELLED, model_figures
from flowspec_edge.bench.testbed import Testbed
from flowspec_edge.core.planning.throughput import tokens_of_best_rows as tau
from flowspec_edge.core.speculation.schedules import find_schedule

LOOPING = "looping"
"""The column of outputs that repeat themselves.

They are easy for every schedule, so they count in no set and no mean.
"""

Row = dict[str, Any]


def build_report(testbed: Testbed, outcomes: Sequence[Outcome], schedules: Sequence[str], max_new_tokens: int) -> Row:
    """The figures of one testbed. A set in which all outputs loop has no rows.

    ``tokens_per_s`` of a set is xi = its decoded tokens / the seconds in which they were decoded.
    ``speedup_over_chunked`` is SR = xi / xi of ``chunked``. Means are taken over the sets, of xi and of SR separately,
    as in the paper.
    """
    temperatures = sorted({outcome.task.temperature for outcome in outcomes})
    sets = list(dict.fromkeys(outcome.task.prompt_set for outcome in outcomes))
    rows: list[Row] = []
    for temperature in temperatures:
        for column in [*sets, LOOPING]:
            chosen = [
                outcome
                for outcome in outcomes
                if outcome.task.temperature == temperature
                and column == (LOOPING if outcome.is_looping else outcome.task.prompt_set)
            ]
            if chosen:
                rows += _column(testbed, chosen, schedules, column, temperature)
    return {
        "testbed": testbed.name,
        "summary": testbed.summary,
        "max_new_tokens": max_new_tokens,
        "rows": rows,
        "mean": {
            schedule: {f"{temperature:g}": _mean(rows, schedule, temperature) for temperature in temperatures}
            for schedule in schedules
        },
    }


def _column(
    testbed: Testbed, outcomes: Sequence[Outcome], schedules: Sequence[str], column: str, temperature: float
) -> Iterable[Row]:
    chunked = _total(testbed, outcomes, YARDSTICK)
    for schedule in schedules:
        is_modelled = schedule in MODELLED
        figures = model_figures(schedule, testbed, chunked) if is_modelled else _total(testbed, outcomes, schedule)
        rate = _rate(figures)
        row: Row = {
            "schedule": schedule,
            "prompt_set": column,
            "temperature": temperature,
            "num_prompts": len(outcomes),
            "tokens_per_s": rate,
            "speedup_over_chunked": rate / _rate(chunked) if _rate(chunked) else 0.0,
            "acceptance_length": figures.num_tokens / max(figures.num_verifications, 1),
            "bound_tokens_per_s": None,
            "share_of_bound": None,
            "is_modelled": is_modelled,
        }
        if not is_modelled and figures.decode_s:
            in_flight = figures.row_seconds / figures.decode_s
            chunk_rows = figures.num_forward_rows / max(figures.num_forwards, 1)
            is_coupled = find_schedule(schedule).is_coupled
            places = [path for outcome in outcomes for path in outcome.places.get(is_coupled, ())]
            bound = tau(places, in_flight) / testbed.trip_ms(chunk_rows) * 1000
            row |= {
                "bound_tokens_per_s": bound,
                "share_of_bound": rate / bound,
                "rows_in_flight": in_flight,
                "rows_per_forward": chunk_rows,
                "rows_sent_per_token": figures.num_rows_sent / max(figures.num_decoded, 1),
            }
        yield row


def _total(testbed: Testbed, outcomes: Sequence[Outcome], schedule: str) -> Figures:
    return reduce(Figures.__add__, (outcome.figures[testbed.name, schedule] for outcome in outcomes))


def _rate(figures: Figures) -> float:
    return figures.num_decoded / figures.decode_s if figures.decode_s else 0.0


MEANS = ("tokens_per_s", "speedup_over_chunked", "acceptance_length", "bound_tokens_per_s", "share_of_bound")


def _mean(rows: Sequence[Row], schedule: str, temperature: float) -> Row:
    chosen = [
        row
        for row in rows
        if (row["schedule"], row["temperature"]) == (schedule, temperature) and row["prompt_set"] != LOOPING
    ]
    return {
        name: fmean(values) if None not in values and values else None
        for name in MEANS
        for values in [[row[name] for row in chosen]]
    } | {"num_prompts": sum(row["num_prompts"] for row in chosen)}


LEGEND = """\
tau: tokens per verification
bound: tokens/s if nothing ever waited: tau of a draft tree of all rows under way / time of a trip through the idle ring
of bound: the share of that which was reached"""


def format_report(report: Row) -> str:
    """The tables of one testbed, one per temperature, as Markdown, and what their columns mean."""
    parts = [f"### {report['testbed']}: {report['summary']}"]
    rows = report["rows"]
    for temperature in sorted({row["temperature"] for row in rows}):
        parts.append(_format_table(report, [row for row in rows if row["temperature"] == temperature], temperature))
    return "\n\n".join([*parts, LEGEND])


def _format_table(report: Row, rows: Sequence[Row], temperature: float) -> str:
    columns = list(dict.fromkeys(row["prompt_set"] for row in rows))
    sets = [column for column in columns if column != LOOPING]
    cells = {(row["schedule"], row["prompt_set"]): row for row in rows}
    counts = {column: next(row["num_prompts"] for row in rows if row["prompt_set"] == column) for column in columns}
    header = ["schedule", *(f"{name} ({counts[name]})" for name in sets), "mean", "tau", "bound", "of bound"]
    if LOOPING in columns:
        header.append(f"{LOOPING} ({counts[LOOPING]})")
    lines = []
    for schedule, by_temperature in report["mean"].items():
        mean = by_temperature[f"{temperature:g}"]
        label = f"{schedule} (modelled)" if schedule in MODELLED else schedule
        line = [label, *(_cell(cells[schedule, name]) for name in sets), _cell(mean)]
        line.append(_number(mean["acceptance_length"]))
        line.append(_number(mean["bound_tokens_per_s"]))
        line.append("-" if mean["share_of_bound"] is None else f"{mean['share_of_bound']:.0%}")
        if LOOPING in columns:
            line.append(_cell(cells[schedule, LOOPING]))
        lines.append(line)
    title = (
        f"temperature {temperature:g}, at most {report['max_new_tokens']} new tokens: tokens/s, and SR over {YARDSTICK}"
    )
    return f"{title}\n\n{format_table(header, lines)}"


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left and the others to the right."""
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]

    def row(line: Sequence[str]) -> str:
        padded = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'-' * (widths[0] + 2)}|{'|'.join('-' * (width + 1) + ':' for width in widths[1:])}|"
    return "\n".join([row(header), rule, *(row(line) for line in lines)])


def _cell(figures: Mapping[str, Any]) -> str:
    if figures["tokens_per_s"] is None:
        return "-"
    return f"{_number(figures['tokens_per_s'])} {figures['speedup_over_chunked']:.2f}x"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
