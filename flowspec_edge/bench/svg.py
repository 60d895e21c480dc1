"""Draws the few SVG shapes that the charts need, in pixels on a white ground."""

from __future__ import annotations

from typing import Literal
from xml.sax.saxutils import escape, quoteattr

INK, FAINT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
Anchor = Literal["start", "middle", "end"]


class Drawing:
    """A drawing. Later shapes lie on earlier ones."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height = width, height
        self._title = title
        self._parts: list[str] = []
        self.rect(0, 0, width, height, "#ffffff")

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none", tip: str = ""
    ) -> None:
        """Draw a rectangle. Viewers show ``tip`` while the mouse rests on it."""
        inside = f"<title>{escape(tip)}</title>" if tip else ""
        self._add("rect", inside, x=x, y=y, width=max(width, 0), height=max(height, 0), fill=fill, stroke=stroke)

    def line(
        self, x1: float, y1: float, x2: float, y2: float, stroke: str = GRID, *, width: float = 1, dash: str = "none"
    ) -> None:
        self._add("line", "", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, stroke_width=width, stroke_dasharray=dash)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 12,
        fill: str = INK,
        anchor: Anchor = "start",
        is_bold: bool = False,
        turned: bool = False,
    ) -> None:
        """Write a text whose baseline is at ``y``. Text that is ``turned`` reads upwards from there."""
        turn = {"transform": f"rotate(-90 {x:.2f} {y:.2f})"} if turned else {}
        weight = "bold" if is_bold else "normal"
        self._add(
            "text", escape(text), x=x, y=y, font_size=size, fill=fill, text_anchor=anchor, font_weight=weight, **turn
        )

    def to_text(self) -> str:
        """The text of the whole file."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}" viewBox="0 0 {self.width:.0f} {self.height:.0f}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family={quoteattr(FONT)}>'
        return "\n".join([head, f"<title>{escape(self._title)}</title>", *self._parts, "</svg>\n"])

    def _add(self, name: str, inside: str, **attributes: str | float) -> None:
        written = " ".join(
            f"{key.replace('_', '-')}={quoteattr(value if isinstance(value, str) else f'{value:.2f}')}"
            for key, value in attributes.items()
        )
        self._parts.append(f"<{name} {written}>{inside}</{name}>")


def nice_step(span: float, num_steps: int) -> float:
    """A step of 1, 2 or 5 times a power of ten that divides ``span`` into at most ``num_steps``."""
    step = 10.0**-6
    while True:
        for factor in (1, 2, 5):
            if span / (step * factor) <= num_steps:
                return step * factor
        step *= 10
