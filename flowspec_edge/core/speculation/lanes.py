"""Who computed what lately: a pure observer of what an origin is told and answers, for whoever looks at a ring.

A chunk that comes back tells how long each stage let it wait and ran it, and the origin knows when it left and came
back. What is left of the trip are the hops, all of them taken for equally long, unless a stage would run two chunks at
once. So what a stage did is known one trip later; what it does now is what the origin expects (``Flight`` in
pipeline.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from flowspec_edge.core import events as ev
from flowspec_edge.core.rows import Chunk

MAX_KEPT = 128
"""Trips, and jobs of the origin: the last second of a ring on one machine, and a minute of one of slow boards."""
MAX_ROWS = 4096
"""Of chunks under way; those that die on the way are forgotten here."""


class Span(NamedTuple):
    """From when until when, in the origin's seconds."""

    began: float
    ended: float


class Trip(NamedTuple):
    """A chunk that came back with the rows ``ids``. ``stages`` has a span for each stage that ran it, ``num_rows`` how
    many rows each ran.
    """

    session: int
    ids: tuple[int, ...]
    way: Span
    stages: tuple[Span, ...]
    num_rows: tuple[int, ...]


class Job(NamedTuple):
    """A run of the origin's compute lane: ``head`` or ``draft``."""

    session: int
    kind: str
    span: Span


class Lanes:
    """Told of each event with the actions that answered it, it keeps the last trips and jobs, the oldest first."""

    def __init__(self) -> None:
        self.trips: deque[Trip] = deque(maxlen=MAX_KEPT)
        self.jobs: deque[Job] = deque(maxlen=MAX_KEPT)
        self._sent_at: dict[tuple[int, int], float] = {}  # by session and row, of chunks under way
        self._free_at: dict[int, float] = {}  # by stage, when its last chunk ended
        self._job: tuple[ev.RunHead | ev.RunDraft, float] | None = None

    def see(self, event: ev.OriginEvent, actions: Sequence[ev.OriginAction], now: float) -> None:
        """The origin was told this, and answered so."""
        match event:
            case ev.ChunkReturned(chunk):
                self._take_returned(chunk, now)
            case ev.HeadFinished() | ev.DraftFinished() if self._job is not None:
                job, began = self._job
                self._job = None
                kind = "head" if isinstance(job, ev.RunHead) else "draft"
                self.jobs.append(Job(job.session, kind, Span(began, now)))
        for action in actions:
            match action:
                case ev.SendChunk(chunk):
                    self._sent_at.update({(chunk.session, row.id): now for row in chunk.rows})
                case ev.RunHead() | ev.RunDraft():
                    self._job = action, now
        while len(self._sent_at) > MAX_ROWS:
            del self._sent_at[next(iter(self._sent_at))]

    def _take_returned(self, chunk: Chunk, now: float) -> None:
        ids = tuple(row.id for row in chunk.rows)
        sent = [at for id in ids if (at := self._sent_at.pop((chunk.session, id), None)) is not None]
        if not sent:  # it left before anybody looked
            return
        way, stages, at = Span(sent[0], now), [], sent[0]
        on_the_way = now - at - sum(passage.waited_s + passage.ran_s for passage in chunk.passages)
        hop_s = max(on_the_way, 0.0) / (len(chunk.passages) + 1)
        for number, passage in enumerate(chunk.passages):
            began = max(at + hop_s + passage.waited_s, self._free_at.get(number, at))
            at = self._free_at[number] = began + passage.ran_s
            stages.append(Span(began, at))
        num_rows = tuple(passage.num_rows for passage in chunk.passages)
        self.trips.append(Trip(chunk.session, ids, way, tuple(stages), num_rows))
