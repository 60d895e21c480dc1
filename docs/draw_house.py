"""Draws the house: each room a box with what it is for and its files, on its floor, and an arrow for what it imports.

::

    python -m docs.draw_house docs/house.svg
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from docs.house import ANNEX, ORDER, PACKAGE, House, direct_arrows
from flowspec_edge.bench.svg import FAINT, FONT, INK

WIDTH = 1240
LEFT, RIGHT = 40, 1200
TOP = 164
"""Pixels above the first row: title and roof."""
ROW_GAP, PAD, LINE = 38, 12, 17
ROLE_SIZE, FILE_SIZE, NAME_SIZE = 13.5, 12.5, 17.0
CHARACTER = 0.49
"""Mean width of a character in sizes of the font: boxes are filled by it, so it is rather too large."""
ARROW, WRONG = "#7b8794", "#c8553d"
"""Of an arrow, and of a line where a room imports from above."""
BLUE, GREEN, ORANGE, VIOLET, GREY, BROWN = "#5b8fc7", "#2a9d6f", "#e0a458", "#7b6fb0", "#9aa5b1", "#b08968"
PURE_GROUND, WALL = "#f1f8f5", "#cbd2d9"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a room stands: its row from the top, its left and right edge in pixels, and its colour."""

    row: int
    left: float
    right: float
    color: str


PLACES = {
    "__main__": Place(0, 40, 620, BLUE),
    "__init__": Place(0, 780, 1200, BLUE),
    "cli": Place(1, 40, 900, BLUE),
    "bench": Place(2, 40, 620, ORANGE),
    "web": Place(2, 660, 900, BLUE),
    "client": Place(2, 1040, 1200, BLUE),
    "origin": Place(3, 40, 740, GREEN),
    "node": Place(4, 40, 740, GREEN),
    "engine": Place(5, 40, 400, VIOLET),
    "weights": Place(5, 690, 920, VIOLET),
    "net": Place(5, 960, 1200, VIOLET),
    "core.planning": Place(6, 400, 650, GREEN),
    "core.speculation": Place(7, 60, 480, GREEN),
    "core.device": Place(7, 520, 700, GREEN),
    "core.weights": Place(7, 740, 920, GREEN),
    "core.cluster": Place(7, 960, 1150, GREEN),
    "core": Place(8, 60, 1180, GREEN),
    "bundle": Place(9, 40, 310, GREY),
    "manifest": Place(9, 337, 607, GREY),
    "files": Place(9, 633, 903, GREY),
    "config": Place(9, 930, 1200, GREY),
    "tasks": Place(10, 40, 310, GREY),
    "errors": Place(10, 337, 607, GREY),
    "version": Place(10, 633, 903, GREY),
    "allocator": Place(10, 930, 1200, GREY),
}
PURE_ROWS = (6, 8)
"""The rows of ``core/``, which stand on a ground of their own."""
GROUND = {"bundle", "manifest", "files", "config", "tasks", "errors", "version", "allocator"}
"""Modules for everyone. Arrows that end there are left out."""
LANES = {
    ("__init__", "origin"): 640.0,
    ("node", "engine"): 220.0,
    ("node", "core.planning"): 520.0,
    ("node", "core.device"): 676.0,
    ("node", "weights"): 715.0,
    ("node", "net"): 985.0,
    ("web", "net"): 1015.0,
    ("client", "net"): 1110.0,
    ("engine", "core.speculation"): 300.0,
    ("net", "core"): 1168.0,
    ("net", "core.cluster"): 1060.0,
    ("cli", "web"): 780.0,
}
"""Where an arrow goes down, in pixels, if not in the middle of what both rooms have above each other."""
CORNER = 10.0


@dataclass(slots=True)
class Picture:
    """SVG, shape by shape."""

    parts: list[str] = field(default_factory=list)

    def rect(
        self, left: float, top: float, right: float, bottom: float, fill: str, stroke: str = "none", round: float = 0
    ) -> None:
        self.parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" '
            f'rx="{round:.1f}" fill="{fill}" stroke="{stroke}"/>'
        )

    def path(self, data: str, stroke: str, fill: str = "none", width: float = 1.4, end: str = "") -> None:
        marker = f' marker-end="url(#{end})"' if end else ""
        self.parts.append(f'<path d="{data}" fill="{fill}" stroke="{stroke}" stroke-width="{width:.1f}"{marker}/>')

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        fill: str = INK,
        *,
        anchor: str = "start",
        is_bold: bool = False,
    ) -> None:
        """``y`` is the baseline."""
        weight = ' font-weight="bold"' if is_bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:.1f}" fill="{fill}" text-anchor="{anchor}"{weight}>'
            f"{escape(text)}</text>"
        )

    def to_text(self, height: float, title: str) -> str:
        """The whole file."""
        size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
        arrow = (
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0.8 L7,4 L0,7.2 z" fill="{ARROW}"/></marker></defs>'
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{escape(FONT)}">'
        ground = f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>'
        return "\n".join([head, f"<title>{escape(title)}</title>", arrow, ground, *self.parts, "</svg>\n"])


def draw_house(house: House) -> str:
    """The picture as SVG. Its layout is that of ``PLACES``, and its words and arrows are those of the sources."""
    rooms = [room for room in ORDER if room in house.rooms]
    role = {room: _wrapped(house.role_of(room), room, ROLE_SIZE) for room in rooms}
    files = {room: _wrapped(_files_of(house, room), room, FILE_SIZE) for room in rooms}
    heights: dict[str, float] = {room: 32 + LINE * (len(role[room]) + len(files[room])) + PAD for room in rooms}
    tops = _tops(heights)
    picture = Picture()
    _draw_walls(picture, house, tops, heights)
    inside = {(start, end) for start, end in house.arrows if not {start, end} & {*GROUND, ANNEX}}
    downwards = {(start, end) for start, end in inside if ORDER.index(start) < ORDER.index(end)}
    for start, end in sorted(direct_arrows(downwards)):
        picture.path(_way(start, end, tops, heights), ARROW, end="arrow")
    for start, end in sorted(inside - downwards):
        picture.path(_way(end, start, tops, heights), WRONG, width=2.5)
    for room in rooms:
        place, top = PLACES[room], tops[PLACES[room].row]
        bottom = top + heights[room]
        picture.rect(place.left, top, place.right, bottom, "#ffffff", WALL, 4)
        picture.rect(place.left, top, place.left + 5, bottom, place.color)
        picture.text(place.left + 18, top + 24, shown_name(room), NAME_SIZE, is_bold=True)
        for number, line in enumerate(role[room]):
            picture.text(place.left + 18, top + 45 + LINE * number, line, ROLE_SIZE)
        for number, line in enumerate(files[room], len(role[room])):
            picture.text(place.left + 18, top + 46 + LINE * number, line, FILE_SIZE, FAINT)
    bottom = max(tops[PLACES[room].row] + heights[room] for room in rooms)
    return picture.to_text(bottom + 44, "The house: rooms of flowspec_edge and what imports what")


def _draw_walls(picture: Picture, house: House, tops: dict[int, float], heights: dict[str, float]) -> None:
    """Roof, walls, the ground of the core, and the words above and below."""
    middle = WIDTH / 2
    bottom = max(tops[PLACES[room].row] + heights[room] for room in heights)
    picture.path(
        f"M{LEFT - 28},{TOP - 22} L{middle},24 L{RIGHT + 28},{TOP - 22} M{LEFT - 18},{TOP - 22} V{bottom + 22} "
        f"H{RIGHT + 18} V{TOP - 22} M{LEFT - 28},{TOP - 22} H{RIGHT + 28}",
        WALL,
        width=2.5,
    )
    num_rooms = len([room for room in house.rooms if room != ANNEX])
    num_arrows = len([pair for pair in house.arrows if ANNEX not in pair])
    counted = f"{num_rooms} rooms, {num_arrows} arrows between them"
    rule = "A room imports only from rooms below it. Drawn are the arrows that no way over others replaces."
    for y, words, size, fill in ((76, PACKAGE, 26, INK), (100, counted, 14, FAINT), (120, rule, 14, FAINT)):
        picture.text(middle, y, words, size, fill, anchor="middle")
    if (ground := tops.get(PURE_ROWS[1] + 1)) is not None:
        picture.text(LEFT, ground - 10, "The ground: modules that every room may import.", 13.5, FAINT)
    first, last = PURE_ROWS
    pure_bottom = max(tops[last] + height for room, height in heights.items() if PLACES[room].row == last)
    picture.rect(LEFT, tops[first] - 18, RIGHT, pure_bottom + 14, PURE_GROUND, "none", 6)
    picture.text(LEFT + 20, tops[first] + 6, "core/: pure", 13.5, GREEN, is_bold=True)
    for number, line in enumerate(
        ("Events and time come in,", "actions go out. No clock,", "no socket, no ONNX Runtime.")
    ):
        picture.text(LEFT + 20, tops[first] + 25 + 18 * number, line, 13.5, GREEN)


def _tops(heights: dict[str, float]) -> dict[int, float]:
    """The upper edge of each row."""
    tops, y = {}, float(TOP)
    for row in sorted({PLACES[room].row for room in heights}):
        tops[row] = y
        gap = ROW_GAP + (14 if row in (PURE_ROWS[0] - 1, PURE_ROWS[1]) else 0)
        y += max(height for room, height in heights.items() if PLACES[room].row == row) + gap
    return tops


def _way(start: str, end: str, tops: dict[int, float], heights: dict[str, float]) -> str:
    """Straight down from one room to another, or around a corner where neither is above the other."""
    above, below = PLACES[start], PLACES[end]
    left, right = max(above.left, below.left), min(above.right, below.right)
    x = LANES.get((start, end), (left + right) / 2)
    bottom, top = tops[above.row] + heights[start], tops[below.row] - 1
    if left < right:
        return f"M{x:.1f},{bottom:.1f} V{top:.1f}"
    side, turn = (above.right, CORNER) if x > above.right else (above.left, -CORNER)
    y = bottom - heights[start] / 2
    return f"M{side:.1f},{y:.1f} H{x - turn:.1f} Q{x:.1f},{y:.1f} {x:.1f},{y + CORNER:.1f} V{top:.1f}"


def shown_name(room: str) -> str:
    """As one would look for it in the sources."""
    return f"{room.replace('.', '/')}/" if room not in GROUND | {"__main__", "__init__", "client"} else f"{room}.py"


def _files_of(house: House, room: str) -> str:
    """Names of its files, and of folders in it with a slash; nothing where it is one file itself."""
    names: dict[str, None] = {}
    prefix = f"flowspec_edge.{room}."
    for module in house.rooms[room]:
        if module.startswith(prefix):
            name, _, deeper = module.removeprefix(prefix).partition(".")
            names[f"{name}/" if deeper or f"{prefix}{name}." in "".join(house.rooms[room]) else name] = None
    return "  ".join(names)


def _wrapped(text: str, room: str, size: float) -> list[str]:
    place = PLACES[room]
    return textwrap.wrap(text, int((place.right - place.left - 30) / (size * CHARACTER)), break_long_words=False)


def main(arguments: Sequence[str]) -> None:
    """Write the picture to the file that is named."""
    (out,) = arguments
    Path(out).write_text(draw_house(House.read()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
