"""What the commands show: the ring, a line per trip, and the figures with their formulas."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from flowspec_edge.core.events import ReportTrip

if TYPE_CHECKING:
    from flowspec_edge.origin.ring import RingStage

COLUMNS = ("trip", "rows back", "accepted", "pruned", "drafted", "in flight")


def ring_table(stages: Sequence[RingStage]) -> list[dict[str, Any]]:
    """The stages of a ring in order, as JSON objects.

    Each has its node, address, layer range ``[start, stop)``, loading time in milliseconds, and bytes fetched.
    """
    return [
        {
            "node": stage.plan.node,
            "address": stage.announcement.address,
            "start": stage.plan.start,
            "stop": stage.plan.stop,
            "load_ms": stage.load_ms,
            "fetched_bytes": stage.fetched_bytes,
            "arithmetic": stage.arithmetic,
        }
        for stage in stages
    ]


def print_ring(stages: Sequence[dict[str, Any]], drafts: str, file: TextIO | None = None) -> None:
    """Draw the ring: origin, where its ``drafts`` come from, each stage with its layers, and back."""
    print("  origin: tokenizer, draft tree, verify", file=file)
    print(f"    drafts: {drafts}", file=file)
    for stage in stages:
        layers = f"layers [{stage['start']}, {stage['stop']})"
        print(f"    -> {stage['node']}  {layers}  {stage['address']}  loaded in {stage['load_ms']} ms", file=file)
    print("    -> origin", file=file, flush=True)


def print_statistics(statistics: dict[str, Any], file: TextIO | None = None) -> None:
    """The figures of a finished generation, each with what it is."""
    sent, useful = statistics["rows_sent"], statistics["rows_useful"]
    share = f"{useful / sent:.0%}" if sent else "-"
    kind = statistics["hidden_rows"]
    lines = [
        f"{statistics['tokens_per_s']:.1f} tokens/s after the first token, which took "
        f"{statistics['first_token_s']:.2f} s",
        f"acceptance length {statistics['acceptance_length']:.2f} = {statistics['completion_tokens']} tokens / "
        f"{statistics['verifications']} verifications (of {statistics['trips']} trips)",
        f"rows sent {sent}, useful {useful} ({share} became text)",
        *(
            f"from token {change['at_token']} on layers [{change['start']}, {change['stop']}) were computed in "
            f"{change['after']}, before in {change['before']}: near ties may have turned"
            for change in statistics["arithmetic_changes"]
        ),
        *([f"hidden rows were rounded to {kind} at each hop"] if kind != "float32" else []),
        *_energy_lines(statistics),
    ]
    print("\n".join(lines), file=file, flush=True)


def _energy_lines(statistics: dict[str, Any]) -> list[str]:
    """What the boards took for the text, where there are any that tell."""
    if statistics.get("joules_per_token") is None:
        return []
    silent = statistics["unmetered_nodes"]
    without = f"; without {', '.join(silent)}, which cannot tell" if silent else ""
    nodes = ", ".join(statistics["metered_nodes"])
    joules, per_token = statistics["joules"], statistics["joules_per_token"]
    return [f"{joules:.3g} J, {per_token:.3g} J per token: all that {nodes} took meanwhile{without}"]


class TripDisplay:
    """A line per trip as it happens: how many rows came back, were accepted, pruned and drafted, and the new text."""

    def __init__(self, began: float) -> None:
        self.first_token_s = 0.0
        """Seconds from ``began`` (time.monotonic) to the first token."""
        self._began = began
        self._num_trips = 0
        self._text = ""
        self._is_colored = sys.stdout.isatty()
        print(" ".join(f"{column:>9}" for column in COLUMNS) + "  text", flush=True)

    @property
    def total_s(self) -> float:
        """Seconds from ``began`` until now."""
        return time.monotonic() - self._began

    def take_text(self, text: str) -> None:
        """Take the text of the trip that :meth:`show_trip` is told next."""
        if not self.first_token_s:
            self.first_token_s = self.total_s
        self._text += text

    def show_trip(self, trip: ReportTrip) -> None:
        self._num_trips += 1
        counts = (trip.num_returned, trip.num_accepted, trip.num_pruned, trip.num_drafted, trip.num_in_flight)
        self._print_line([str(self._num_trips), *(str(count) if count else "." for count in counts)])

    def finish(self) -> None:
        """Show text that was held back until the end."""
        if self._text:
            self._print_line([""] * len(COLUMNS))

    def _print_line(self, cells: list[str]) -> None:
        text, self._text = self._text.replace("\n", "\\n").replace("\t", "\\t"), ""
        if text and self._is_colored:
            text = f"\033[1m{text}\033[0m"
        print(" ".join(f"{cell:>9}" for cell in cells) + f"  {text}", flush=True)
