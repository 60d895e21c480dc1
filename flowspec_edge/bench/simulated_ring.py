"""A ring in one process: the very cores that run on boards, over pretended links.

``Times`` says what takes how long, and a ``Scheduler`` what happens next: a clock for figures, any order for tests.
What stages and origin compute is pretended, or the real thing, as the caller likes.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flowspec_edge.core import events as ev
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.rows import Chunk, Row, SessionSpec, SlotMove
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.stage import Stage


class Scheduler(Protocol):
    """Decides what happens next."""

    @property
    def now_s(self) -> float: ...

    def after(self, delay_ms: float, lane: str | None, callback: Callable[[], None]) -> None:
        """Call back in ``delay_ms``, but after what was put on the same lane earlier. None is a lane of its own."""


class Clock:
    """Callbacks in the order of their time, first come first served where times agree.

    Delays on one lane never shrink on a ring, so lanes keep their order by themselves.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, delay_ms: float, lane: str | None, callback: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_ms / 1000, next(self._numbers), callback))

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._queue:
            self.now_s, _, callback = heapq.heappop(self._queue)
            callback()


class Times(Protocol):
    """How long each step takes, in milliseconds."""

    @property
    def hop_ms(self) -> float:
        """A small message between any two nodes."""

    def wire_ms(self, hop: int, chunk: Chunk, now_s: float) -> float:
        """For how long the wire of ``hop`` is busy with what has left and a chunk that leaves now. The hop ends at the
        stage of that number, the last one at the origin.
        """

    def forward_ms(self, stage: int, num_rows: int) -> float:
        """A forward of a stage."""

    def cancelled_ms(self, stage: int, num_rows: int, passed_ms: float) -> float:
        """What is left of a forward that began ``passed_ms`` ago and is cancelled now."""

    @property
    def head_ms(self) -> float:
        """Logits, of however many rows."""

    def draft_ms(self, num_rows: int) -> float:
        """A pass of the drafter."""


class StageEngine(Protocol):
    """What a stage computes with."""

    def open_cache(self, session: int, capacity: int) -> None: ...

    def free_cache(self, session: int) -> None: ...

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None: ...

    def take_over_cache(self, session: int, kept: int) -> bool: ...

    def run(self, forward: ev.RunForward, *, is_cancelled: bool) -> ev.ForwardFinished:
        """Told when the forward ends; of one that was cancelled the values do not matter."""


class OriginEngine(Protocol):
    """What the origin computes with: head and drafter."""

    def open(self, spec: SessionSpec) -> None: ...

    def close(self, session: int) -> None: ...

    def keep(self, session: int, taken: Sequence[int]) -> None: ...

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished: ...

    def check(self, job: ev.CheckDrafts) -> ev.DraftsChecked: ...


class Watcher:
    """Sees what a ring does, in simulated seconds. Each method does nothing until it is overridden."""

    def see_action(self, action: ev.OriginAction, now_s: float) -> None:
        """The origin answers with this, which is about to be performed."""

    def see_return(self, chunk: Chunk, now_s: float) -> None:
        """A chunk has come back to the origin."""

    def see_forward(
        self, stage: int, began_s: float, ended_s: float, rows: tuple[Row, ...], is_cancelled: bool
    ) -> None:
        """A stage has run these rows, or begun to and given up."""

    def see_compute(self, job: ev.RunHead | ev.RunDraft, began_s: float, ended_s: float) -> None:
        """The origin's compute lane has begun on a job."""


@dataclass(slots=True)
class Running:
    """A forward of a stage: since when it runs, and the number of the callback that ends it."""

    forward: ev.RunForward
    began_s: float
    end: int
    is_cancelled: bool = False


class SimulatedRing:
    """An origin and its stages. Whoever made it tells the origin of prompts, and lets the scheduler run."""

    def __init__(
        self,
        origin: Origin,
        origin_engine: OriginEngine,
        stage_engines: Sequence[StageEngine],
        scheduler: Scheduler,
        times: Times,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        self.origin = origin
        self.stages = [Stage(is_last=number == len(stage_engines) - 1) for number in range(len(stage_engines))]
        self.running: list[Running | None] = [None] * len(stage_engines)
        self.journals = [Journal("origin", {}), *(Journal("stage", {}) for _ in stage_engines)]
        """Through which the cores are told, the origin's first; these write nothing."""
        self.is_left = False
        """Set where nobody waits for texts any more: nothing more is told to the origin."""
        self._engine, self._stage_engines = origin_engine, stage_engines
        self._scheduler, self._times, self._watchers = scheduler, times, watchers
        self._behind: list[list[Callable[[], None]]] = [[] for _ in stage_engines]  # what waits for a running forward
        self._num_on_wire = [0] * len(stage_engines)  # chunks that each stage has sent and that have not left it
        self._ends = itertools.count()
        self._is_computing = False
        self._deadline: float | None = None

    def tell_origin(self, event: ev.OriginEvent) -> None:
        """Let the origin handle it, and perform what it answers."""
        if self.is_left:
            return
        now_s = self._scheduler.now_s
        for action in self.journals[0].handle(self.origin, event, now_s):
            for watcher in self._watchers:
                watcher.see_action(action, now_s)
            self._perform(action)
        self._arm_timer()

    def check(self) -> None:
        """Assert the cores' invariants."""
        self.origin.check()
        for stage in self.stages:
            stage.check()

    def _perform(self, action: ev.OriginAction) -> None:
        match action:
            case ev.SendChunk(chunk):
                self._send_chunk(0, chunk)
            case ev.GrantCredit(num_chunks):
                last = len(self.stages) - 1
                self._tell_stage_later(last, f"credit {last + 1}", ev.CreditArrived(num_chunks))
            case ev.BroadcastAdvance(session, at, to):
                self._broadcast(ev.AdvanceArrived(session, at, to))
            case ev.BroadcastTurn(session, turn):
                self._broadcast(ev.TurnBegan(session, turn))
            case ev.RunHead():
                self._compute(action, self._times.head_ms)
            case ev.RunDraft(rows=rows):
                self._compute(action, self._times.draft_ms(len(rows)))
            case ev.CheckDrafts():  # takes microseconds, beside all else
                self._scheduler.after(0, None, functools.partial(self.tell_origin, self._engine.check(action)))
            case ev.OpenSessions(spec):
                self._engine.open(spec)
                self._broadcast(ev.SessionRequested(spec))
            case ev.CloseSessions(session, is_kept, taken):
                if is_kept:
                    self._engine.keep(session, taken)
                else:
                    self._engine.close(session)
                self._broadcast(ev.SessionEnded(session, is_kept))

    def _tell_stage(self, number: int, event: ev.StageEvent) -> None:
        for action in self.journals[number + 1].handle(self.stages[number], event, self._scheduler.now_s):
            match action:
                case ev.OpenCache(session, capacity, kept, num_kept):
                    self._stage_engines[number].open_cache(session, capacity)
                    if num_kept:
                        self._do_behind(number, functools.partial(self._take_over, number, session, kept, num_kept))
                    else:
                        self._tell_origin_later(f"reply {number}", ev.StageReady(session, number))
                case ev.KeepCache(session, moves):
                    keep = functools.partial(self._stage_engines[number].keep_cache, session, moves)
                    self._do_behind(number, keep)
                case ev.FreeCache(session):
                    self._stage_engines[number].free_cache(session)
                case ev.RunForward():
                    self._start_forward(number, action)
                case ev.CancelForward(session):
                    self._cancel_forward(number, session)
                case ev.SendChunk(chunk):
                    self._send_chunk(number + 1, chunk)
                case ev.GrantCredit(num_chunks) if number:
                    self._tell_stage_later(number - 1, f"credit {number}", ev.CreditArrived(num_chunks))
                case ev.GrantCredit(num_chunks):
                    self._tell_origin_later("credit 0", ev.CreditArrived(num_chunks))
                case ev.SendTapped(session, layer, ids, hidden):
                    self._tell_origin_later(f"reply {number}", ev.TappedArrived(session, layer, ids, hidden))

    def _do_behind(self, number: int, job: Callable[[], None]) -> None:
        """Do it behind the forward that the stage runs, if it runs one."""
        if self.running[number] is None:
            job()
        else:
            self._behind[number].append(job)

    def _take_over(self, number: int, session: int, kept: int, num_kept: int) -> None:
        is_there = self._stage_engines[number].take_over_cache(session, kept)
        self._tell_origin_later(f"reply {number}", ev.StageReady(session, number, num_kept if is_there else 0))

    def _start_forward(self, number: int, forward: ev.RunForward) -> None:
        assert self.running[number] is None, "a stage runs one chunk at a time"
        end = next(self._ends)
        self.running[number] = Running(forward, self._scheduler.now_s, end)
        delay_ms = self._times.forward_ms(number, len(forward.rows))
        self._scheduler.after(delay_ms, None, functools.partial(self._end_forward, number, end))

    def _cancel_forward(self, number: int, session: int) -> None:
        running = self.running[number]
        assert running is not None and running.forward.session == session, "there is nothing to cancel"
        assert not running.is_cancelled, "a forward is cancelled once"
        running.is_cancelled = True
        running.end = next(self._ends)
        passed_ms = (self._scheduler.now_s - running.began_s) * 1000
        delay_ms = self._times.cancelled_ms(number, len(running.forward.rows), passed_ms)
        self._scheduler.after(delay_ms, None, functools.partial(self._end_forward, number, running.end))

    def _end_forward(self, number: int, end: int) -> None:
        running = self.running[number]
        if running is None or running.end != end:  # cancelled meanwhile: it has ended, or will by another callback
            return
        self.running[number] = None
        finished = self._stage_engines[number].run(running.forward, is_cancelled=running.is_cancelled)
        for watcher in self._watchers:
            watcher.see_forward(
                number, running.began_s, self._scheduler.now_s, running.forward.rows, running.is_cancelled
            )
        behind, self._behind[number] = self._behind[number], []
        for job in behind:
            job()
        self._tell_stage(number, finished)

    def _compute(self, job: ev.RunHead | ev.RunDraft, delay_ms: float) -> None:
        assert not self._is_computing, "the compute lane takes one job at a time"
        self._is_computing = True
        now_s = self._scheduler.now_s
        for watcher in self._watchers:
            watcher.see_compute(job, now_s, now_s + delay_ms / 1000)
        self._scheduler.after(delay_ms, None, functools.partial(self._end_compute, self._engine.run(job)))

    def _end_compute(self, finished: ev.HeadFinished | ev.DraftFinished) -> None:
        self._is_computing = False
        self.tell_origin(finished)

    def _send_chunk(self, hop: int, chunk: Chunk) -> None:
        assert len(chunk.passages) == hop, "one passage per stage passed"
        busy_ms = self._times.wire_ms(hop, chunk, self._scheduler.now_s)
        arrive = (
            functools.partial(self._tell_stage, hop, ev.ChunkArrived(chunk))
            if hop < len(self.stages)
            else functools.partial(self._return_chunk, chunk)
        )
        self._scheduler.after(busy_ms + self._times.hop_ms, f"hop {hop}", arrive)
        if hop:  # the origin's chunks are small
            self._num_on_wire[hop - 1] += 1
            self._tell_stage(hop - 1, ev.LinkPaused())
            self._scheduler.after(busy_ms, f"wire {hop}", functools.partial(self._free_wire, hop - 1))

    def _free_wire(self, number: int) -> None:
        """A chunk of the stage of that number has left its wire."""
        self._num_on_wire[number] -= 1
        if not self._num_on_wire[number]:
            self._tell_stage(number, ev.LinkResumed())

    def _return_chunk(self, chunk: Chunk) -> None:
        for watcher in self._watchers:
            watcher.see_return(chunk, self._scheduler.now_s)
        self.tell_origin(ev.ChunkReturned(chunk))

    def _broadcast(self, event: ev.StageEvent) -> None:
        for number in range(len(self.stages)):
            self._tell_stage_later(number, f"control {number}", event)

    def _tell_stage_later(self, number: int, lane: str, event: ev.StageEvent) -> None:
        self._scheduler.after(self._times.hop_ms, lane, functools.partial(self._tell_stage, number, event))

    def _tell_origin_later(self, lane: str, event: ev.OriginEvent) -> None:
        self._scheduler.after(self._times.hop_ms, lane, functools.partial(self.tell_origin, event))

    def _arm_timer(self) -> None:
        """Each deadline is told once: one that has passed and still stands waits for another event."""
        deadline = self.origin.next_deadline()
        if deadline == self._deadline:
            return
        self._deadline = deadline
        if deadline is not None:
            delay_ms = max(deadline - self._scheduler.now_s, 0) * 1000
            self._scheduler.after(delay_ms, None, functools.partial(self._pass_deadline, deadline))

    def _pass_deadline(self, deadline: float) -> None:
        if deadline == self._deadline:
            self.tell_origin(ev.DeadlinePassed())
