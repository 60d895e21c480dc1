"""What ``flowspec top`` shows: at a terminal as tables that stay in place, elsewhere as lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowspec_edge.cli.layout import heat_and_power, table_lines
from flowspec_edge.errors import plain_text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from flowspec_edge.client import Health

BAR = 10
"""Characters of a bar of a whole share."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the server told at a time. By stage, the share of the time since the look before in which it was busy; and
    bytes per second on the origin's links.
    """

    at: float
    is_ready: bool
    told: Mapping[str, Any]
    busy: Mapping[str, float] = field(default_factory=dict)
    rows_per_s: Mapping[str, float] = field(default_factory=dict)
    bytes_per_s: float | None = None

    @classmethod
    def of(cls, health: Health, before: Snapshot | None = None) -> Snapshot:
        now, told = time.monotonic(), health.details
        if before is None or now <= before.at:
            return cls(now, health.is_ready, told)
        elapsed = now - before.at
        known = {stage["node"]: stage["work"] for stage in before.told.get("stages", ())}
        busy, rows = {}, {}
        for stage in told.get("stages", ()):
            work, earlier = stage["work"], known.get(stage["node"])
            if earlier is not None and work["busy_s"] >= earlier["busy_s"]:  # else the ring is another one
                busy[stage["node"]] = min((work["busy_s"] - earlier["busy_s"]) / elapsed, 1.0)
                rows[stage["node"]] = (work["num_rows"] - earlier["num_rows"]) / elapsed
        sums = [sum(found.get("link_bytes", {}).values()) for found in (before.told, told)]
        return cls(now, health.is_ready, told, busy, rows, max(sums[1] - sums[0], 0) / elapsed)

    @property
    def summary(self) -> str:
        told = self.told
        if "running" not in told:
            return "ready" if self.is_ready else "not ready"  # it wants a key for more
        texts = f"{told['running']} of {told['max_running']} texts written, {told['waiting']} waiting"
        rate = "" if self.bytes_per_s is None else f", {self.bytes_per_s / 1000:.0f} kB/s on the origin's links"
        kept = told.get("kept", {"num_sessions": 0})
        held = f", {kept['num_sessions']} kept in {kept['num_bytes'] / 2**20:.0f} MiB" if kept["num_sessions"] else ""
        return texts + held + rate

    @property
    def trouble(self) -> str:
        return plain_text(str(self.told.get("reason", "")))


STAGE_COLUMNS = ("STAGE", "LAYERS", "BUSY", "ROWS/S", "WAITED")
BOARD_COLUMNS = ("BOARD", "ADDRESS", "FREE", "HEAT", "STATE")


def stage_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """A row for each stage of the ring, in its order. WAITED is the mean that a chunk waited for the stage."""
    rows: list[tuple[str, ...]] = []
    for stage in snapshot.told.get("stages", ()):
        work, share = stage["work"], snapshot.busy.get(stage["node"])
        rate = snapshot.rows_per_s.get(stage["node"])
        waited = f"{1000 * work['waited_s'] / work['num_chunks']:.1f} ms" if work["num_chunks"] else "-"
        rows.append(
            (
                plain_text(str(stage["node"])),
                f"[{stage['start']}, {stage['stop']})",
                "-" if share is None else f"{bar(share)} {share:4.0%}",
                "-" if rate is None else f"{rate:.0f}",
                waited,
            )
        )
    return rows


def board_rows(snapshot: Snapshot) -> list[tuple[str, ...]]:
    """A row for each board that the server knows."""
    rows: list[tuple[str, ...]] = []
    for board in snapshot.told.get("boards", ()):
        free = board.get("free_memory_bytes")
        rows.append(
            (
                plain_text(str(board["node"])),
                plain_text(str(board["address"])),
                "-" if free is None else f"{free / 2**20:.0f} MiB",
                heat_and_power(board),
                plain_text(str(board["state"])),
            )
        )
    return rows


def bar(share: float) -> str:
    """A share as a bar of BAR characters."""
    return ("#" * round(share * BAR)).ljust(BAR, ".")


def print_plain(snapshot: Snapshot, url: str) -> None:
    """Lines whose columns are separated by two spaces."""
    print(f"{plain_text(str(snapshot.told.get('model', '')))} at {url}: {snapshot.summary}")
    if snapshot.trouble:
        print(snapshot.trouble)
    for columns, rows in ((STAGE_COLUMNS, stage_rows(snapshot)), (BOARD_COLUMNS, board_rows(snapshot))):
        if rows:
            print(*table_lines(columns, rows), sep="\n")


@contextlib.contextmanager
def screen() -> Iterator[Callable[[Snapshot, str], None]]:
    """A function that shows a snapshot in the place of the one before; the terminal is as it was afterwards."""
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(highlight=False), screen=True, auto_refresh=False) as live:
        yield lambda snapshot, url: live.update(_picture(snapshot, url), refresh=True)


def _picture(snapshot: Snapshot, url: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    model = plain_text(str(snapshot.told.get("model", "")))
    parts: list[RenderableType] = [
        Text.assemble((model, "bold"), f" at {url}"),
        Text(snapshot.summary, style="green" if snapshot.is_ready else "red"),
    ]
    if snapshot.trouble:
        parts.append(Text(snapshot.trouble, style="yellow"))
    if stages := stage_rows(snapshot):
        parts += [Text(), _table(STAGE_COLUMNS, stages)]
    if boards := board_rows(snapshot):
        parts += [Text(), _table(BOARD_COLUMNS, boards)]
    return Group(*parts)


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number < len(columns) - 1, overflow="ellipsis" if number == 0 else "fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
