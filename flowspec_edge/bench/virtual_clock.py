"""A ring on simulated time: the very cores that run on boards, the real model's tokens, and costs from a testbed.

Only time is simulated. What the target says comes from a tape of the real model, what the drafter proposes from the real
draft head, run here and now; how long each step takes is said by the testbed. The same inputs give the same digits.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.testbed import Testbed
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import GenerationStatistics, TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.core.speculation.tree import NO_PARENT, Advance, Row, Tree
from flowspec_edge.core.wire import ROW_BYTES
from flowspec_edge.engine.drafters import Drafter
from flowspec_edge.errors import StageFailedError

SESSION = 1


@dataclass(slots=True)
class TimedAnswer:
    """What one generation gave, and the time in seconds at which each token was final."""

    tokens: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)

    @property
    def decode_s(self) -> float:
        """From the first tokens to the last: the prompt is left out."""
        return self.token_times_s[-1] - self.token_times_s[0]

    @property
    def num_decoded(self) -> int:
        """Tokens after the first ones."""
        return sum(time > self.token_times_s[0] for time in self.token_times_s)

    @property
    def tokens_per_s(self) -> float:
        return self.num_decoded / self.decode_s if self.decode_s else 0.0


@dataclass(slots=True)
class VirtualAnswer(TimedAnswer):
    """An answer in simulated time.

    ``busy_s`` is per stage, the origin's compute lane last. ``row_seconds`` counts living draft rows under way: sent, not back
    and not pruned, times the seconds for which they were. ``num_forwards`` and ``num_forward_rows`` are those of all stages, the
    prompt's left out.
    """

    statistics: GenerationStatistics = field(default_factory=GenerationStatistics)
    busy_s: list[float] = field(default_factory=list)
    row_seconds: float = 0.0
    num_forwards: int = 0
    num_forward_rows: int = 0


class Observer(Protocol):
    """Sees what a ring does, in simulated seconds."""

    def see_forward(
        self, stage: int, began_s: float, ended_s: float, rows: tuple[Row, ...], is_cancelled: bool
    ) -> None:
        """A stage has run these rows, or begun to and given up."""

    def see_compute(self, name: str, began_s: float, ended_s: float, num_rows: int) -> None:
        """The origin's compute lane has begun on ``head`` or ``draft``."""

    def see_advance(self, at_s: float, token: int) -> None:
        """The origin has told all stages the next token."""


class _Clock:
    """Callbacks in the order of their time, first come first served where times agree."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def after(self, delay_ms: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now_s + delay_ms / 1000, next(self._numbers), callback))

    def run(self) -> None:
        while self._queue:
            self.now_s, _, callback = heapq.heappop(self._queue)
            callback()


class _TapeTarget:
    """Stages and head played from a tape. A hidden row is its position plus one on the text, and 0 off it."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self._places: dict[int, int] = {}  # per draft id: position plus one, 0 off the text

    def forward(self, rows: tuple[Row, ...]) -> ev.Floats:
        tokens = self._tape.tokens
        out = np.zeros((len(rows), 1), np.float32)
        for index, row in enumerate(rows):
            place = self._places.get(row.id)
            if place is None:
                above = 0 if row.parent == NO_PARENT else self._places[row.parent]
                on_text = (above or row.parent == NO_PARENT) and above < len(tokens) and tokens[above] == row.token
                place = self._places[row.id] = above + 1 if on_text else 0
            out[index] = place
        return out

    def logits(self, hidden: ev.Floats) -> ev.Floats:
        return self._tape.logits[hidden[:, 0].astype(np.int64) - 1]

    def hidden(self, hidden: ev.Floats) -> ev.Floats:
        """What the drafter gets: the target's own rows."""
        return self._tape.hidden[hidden[:, 0].astype(np.int64) - 1]


@dataclass(slots=True)
class _Forward:
    """What a stage runs: since when, and the number of the callback that ends it."""

    rows: tuple[Row, ...]
    began_s: float
    end: int


class VirtualRing:
    """One generation on a ring of ``len(testbed.stages)`` stages that was idle before."""

    def __init__(
        self,
        testbed: Testbed,
        tape: Tape,
        drafter: Drafter | None,
        limits: TargetLimits,
        shape: DraftShape | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._testbed, self._drafter, self._observer = testbed, drafter, observer
        self._target = _TapeTarget(tape)
        self._prompt = tape.prompt
        self._clock = _Clock()
        num_stages = len(testbed.stages)
        self.origin = Origin(num_stages=num_stages, limits=limits, has_drafter=drafter is not None, shape=shape)
        self._stages = [Stage(is_last=number == num_stages - 1) for number in range(num_stages)]
        self._running: list[_Forward | None] = [None] * num_stages
        self._wire_free_at_s = [0.0] * (num_stages + 1)  # per hop
        self._deadline: float | None = None
        self._answer = VirtualAnswer(busy_s=[0.0] * (num_stages + 1))
        self._is_finished = False
        self._ends = itertools.count()
        self._tree = Tree()  # what the origin has sent
        self._flying: set[int] = set()  # draft rows under way
        self._flying_since_s = 0.0

    def generate(self, options: GenerateOptions) -> VirtualAnswer:
        """Run it to its end.

        Raises:
            RequestError: as on a real ring.
            StageFailedError: the ring came to rest before the end of the text.
        """
        self._tell_origin(ev.PromptSubmitted(SESSION, self._prompt, options))
        self._clock.run()
        if not self._is_finished:
            raise StageFailedError("the simulated ring came to rest before the end of the text; this is a bug")
        return self._answer

    def _tell_origin(self, event: ev.OriginEvent) -> None:
        testbed, clock = self._testbed, self._clock
        if self._is_finished:
            return
        for action in self.origin.handle(event, clock.now_s):
            match action:
                case ev.SendChunk():
                    self._send_chunk(0, action)
                case ev.GrantCredit(num_chunks):
                    self._tell_later(len(self._stages) - 1, ev.CreditArrived(num_chunks))
                case ev.BroadcastAdvance(session, at, to):
                    self._tree.advance(Advance(at, to))
                    self._count_flying(landed=self._tree.take_dropped())
                    if self._observer is not None:
                        self._observer.see_advance(clock.now_s, to)
                    self._broadcast(ev.AdvanceArrived(session, at, to))
                case ev.BroadcastTurn(session, turn):
                    self._broadcast(ev.TurnBegan(session, turn))
                case ev.RunHead(_, hidden):
                    self._compute(ev.HeadFinished(self._target.logits(hidden)), testbed.head_ms, "head", len(hidden))
                case ev.RunDraft(rows=rows, hidden=hidden):
                    assert self._drafter is not None
                    job = ev.RunDraft(
                        SESSION,
                        rows,
                        action.positions,
                        self._target.hidden(hidden) if len(hidden) else hidden,
                        action.dropped,
                    )
                    self._compute(self._drafter.run(job), testbed.draft_ms(len(rows)), "draft", len(rows))
                case ev.OpenSessions(session, capacity, cancels):
                    self._answer.statistics = self.origin.statistics(session)
                    if self._drafter is not None:
                        self._drafter.open(session, capacity)
                    self._broadcast(ev.SessionRequested(session, capacity, cancels))
                case ev.CloseSessions(session):
                    if self._drafter is not None:
                        self._drafter.close(session)
                    self._broadcast(ev.SessionEnded(session))
                case ev.EmitTokens(_, tokens):
                    self._answer.tokens += tokens
                    self._answer.token_times_s += [clock.now_s] * len(tokens)
                case ev.FinishGeneration(_, "failed", error):
                    raise StageFailedError(
                        f"the simulated ring stands still after {clock.now_s:.1f} s; this is a bug ({error})"
                    )
                case ev.FinishGeneration():
                    self._count_flying()
                    self._is_finished = True
        self._arm_timer()

    def _arm_timer(self) -> None:
        deadline = self.origin.next_deadline()
        if deadline is not None and deadline != self._deadline and not self._is_finished:
            self._deadline = deadline
            self._clock.after(
                max(deadline - self._clock.now_s, 0) * 1000, functools.partial(self._pass_deadline, deadline)
            )

    def _pass_deadline(self, deadline: float) -> None:
        if deadline == self._deadline:
            self._deadline = None
            self._tell_origin(ev.DeadlinePassed())

    def _tell_stage(self, number: int, event: ev.StageEvent) -> None:
        clock, testbed = self._clock, self._testbed
        for action in self._stages[number].handle(event, clock.now_s):
            match action:
                case ev.OpenCache():
                    clock.after(testbed.hop_ms, functools.partial(self._tell_origin, ev.StageReady(SESSION)))
                case ev.RunForward(rows=rows):
                    finished = ev.ForwardFinished(self._target.forward(rows))
                    end = next(self._ends)
                    self._running[number] = _Forward(rows, clock.now_s, end)
                    delay_ms = testbed.forward_ms(number, len(rows))
                    if rows[-1].id >= len(self._prompt):
                        self._answer.num_forwards += 1
                        self._answer.num_forward_rows += len(rows)
                    clock.after(delay_ms, functools.partial(self._end_forward, number, end, finished))
                case ev.CancelForward():
                    self._cancel_forward(number)
                case ev.SendChunk():
                    self._send_chunk(number + 1, action)
                case ev.GrantCredit(num_chunks) if number:
                    self._tell_later(number - 1, ev.CreditArrived(num_chunks))
                case ev.GrantCredit(num_chunks):
                    arrived = ev.CreditArrived(num_chunks)
                    clock.after(testbed.hop_ms, functools.partial(self._tell_origin, arrived))

    def _end_forward(self, number: int, end: int, finished: ev.ForwardFinished) -> None:
        running = self._running[number]
        if running is not None and running.end == end:
            self._running[number] = None
            self._answer.busy_s[number] += self._clock.now_s - running.began_s
            if self._observer is not None:
                is_cancelled = not len(finished.hidden)
                self._observer.see_forward(number, running.began_s, self._clock.now_s, running.rows, is_cancelled)
            self._tell_stage(number, finished)

    def _cancel_forward(self, number: int) -> None:
        """A forward ends behind the layer that runs now."""
        running = self._running[number]
        assert running is not None
        layer_ms = self._testbed.stages[number].layer_ms(len(running.rows))
        passed_ms = (self._clock.now_s - running.began_s) * 1000
        end = running.end = next(self._ends)
        finished = ev.ForwardFinished(np.zeros((0, 1), np.float32))
        delay_ms = math.ceil(passed_ms / layer_ms - 1e-9) * layer_ms - passed_ms
        self._clock.after(delay_ms, functools.partial(self._end_forward, number, end, finished))

    def _compute(self, finished: ev.OriginEvent, delay_ms: float, name: str, num_rows: int) -> None:
        now_s = self._clock.now_s
        self._answer.busy_s[-1] += delay_ms / 1000
        if self._observer is not None:
            self._observer.see_compute(name, now_s, now_s + delay_ms / 1000, num_rows)
        self._clock.after(delay_ms, functools.partial(self._tell_origin, finished))

    def _tell_later(self, number: int, event: ev.StageEvent) -> None:
        self._clock.after(self._testbed.hop_ms, functools.partial(self._tell_stage, number, event))

    def _broadcast(self, event: ev.StageEvent) -> None:
        for number in range(len(self._stages)):
            self._tell_later(number, event)

    def _send_chunk(self, hop: int, chunk: ev.SendChunk) -> None:
        """Over hop ``hop``, which ends at that stage, the last one at the origin: one chunk at a time on the wire."""
        clock = self._clock
        if hop == 0:
            self._count_flying(sent=chunk.rows)
        num_bytes = len(chunk.rows) * (ROW_BYTES + (self._testbed.hidden_bytes if chunk.hidden is not None else 0))
        starts_s = max(clock.now_s, self._wire_free_at_s[hop])
        self._wire_free_at_s[hop] = starts_s + num_bytes * 8 / (self._testbed.rate_mbit_per_s * 1e6)
        delay_ms = (self._wire_free_at_s[hop] - clock.now_s) * 1000 + self._testbed.hop_ms
        if hop < len(self._stages):
            arrived = ev.ChunkArrived(
                chunk.session, chunk.rows, chunk.num_wanted, chunk.hidden, chunk.turn, chunk.passages
            )
            clock.after(delay_ms, functools.partial(self._tell_stage, hop, arrived))
        else:
            assert chunk.hidden is not None, "the last stage sends hidden rows"
            returned = ev.ChunkReturned(chunk.session, chunk.rows, chunk.hidden, chunk.passages)
            clock.after(delay_ms, functools.partial(self._return_chunk, returned))

    def _return_chunk(self, returned: ev.ChunkReturned) -> None:
        self._count_flying(landed=[row.id for row in returned.rows])
        self._tell_origin(returned)

    def _count_flying(self, sent: Sequence[Row] = (), landed: Sequence[int] = ()) -> None:
        """Draft rows take off, or come back or die: count the time until now, then change who is under way."""
        now_s = self._clock.now_s
        self._answer.row_seconds += len(self._flying) * (now_s - self._flying_since_s)
        self._flying_since_s = now_s
        self._flying.difference_update(landed)
        for row in sent:
            self._tree.add(row)
            if row.id >= len(self._prompt):
                self._flying.add(row.id)
