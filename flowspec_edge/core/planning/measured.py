"""Layer curves and hops as they are sent between nodes and kept. They are rounded, so that noise decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.placement import Hop
from flowspec_edge.errors import ProtocolError

DIGITS = 3
"""Significant digits that are kept of a time. With few of them equal boards look equal, and plans are found sooner."""
MAX_LAYER_NS = 10**12
"""A thousand seconds for one layer: no working board takes longer."""
MIN_TRANSFER_S = 0.002
"""A transfer that takes less than this beyond a round trip tells no rate, since timers and threads take as long."""


def curves_to_text(curves: Mapping[str, Line]) -> list[str]:
    """Curves as texts, one per precision: its name, the fixed nanoseconds per layer, and those per layer and row."""
    return [f"{name} {round(line.fixed * 1e6)} {round(line.per_row * 1e6)}" for name, line in curves.items()]


def curves_from_text(texts: Sequence[str], peer: str) -> dict[str, Line]:
    """Read the texts of :func:`curves_to_text`. Raises ProtocolError where a peer sent something else."""
    curves = {}
    for text in texts:
        name, *numbers = text.split(" ")
        if not name or len(numbers) != 2 or not all(number.isdecimal() and len(number) < 14 for number in numbers):
            raise ProtocolError(f"peer {peer}: a layer curve is {text!r:.80}, not a precision and two times")
        fixed_ns, row_ns = map(int, numbers)
        if not 0 < fixed_ns + row_ns <= MAX_LAYER_NS:
            raise ProtocolError(f"peer {peer}: a layer of {fixed_ns + row_ns} ns; at most {MAX_LAYER_NS} are possible")
        curves[name] = Line(rounded(fixed_ns / 1e6), rounded(row_ns / 1e6))
    return curves


def rounded(value: float) -> float:
    """``value`` rounded to DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def estimate_hop(round_trips_s: Sequence[float], transfers: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """The latency of one way in seconds, and the rate in bytes per second, which is 0 where it could not be measured.

    The shortest round trip of an empty probe counts, because longer ones waited for something other than the wire. A
    transfer is a number of bytes and the time until their end was confirmed; the largest one counts.
    """
    shortest_s = min(round_trips_s)
    num_bytes, took_s = max(transfers, default=(0, 0.0))
    on_the_wire_s = took_s - shortest_s
    rate = num_bytes / on_the_wire_s if on_the_wire_s > MIN_TRANSFER_S else 0.0
    return shortest_s / 2, rate


def hop_from(latency_ns: int, bytes_per_s: int) -> Hop:
    """The hop that a plan uses, from a latency and a rate as they were measured."""
    return Hop(rounded(latency_ns / 1e6), 1000 / rounded(bytes_per_s) if bytes_per_s else 0.0)
