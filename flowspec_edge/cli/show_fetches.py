"""How far weights are on their way, on standard error: a bar per stage on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from flowspec_edge.core.planning.placement import StagePlan
    from flowspec_edge.weights.supply import FetchProgress

BAR_CELLS = 24
REWRITE_S = 0.1
PLAIN_EVERY_S = 10.0
"""How often to print a line where lines cannot be rewritten: a log should not fill with them."""


@dataclass(slots=True)
class _Bar:
    num_bytes: int
    total_bytes: int
    began: float
    shown_at: float = float("-inf")

    @property
    def is_done(self) -> bool:
        return self.num_bytes >= self.total_bytes

    def describe(self, now: float) -> str:
        share = min(self.num_bytes / self.total_bytes, 1.0) if self.total_bytes else 1.0
        passed = max(now - self.began, 1e-3)
        cells = int(share * BAR_CELLS)
        state = f"{passed:.1f} s"
        if not self.is_done and self.num_bytes:
            state = f"about {passed / share - passed:.0f} s left"
        return (
            f"[{'#' * cells}{'.' * (BAR_CELLS - cells)}] {share:4.0%}  {self.num_bytes / 1e6:.1f} of "
            f"{self.total_bytes / 1e6:.1f} MB  {self.num_bytes / passed / 1e6:.1f} MB/s  {state}"
        )


class FetchDisplay:
    """Bars by name, in the order in which they began. Shows nothing as long as nothing is fetched."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._is_rewritten = self._file.isatty()
        self._bars: dict[str, _Bar] = {}
        self._num_lines = 0
        self._drawn_at = float("-inf")

    def show(self, name: str, num_bytes: int, total_bytes: int) -> None:
        """Show that ``num_bytes`` of ``total_bytes`` have come for a stage; a new total begins a new bar."""
        now = time.monotonic()
        bar = self._bars.get(name)
        if bar is None or bar.total_bytes != total_bytes or num_bytes < bar.num_bytes:
            if all(bar.is_done for bar in self._bars.values()):
                self._bars.clear()
                self._num_lines = 0
            bar = self._bars[name] = _Bar(num_bytes, total_bytes, now)
        bar.num_bytes = num_bytes
        if self._is_rewritten:
            self._redraw(now, is_forced=bar.is_done)
        elif bar.is_done or now - bar.shown_at >= PLAIN_EVERY_S:
            bar.shown_at = now
            print(f"fetching {name}: {bar.describe(now)}", file=self._file, flush=True)

    def show_own(self, progress: FetchProgress) -> None:
        """Show what this node fetches; made for ``Node.on_fetch``."""
        self.show(progress.name, progress.num_bytes, progress.total_bytes)

    def show_stage(self, plan: StagePlan, num_bytes: int, total_bytes: int) -> None:
        """Show what a node of a ring fetches; made for ``open_ring``."""
        self.show(f"{plan.node} layers [{plan.start}, {plan.stop})", num_bytes, total_bytes)

    def _redraw(self, now: float, *, is_forced: bool) -> None:
        if not is_forced and now - self._drawn_at < REWRITE_S:
            return
        self._drawn_at = now
        up = f"\033[{self._num_lines}A" if self._num_lines else ""
        width = max(len(name) for name in self._bars)
        lines = [f"\r\033[Kfetching {name:{width}}  {bar.describe(now)}\n" for name, bar in self._bars.items()]
        self._num_lines = len(lines)
        print(up + "".join(lines), end="", file=self._file, flush=True)
