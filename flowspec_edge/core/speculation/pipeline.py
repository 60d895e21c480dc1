"""What the origin knows of its ring: measured costs, and from them when each stage will be free.

Every chunk that comes back tells how long each stage let it wait and ran it. From these follow a line per stage,
``a + b n`` seconds for ``n`` rows, and one for the hops. With them the origin follows the chunks under way, and
finds the latest moment at which the next one may leave without a bubble at the stage that paces the ring: a chunk that
leaves earlier only waits in a queue, with rows chosen when less was known. Chunks of all sessions count for that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flowspec_edge.core.limits import MAX_PREFILL_ROWS, PREFILL_ROWS
from flowspec_edge.core.line import NOTHING, LineFit
from flowspec_edge.core.speculation.prefill import RingTimes, best_chunk_rows

if TYPE_CHECKING:  # The command line names the schedules, which know this module, and loads no NumPy for --help.
    from flowspec_edge.core.rows import Passage

LEAD_S = 0.002
"""A chunk leaves this much before its time: timers are late, and choosing it takes a moment as well."""
PIECE_CHUNKS = 1.6
"""Where a text is written beside it, a piece of a prompt takes at most as long as so many chunks of one row, or a text
would wait for it at each stage. Larger pieces are read in less time, but where rows cost much, texts fall behind."""
READING = 0.25
"""How much a row delays a session that reads its prompt, where one that writes counts 1: of the former the first token
comes later, of the latter each. Where rows cost much a text beside a prompt has a tenth less with 0.5, and a fifth less
with 1. Where they do not it makes no difference, and all count 1."""
COSTLY_ROW = 0.1
"""A row costs much where it takes more than this share of the time of a chunk of one row."""
SLOWING = 1.02
"""By this factor the remembered time of the quickest single-row trip grows at each slower one: boards get hot."""


@dataclass(slots=True, eq=False)
class Flight:
    """A chunk that has not come back: its living rows, and when each stage is expected to start and end it.

    Of a prompt's rows those that nobody wants do not come back: they end at the last stage.
    """

    living: set[int]
    sent_at: float
    turn: int = 0
    comes_back: bool = True
    starts: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)


class RingCosts:
    """What the stages, hops and the origin's own computations of one ring take, as measured.

    ``expected`` is what is known of the ring before anything has come back. A prompt's chunks are sized by it, and it
    tells how much of the time of a chunk grows with its rows until chunks of several sizes have come back.
    ``num_blocks`` has the blocks of each stage, behind each of which a forward may be given up; one where not known.
    """

    def __init__(
        self, num_stages: int, expected: RingTimes | None = None, num_blocks: Sequence[int] | None = None
    ) -> None:
        self._expected = expected
        self._num_blocks = num_blocks or (1,) * num_stages
        stages = expected.stages if expected is not None else (NOTHING,) * num_stages
        hops = sum(expected.hops, NOTHING) if expected is not None else NOTHING
        self.stages = [LineFit(stage) for stage in stages]
        self.hops = LineFit(hops)  # all hops of a trip together, over the mean number of rows per hop
        self.head = LineFit()
        self.draft = LineFit()
        self.seconds_per_row = 0.0
        """What one more row adds to the trip of its chunk."""
        self.row_s = 0.0
        """How much longer the slowest stage is busy for one more row."""
        self.single_row_s = 0.0
        """How long the slowest stage is busy with a chunk of one row."""
        self._plain_trip_s = 0.0  # of a single row
        self._single_trip_s = 0.0  # a chunk of one row, when no drafts kept it waiting; 0 where none was seen

    @property
    def is_measured(self) -> bool:
        """Whether a chunk has come back yet."""
        return self.hops.has_samples

    @property
    def plain_token_s(self) -> float:
        """A token's time without speculation: a single row's trip, and the head."""
        return self._plain_trip_s + self.head.line.at(1)

    def interval_s(self, num_rows: float) -> float:
        """How long the slowest stage is busy with a chunk of ``num_rows``."""
        return max([stage.line.at(num_rows) for stage in self.stages])

    def rows_within(self, limit_s: float, most: int) -> int:
        """How many rows the slowest stage takes within that time; 1 to ``most``."""
        return max(min([stage.line.rows_within(limit_s, most) for stage in self.stages]), 1)

    def prompt_chunk_rows(self, num_rows: int) -> int:
        """How many rows of a prompt of ``num_rows`` leave together, so that all are through as soon as can be.

        Where chunks of several sizes have come back, the stages are known better than they were before. The wires are
        not: chunks that wait for theirs count as longer on the way.
        """
        times, num_stages = self._expected, len(self.stages)
        if all(stage.knows_slope for stage in self.stages):
            hops = times.hops if times is not None else (self.hops.line.scaled(1 / num_stages),) * num_stages
            times = RingTimes(tuple(stage.line for stage in self.stages), hops)
        return PREFILL_ROWS if times is None else best_chunk_rows(times, num_rows, MAX_PREFILL_ROWS)

    def hop_s(self, num_rows: float) -> float:
        """The time of one hop with ``num_rows`` hidden rows. The first hop of a trip carries none."""
        return self.hops.line.fixed / (len(self.stages) + 1) + self.hops.line.per_row * num_rows / len(self.stages)

    def given_up_at(self, stage: int, start: float, end: float, told_at: float) -> float:
        """When a forward ends that began at ``start``, would last until ``end``, and is given up at ``told_at``: with
        the block that runs then.
        """
        if end <= told_at:
            return end
        block_s = (end - start) / self._num_blocks[stage]
        return start + math.ceil((told_at - start) / block_s) * block_s

    def add_trip(self, trip_s: float, passages: Sequence[Passage], *, is_alone: bool = True) -> None:
        """Learn from a chunk that came back ``trip_s`` after it was sent.

        Where it ``is_alone``, no other session shared the ring: it waited only for what this one had sent ahead.
        """
        if len(passages) != len(self.stages):
            return
        if passages[0].num_rows == 1:
            quick_s = trip_s - (sum(passage.waited_s for passage in passages) if is_alone else 0.0)
            slowed_s = self._single_trip_s * SLOWING or quick_s
            self._single_trip_s = min(quick_s, slowed_s)
        for stage, passage in zip(self.stages, passages, strict=True):
            stage.add(passage.num_rows, passage.ran_s)
        on_the_way = trip_s - sum(passage.waited_s + passage.ran_s for passage in passages)
        self.hops.add(sum(passage.num_rows for passage in passages) / len(passages), max(on_the_way, 0.0))
        self.seconds_per_row = sum(stage.line.per_row for stage in self.stages) + self.hops.line.per_row
        self.single_row_s = self.interval_s(1)
        self.row_s = self.interval_s(2) - self.single_row_s
        stages_s = sum(stage.line.at(1) for stage in self.stages)
        self._plain_trip_s = self._single_trip_s or stages_s + self.hops.line.at(1)


class Traffic:
    """The chunks of all sessions of one ring under way, and when each stage will be done with them."""

    def __init__(self, costs: RingCosts) -> None:
        self.costs = costs
        self.flights: list[Flight] = []
        """In the order in which they left."""
        self.num_sessions = 0
        self.num_writing = 0
        """Of the sessions: those whose prompt has left."""
        self._free_at = [0.0] * len(costs.stages)
        self._given_up_until = [0.0] * len(costs.stages)  # when stages end what they gave up

    def send(self, flight: Flight) -> None:
        self._forget_passed(flight.sent_at)
        self.flights.append(flight)
        self._follow(flight)

    def follow_living(self, now: float) -> None:
        """Rows died. Chunks get shorter where they have not started, and those without a living row end."""
        self._forget_passed(now)
        hop_s = self.costs.hop_s(0)
        for flight in self.flights:
            if not flight.living:
                for stage, (start, end) in enumerate(zip(flight.starts, flight.ends, strict=True)):
                    if start <= now:
                        ended_at = self.costs.given_up_at(stage, start, end, now + hop_s)
                        self._given_up_until[stage] = max(self._given_up_until[stage], ended_at)
        self._free_at = list(self._given_up_until)
        self.flights = [flight for flight in self.flights if flight.living]
        for flight in self.flights:
            self._follow(flight, now)

    @property
    def slot_at(self) -> float:
        """When the next chunk should leave, whichever session's: of the usual size, and in time to be ready."""
        return self.send_at(self.usual_rows) - LEAD_S

    @property
    def usual_rows(self) -> float:
        """How many rows a chunk has on average."""
        return self.costs.stages[0].mean_size

    def send_at(self, num_rows: float) -> float:
        """The latest time at which a chunk may leave the origin without a bubble at the stage that paces the ring."""
        costs = self.costs
        if not costs.is_measured:
            return 0.0
        away, hop_s = costs.hop_s(0), costs.hop_s(num_rows)
        latest = self._free_at[0] - away
        for stage, free_at in zip(costs.stages, self._free_at[1:], strict=False):
            away += stage.line.at(num_rows) + hop_s
            latest = max(latest, free_at - away)
        return latest

    def blocked_s(self, num_rows: float, leaves_at: float, known_at: float) -> float:
        """For how long a chunk keeps the next one from the first stage, if at ``known_at`` all of it proves dead."""
        told_at = known_at + self.costs.hop_s(0)
        start = max(leaves_at + self.costs.hop_s(0), self._free_at[0])
        end = start + self.costs.stages[0].line.at(num_rows)
        return max(self.costs.given_up_at(0, start, end, told_at) - told_at, 0.0) if start < told_at else 0.0

    def _forget_passed(self, now: float) -> None:
        """Forget what has ended and does not come back."""
        self.flights = [flight for flight in self.flights if flight.comes_back or flight.ends[-1] > now]

    def _follow(self, flight: Flight, now: float = -1.0) -> None:
        """Foretell when each stage starts and ends the flight, except where it has started by ``now``."""
        num_rows = len(flight.living)
        hop_s = self.costs.hop_s(num_rows)
        arrives = flight.sent_at + self.costs.hop_s(0)
        starts, ends = [], []
        for number, stage in enumerate(self.costs.stages):
            if number < len(flight.starts) and flight.starts[number] <= now:
                start, end = flight.starts[number], flight.ends[number]
            else:
                start = max(arrives, self._free_at[number])
                end = start + stage.line.at(num_rows)
            starts.append(start)
            ends.append(end)
            self._free_at[number] = end
            arrives = end + hop_s
        flight.starts, flight.ends = starts, ends


class Pipeline:
    """The chunks of one session under way, among those of all sessions. It counts as one of them until it leaves."""

    def __init__(self, traffic: Traffic) -> None:
        self.costs = traffic.costs
        self.flights: list[Flight] = []
        self._traffic = traffic
        self._is_writing = False
        traffic.num_sessions += 1

    def begin_writing(self) -> None:
        """All of the prompt has left."""
        self._is_writing = True
        self._traffic.num_writing += 1

    @property
    def num_others(self) -> int:
        """How many other sessions share the ring."""
        return self._traffic.num_sessions - 1

    @property
    def num_costly_readers(self) -> int:
        """How many of them read their prompts, where rows cost much; 0 where they do not."""
        num_reading = self.num_others - (self._traffic.num_writing - self._is_writing)
        is_costly = num_reading > 0 and self.costs.row_s > COSTLY_ROW * self.costs.single_row_s
        return num_reading if is_costly else 0

    @property
    def num_delayed(self) -> float:
        """How many other sessions a row delays."""
        return self.num_others - (1 - READING) * self.num_costly_readers

    @property
    def plain_token_s(self) -> float:
        """A token's time if no session speculated: that of a single row alone, and where sessions crowd the ring as
        long as its slowest part takes for a row of each, or for a piece of its prompt.
        """
        traffic = self._traffic
        num_rows = traffic.num_writing + PIECE_CHUNKS * (traffic.num_sessions - traffic.num_writing)
        return max(self.costs.plain_token_s, num_rows * max(self.costs.single_row_s, self.costs.head.line.at(1)))

    def prompt_chunk_rows(self, num_rows: int) -> int:
        """How many rows of a prompt of ``num_rows`` leave together: fewer where other sessions write meanwhile."""
        best = self.costs.prompt_chunk_rows(num_rows)
        if not self._traffic.num_writing - self._is_writing:
            return best
        if not self.costs.is_measured:
            return min(best, PREFILL_ROWS)
        return min(best, self.costs.rows_within(PIECE_CHUNKS * self.costs.single_row_s, PREFILL_ROWS))

    def take_returned(self, ids: set[int], passages: Sequence[Passage], now: float) -> None:
        """A chunk came back: forget its flight and learn from it, unless all of its rows died on the way."""
        for flight in self.flights:
            if not ids.isdisjoint(flight.living):
                self.flights.remove(flight)
                self._traffic.flights.remove(flight)
                self.costs.add_trip(now - flight.sent_at, passages, is_alone=not self.num_others)
                return

    def send(self, flight: Flight) -> None:
        if flight.comes_back:
            self.flights.append(flight)
        self._traffic.send(flight)

    def prune(self, gone: set[int], now: float) -> None:
        """Rows of the session died, and chunks without a living row with them."""
        if not gone:
            return
        for flight in self.flights:
            flight.living -= gone
        self.flights = [flight for flight in self.flights if flight.living]
        self._traffic.follow_living(now)

    def leave(self, now: float) -> None:
        """The session has ended, and with it all of its chunks."""
        for flight in self.flights:
            flight.living.clear()
        self.flights.clear()
        self._traffic.num_sessions -= 1
        self._traffic.num_writing -= self._is_writing
        self._traffic.follow_living(now)

    def send_at(self, num_rows: float) -> float:
        """When a chunk should leave the origin.

        That is the latest time at which it may without a bubble at the stage that paces the ring. But a prompt's piece
        leaves as soon as one of the usual size may. Where rows cost much, a text has few of them in a chunk and needs
        several chunks on a trip: one that waited for its own time, which is later, would find each place taken.
        """
        if self.num_costly_readers:
            num_rows = max(num_rows, self._traffic.usual_rows)
        return self._traffic.send_at(num_rows)

    def blocked_s(self, num_rows: float, leaves_at: float, known_at: float) -> float:
        """For how long a chunk keeps the next one from the first stage, if at ``known_at`` all of it proves dead."""
        return self._traffic.blocked_s(num_rows, leaves_at, known_at)

    def returns_at(self) -> float | None:
        """When the next chunk is expected back."""
        return self._back_at(self.flights[0]) if self.flights else None

    def row_returns_at(self, id: int) -> float | None:
        """When the chunk with this row is expected back; None where it is not under way or nothing was measured yet."""
        return next((self._back_at(flight) for flight in self.flights if id in flight.living), None)

    def _back_at(self, flight: Flight) -> float | None:
        return flight.ends[-1] + self.costs.hop_s(len(flight.living)) if self.costs.is_measured else None
