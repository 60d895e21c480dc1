"""How many rows of a prompt leave together: so many that the last of them is through the ring as soon as can be.

Each stage takes the chunks one after the other, and so does each wire. Where all chunks have ``n`` rows, the last one
comes back after a trip of its own, and waits for all others at the part that takes the longest for ``n`` rows. Few
large chunks pay the fixed time of a stage seldom; many small ones keep all stages busy and make the last trip short.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from flowspec_edge.core.line import NOTHING, Line


@dataclass(frozen=True, slots=True)
class RingTimes:
    """What a chunk takes on its way around a ring, in seconds by its rows.

    ``hops`` are those that carry hidden rows, one behind each stage. What a hop takes per row is the time for which its
    wire is busy with it; the fixed part is latency, in which the wire is free.
    """

    stages: tuple[Line, ...]
    hops: tuple[Line, ...]


@functools.lru_cache(maxsize=8)
def best_chunk_rows(times: RingTimes, num_rows: int, most: int) -> int:
    """The size of chunks, ``most`` rows or fewer, in which a prompt of ``num_rows`` is through the ring the soonest.

    It is asked for at each event while a prompt leaves, and takes up to 0.2 ms.
    """
    trip = sum((*times.stages, *times.hops), NOTHING)
    parts = {*times.stages, *(Line(0.0, hop.per_row) for hop in times.hops)}
    best, least_s = 1, math.inf
    size = min(num_rows, most)
    while size:
        num_chunks = math.ceil(num_rows / size)
        size = math.ceil(num_rows / num_chunks)  # no chunk is larger than so many need to be
        taken_s = trip.at(size) + (num_chunks - 1) * max([part.at(size) for part in parts])
        if taken_s < least_s:
            best, least_s = size, taken_s
        size -= 1
    return best
