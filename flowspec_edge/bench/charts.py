"""Draws the figures of one testbed as bars: a panel per temperature, a group per prompt set, a bar per schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowspec_edge.bench.compare import YARDSTICK
from flowspec_edge.bench.report import LOOPING
from flowspec_edge.bench.svg import FAINT, INK, Drawing, nice_step
from flowspec_edge.bench.tensor_parallel import MODELLED

COLORS = {
    "mega-lm": "#d9d9e3",
    "galaxy": "#bdbdcf",
    "autoregressive": "#9aa5b1",
    "chunked": "#8fb8de",
    "pruned": "#5b8fc7",
    "pipedec": "#e0a458",
    "lockstep": "#c8553d",
    "flowspec": "#2a9d6f",
}
OTHER_COLORS = (
    "#7b6fb0",
    "#a05195",
    "#d45087",
    "#f95d6a",
    "#ff7c43",
    "#ffa600",
    "#6b8e23",
    "#20808d",
    "#4b5d67",
    "#b08968",
)
BAR, GROUP_GAP = 22, 26
LEFT, RIGHT, TOP, PANEL, GAP = 64, 24, 96, 300, 50
HEADROOM = 116
"""Pixels of a panel above its highest bar, for the title and for the label on the bar."""


def draw_bars(report: dict[str, Any]) -> str:
    """An SVG file. Outputs that loop are left out, as they are in the means."""
    rows = [row for row in report["rows"] if row["prompt_set"] != LOOPING]
    known = list(report["mean"])
    schedules = [name for name in COLORS if name in known] + [name for name in known if name not in COLORS]
    temperatures = sorted({row["temperature"] for row in rows})
    groups = [*dict.fromkeys(row["prompt_set"] for row in rows), "mean"]
    group_width = len(schedules) * BAR + GROUP_GAP
    width = max(LEFT + len(groups) * group_width + RIGHT, 860)
    height = TOP + len(temperatures) * (PANEL + GAP)
    drawing = Drawing(width, height, f"tokens per second on {report['testbed']}")
    drawing.text(LEFT, 30, report["testbed"], size=20, is_bold=True)
    drawing.text(
        LEFT, 50, f"{report['summary']}  ·  at most {report['max_new_tokens']} new tokens, virtual clock", fill=FAINT
    )
    _draw_legend(drawing, schedules)
    for number, temperature in enumerate(temperatures):
        cells = {(row["prompt_set"], row["schedule"]): row for row in rows if row["temperature"] == temperature} | {
            ("mean", name): report["mean"][name][f"{temperature:g}"] for name in schedules
        }
        _draw_panel(drawing, TOP + number * (PANEL + GAP), temperature, groups, schedules, cells)
    return drawing.to_text()


def color_of(schedule: str) -> str:
    return COLORS.get(schedule) or OTHER_COLORS[sum(map(ord, schedule)) % len(OTHER_COLORS)]


def _draw_legend(drawing: Drawing, schedules: Sequence[str]) -> None:
    x = float(LEFT)
    for schedule in schedules:
        label = f"{schedule} (modelled)" if schedule in MODELLED else schedule
        drawing.rect(x, 64, 12, 12, color_of(schedule))
        drawing.text(x + 17, 74.5, label)
        x += 17 + 7 * len(label) + 14


def _draw_panel(
    drawing: Drawing,
    top: float,
    temperature: float,
    groups: Sequence[str],
    schedules: Sequence[str],
    cells: dict[tuple[str, str], dict[str, Any]],
) -> None:
    bottom = top + PANEL
    highest = max(
        max(cell["tokens_per_s"] or 0, (cell["bound_tokens_per_s"] or 0) if name == "flowspec" else 0)
        for (_, name), cell in cells.items()
    )
    highest = highest or 1.0
    scale = (PANEL - HEADROOM) / highest
    step = nice_step(highest, 6)
    for tick in range(int(highest / step) + 1):
        y = bottom - tick * step * scale
        drawing.line(LEFT, y, drawing.width - RIGHT, y)
        drawing.text(LEFT - 8, y + 4, f"{tick * step:g}", fill=FAINT, anchor="end")
    drawing.text(20, bottom - (PANEL - HEADROOM) / 2, "tokens/s", fill=FAINT, anchor="middle", turned=True)
    drawing.text(LEFT, top + 14, f"temperature {temperature:g}", size=14, is_bold=True)
    drawing.text(
        LEFT + 150,
        top + 14,
        f"value and speed-up over {YARDSTICK} on each bar; dashed: the bound of flowspec",
        fill=FAINT,
        size=11,
    )
    x = LEFT + GROUP_GAP / 2
    for group in groups:
        if group == "mean":
            drawing.rect(x - GROUP_GAP / 2, top + 24, len(schedules) * BAR + GROUP_GAP, PANEL - 24, "#f5f7fa")
            drawing.line(x - GROUP_GAP / 2, bottom, x + len(schedules) * BAR + GROUP_GAP / 2, bottom)
        for schedule in schedules:
            cell = cells.get((group, schedule))
            if cell is not None and cell["tokens_per_s"] is not None:
                _draw_bar(drawing, x, bottom, scale, schedule, group, cell)
            x += BAR
        middle = x - len(schedules) * BAR / 2
        drawing.text(middle, bottom + 18, group, anchor="middle", is_bold=group == "mean")
        x += GROUP_GAP
    drawing.line(LEFT, bottom, drawing.width - RIGHT, bottom, INK)


def _draw_bar(
    drawing: Drawing, x: float, bottom: float, scale: float, schedule: str, group: str, cell: dict[str, Any]
) -> None:
    rate, speedup = cell["tokens_per_s"], cell["speedup_over_chunked"]
    height = rate * scale
    tip = f"{schedule}, {group}: {rate:.2f} tokens/s, {speedup:.2f}x {YARDSTICK}"
    drawing.rect(x + 1, bottom - height, BAR - 2, height, color_of(schedule), tip=tip)
    is_ours = schedule == "flowspec"
    y = bottom - height - 5
    if is_ours and cell["bound_tokens_per_s"]:
        bound_y = bottom - cell["bound_tokens_per_s"] * scale
        drawing.line(x - 1, bound_y, x + BAR + 1, bound_y, INK, width=1.5, dash="3 2")
        y = min(y, bound_y - 5)
    label = f"{rate:.2f}  {speedup:.2f}x" if is_ours or group == "mean" else f"{rate:.2f}"
    drawing.text(x + BAR / 2 + 4, y, label, size=10.5, turned=True, is_bold=is_ours)
