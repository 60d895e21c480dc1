"""Draws the loss curves of a run as one SVG: the smoothed loss of the training text, and that of the held-out text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 460, 320, 48  # pixels of one panel
SMOOTHED = 20  # steps that a point of the training curve averages
TRAINED, HELD_OUT, INK, GRID = "#9db4c0", "#c44536", "#1f2933", "#e4e7eb"
NUM_LINES = 5

Points = Sequence[tuple[float, float]]


def draw_curves(directory: Path) -> str:
    """The curves of all parts of the run in ``directory`` that have begun, side by side."""
    found = [(part, directory / f"{part}-curve.json") for part in ("target", "head")]
    panels = [(part, json.loads(path.read_text())) for part, path in found if path.exists()]
    width = WIDTH * max(1, len(panels))
    size = f'width="{width}" height="{HEIGHT}"'
    font = 'font-family="Helvetica, Arial, sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    body = [
        f'<g transform="translate({i * WIDTH} 0)">{panel(part, curve)}</g>' for i, (part, curve) in enumerate(panels)
    ]
    ground = f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, "<title>Loss while training the demo model</title>", ground, *body, "</svg>\n"])


def panel(part: str, curve: list[dict[str, float]]) -> str:
    losses = [point["loss"] for point in curve]
    trained = [
        (point["cpu_s"] / 3600, sum(losses[max(0, i - SMOOTHED + 1) : i + 1]) / min(i + 1, SMOOTHED))
        for i, point in enumerate(curve)
    ]
    held_out = [(point["cpu_s"] / 3600, point["held_out"]) for point in curve if "held_out" in point]
    low = min(y for _, y in trained + held_out)
    high = max(y for _, y in trained + held_out)
    span, end = max(high - low, 1e-6), max(x for x, _ in trained) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + x / end * (WIDTH - MARGIN - 16), HEIGHT - 40 - (y - low) / span * (HEIGHT - 90)

    parts = [text(MARGIN, 22, f"{part}: nats per token over CPU hours", weight="bold")]
    for i in range(NUM_LINES):
        y = low + span * i / (NUM_LINES - 1)
        height = place(0, y)[1]
        parts.append(f'<path d="M{MARGIN} {height:.1f}H{WIDTH - 16}" stroke="{GRID}"/>')
        parts.append(text(MARGIN - 6, height + 4, f"{y:.2f}", anchor="end"))
        parts.append(
            text(
                place(end * i / (NUM_LINES - 1), low)[0],
                HEIGHT - 20,
                f"{end * i / (NUM_LINES - 1):.2f}",
                anchor="middle",
            )
        )
    parts += [path([place(*p) for p in trained], TRAINED), path([place(*p) for p in held_out], HELD_OUT)]
    parts += [text(WIDTH - 150, 40, "training text", TRAINED), text(WIDTH - 60, 40, "held out", HELD_OUT)]
    return "".join(parts)


def path(points: Points, stroke: str) -> str:
    places = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{places}" fill="none" stroke="{stroke}" stroke-width="2"/>'


def text(x: float, y: float, words: str, fill: str = INK, *, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">{words}</text>'
