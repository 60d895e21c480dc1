"""What ``flowspec demo --boards`` shows: two texts beside each other on a terminal, one after the other elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flowspec_edge.config import Piece
from flowspec_edge.errors import plain_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

HEAD_LINES = 6
"""Lines of a terminal that the columns leave free, for what stands above them and for the cursor."""


@dataclass(slots=True)
class Writing:
    """A text while it is written with one schedule. ``late`` is how much longer its boards took than is described of
    them, as a share.
    """

    title: str
    schedule: str
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    late: float = 0.0
    _num_first: int = 0
    _first_at: float = 0.0
    _last_at: float = 0.0

    def add(self, piece: Piece) -> None:
        """Take in what came just now."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.statistics = piece.statistics or self.statistics
        if piece.token_ids:
            self._last_at = time.monotonic()
            if not self._num_first:
                self._num_first, self._first_at = len(self.token_ids), self._last_at

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first piece by the seconds for them, 0 before there are any; the prompt is left out."""
        if self.statistics:
            return float(self.statistics["tokens_per_s"])
        elapsed = self._last_at - self._first_at
        return (len(self.token_ids) - self._num_first) / elapsed if elapsed > 0 else 0.0

    def to_report(self) -> dict[str, Any]:
        """What JSON tells of it."""
        return {
            "schedule": self.schedule,
            "text": self.text,
            "token_ids": self.token_ids,
            "late": round(self.late, 4),
            **self.statistics,
        }


class WritingDisplay:
    """Shows nothing, as with ``--json``."""

    def __init__(self, title: str, prompt: str, writings: Sequence[Writing]) -> None:
        self._title, self._prompt, self._writings = title, prompt, writings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def say(self, line: str) -> None:
        """Show a line of its own."""

    def show(self, writing: Writing) -> None:
        """Show that something came for this text."""

    def conclude(self, *, is_identical: bool, late_limit: float) -> None:
        """Say what came of it."""


class PlainDisplay(WritingDisplay):
    """One text after the other, each as it comes."""

    def __init__(self, title: str, prompt: str, writings: Sequence[Writing]) -> None:
        super().__init__(title, prompt, writings)
        self._shown: dict[str, int] = {}

    def __enter__(self) -> Self:
        print(f"{self._title}\n\nprompt:\n{self._prompt}", flush=True)
        return self

    def say(self, line: str) -> None:
        print(line, flush=True)

    def show(self, writing: Writing) -> None:
        if writing.title not in self._shown:
            print(f"\n{writing.title} ({writing.schedule}):", flush=True)
        shown = self._shown.get(writing.title, 0)
        print(plain_text(writing.text[shown:], keeps_breaks=True), end="", flush=True)
        self._shown[writing.title] = len(writing.text)
        if writing.statistics:
            print(f"\n{writing.tokens_per_s:.1f} tokens/s", flush=True)

    def conclude(self, *, is_identical: bool, late_limit: float) -> None:
        print("\n" + "\n".join(conclusions(self._writings, is_identical=is_identical, late_limit=late_limit)))


class ColumnsDisplay(PlainDisplay):
    """Two columns that grow in real time; of what is higher than the terminal the end is seen until all is written."""

    def __init__(self, title: str, prompt: str, writings: Sequence[Writing], console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(title, prompt, writings)
        self._console = console or Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What was written stays."""
        self._live.stop()
        self._console.print(self._picture(None))

    def show(self, writing: Writing) -> None:
        self._live.update(self._picture(max(self._console.height - HEAD_LINES, 1)), refresh=True)

    def _picture(self, max_lines: int | None) -> RenderableType:
        """Both texts with their tokens/s; of each the last ``max_lines``."""
        from rich.table import Table
        from rich.text import Text

        width = (self._console.width - 2) // 2
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in self._writings:
            grid.add_column(width=width, overflow="fold")
        grid.add_row(*(Text(f"{writing.title} ({writing.schedule})", style="bold") for writing in self._writings))
        grid.add_row(*(Text(self._rate(writing), style="green") for writing in self._writings))
        grid.add_row(*(self._end_of(writing, width, max_lines) for writing in self._writings))
        return grid

    def _end_of(self, writing: Writing, width: int, max_lines: int | None) -> Text:
        from rich.text import Text

        text = Text(plain_text(writing.text, keeps_breaks=True).expandtabs(4))
        if max_lines is None:
            return text
        return Text("\n").join(text.wrap(self._console, width, overflow="fold")[-max_lines:])

    def _rate(self, writing: Writing) -> str:
        first = self._writings[0]
        if not writing.token_ids:
            return "its turn comes" if writing is not first and not first.statistics else "reads the prompt"
        rate = f"{writing.tokens_per_s:.1f} tokens/s"
        is_compared = writing is not first and first.tokens_per_s and writing.tokens_per_s
        return f"{rate}, {writing.tokens_per_s / first.tokens_per_s:.1f} times as many" if is_compared else rate


def display_of(title: str, prompt: str, writings: Sequence[Writing], *, is_quiet: bool) -> WritingDisplay:
    """The display that suits standard output."""
    if is_quiet:
        return WritingDisplay(title, prompt, writings)
    return (ColumnsDisplay if sys.stdout.isatty() else PlainDisplay)(title, prompt, writings)


def conclusions(writings: Sequence[Writing], *, is_identical: bool, late_limit: float) -> list[str]:
    """What came of both texts, a sentence per line."""
    without, with_drafts = writings
    lines = [
        f"With drafts {with_drafts.tokens_per_s:.1f} tokens/s, without {without.tokens_per_s:.1f}"
        + (f": {with_drafts.tokens_per_s / without.tokens_per_s:.1f} times as many" if without.tokens_per_s else ""),
        "Both texts are the unsplit model's: " + ("yes, token for token" if is_identical else "NO"),
        "What boards and network take is described; texts and drafts are this bundle's.",
    ]
    late = max(writing.late for writing in writings)
    if late > late_limit:
        lines.append(
            f"This machine was {late:.0%} behind its boards, for it is too slow or was busy: both rates are too low."
        )
    return lines
