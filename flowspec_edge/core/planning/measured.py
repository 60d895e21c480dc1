"""What was measured, as it is sent and kept: layer curves and hops, rounded so that noise decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowspec_edge.core.planning.placement import Hop, TimeLine
from flowspec_edge.errors import ProtocolError

DIGITS = 3
"""Significant digits that a measurement of time is good for; equal boards look equal, and plans are found sooner."""
MAX_LAYER_NS = 10**12
"""A thousand seconds for one layer: no board that works."""
MIN_TRANSFER_S = 0.002
"""A transfer that takes less beyond the round trip says nothing of the rate: timers and threads take as long."""


def curves_to_text(curves: Mapping[str, TimeLine]) -> list[str]:
    """One text per precision: its name, and nanoseconds per layer, fixed and per row."""
    return [f"{name} {round(line.fixed_ms * 1e6)} {round(line.row_ms * 1e6)}" for name, line in curves.items()]


def curves_from_text(texts: Sequence[str], peer: str) -> dict[str, TimeLine]:
    """Raises ProtocolError where a peer sent something else."""
    curves = {}
    for text in texts:
        name, *numbers = text.split(" ")
        if not name or len(numbers) != 2 or not all(number.isdecimal() and len(number) < 14 for number in numbers):
            raise ProtocolError(f"peer {peer}: a layer curve is {text!r:.80}, not a precision and two times")
        fixed_ns, row_ns = map(int, numbers)
        if not 0 < fixed_ns + row_ns <= MAX_LAYER_NS:
            raise ProtocolError(f"peer {peer}: a layer of {fixed_ns + row_ns} ns; at most {MAX_LAYER_NS} are possible")
        curves[name] = TimeLine(rounded(fixed_ns / 1e6), rounded(row_ns / 1e6))
    return curves


def rounded(value: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def estimate_hop(round_trips_s: Sequence[float], transfers: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """One way's latency in seconds, and bytes per second (0: not measurable), from times of empty probes and of bytes.

    The shortest round trip counts: what waited for something else says nothing of the wire. Of transfers, each a number of
    bytes and the time until their end was confirmed, the largest one counts.
    """
    shortest_s = min(round_trips_s)
    num_bytes, took_s = max(transfers, default=(0, 0.0))
    on_the_wire_s = took_s - shortest_s
    rate = num_bytes / on_the_wire_s if on_the_wire_s > MIN_TRANSFER_S else 0.0
    return shortest_s / 2, rate


def hop_from(latency_ns: int, bytes_per_s: int) -> Hop:
    """As a plan uses it."""
    return Hop(rounded(latency_ns / 1e6), 1000 / rounded(bytes_per_s) if bytes_per_s else 0.0)
