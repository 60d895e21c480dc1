"""One stage of one ring at work, between its links. The stage's core decides; this module performs its actions.

``stage_opening.py`` loads and connects a stage before that, and keeps or frees it afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from flowspec_edge.config import RowKind
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.row_kinds import narrow, widen
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.errors import CacheFullError, ProtocolError, RowsTooLargeError
from flowspec_edge.net.connection import Link
from flowspec_edge.net.packet_counter import PacketCounter
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.curves import StageRecorder
from flowspec_edge.node.pacing import Board, Runner
from flowspec_edge.tasks import Jobs, expect_done, run_until_first_ends

TELL_ENERGY_S = 0.5
"""How often an origin is told what a board takes: twice as long as sensors are read, and a tenth of a short text."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StageLinks:
    """``control`` leads to the origin, ``behind`` to whom chunks come from, ``ahead`` to whom they go."""

    control: Link
    behind: Link
    ahead: Link


@dataclass(slots=True)
class _Running:
    """A forward, from its start to its end. ``busy`` is how long the node is."""

    forward: ev.RunForward
    began_at: float
    busy: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    is_cancelled: bool = False

    def asks(self) -> bool:
        """Between its layers, on its thread, whether it has been cancelled."""
        return self.is_cancelled


class StageHost:
    """A loaded and connected stage, which works as long as the context lasts; ``wait_ended`` tells when it has ended.

    ``journal`` writes down what ``core`` is told, where that is wanted. ``runner`` runs on ``executor``, which has one
    thread. A session may have at most ``max_capacity`` rows, which leave as ``row_kind``. ``activity`` is told when
    forwards run, and ``recorder`` how long they took. The origin is told the ``energy`` that the board takes.
    """

    def __init__(
        self,
        core: Stage,
        journal: Journal,
        runner: Runner,
        links: StageLinks,
        board: Board,
        executor: ThreadPoolExecutor,
        *,
        max_capacity: int,
        row_kind: RowKind = "float32",
        activity: Activity,
        recorder: StageRecorder | None = None,
        energy: Callable[[], wire.EnergyTaken | None] = lambda: None,
    ) -> None:
        self._core, self._journal = core, journal
        self._runner = runner
        self._control, self._behind, self._ahead = links.control, links.behind, links.ahead
        self._board = board
        self._jobs = Jobs(executor)
        self._max_capacity, self._row_kind = max_capacity, row_kind
        self._activity = activity
        self._recorder, self._energy = recorder, energy
        self._running: _Running | None = None  # the newest forward, until it has ended
        self._num_sent = 0
        self._is_used = asyncio.Event()  # by a session: the ring is open
        self._working: asyncio.Task[None] | None = None
        self._offence: tuple[Link, ProtocolError] | None = None  # who broke the rules, where that ended the stage

    async def __aenter__(self) -> Self:
        self._working = asyncio.create_task(self._work(), name=f"stage behind {self._behind.peer}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """What runs is given up; its thread may be busy a little longer."""
        working, self._working = self._working, None  # its error holds this object
        assert working is not None, "entered before"
        self._cancel()
        working.cancel()
        await asyncio.wait({working})
        if not working.cancelled():
            working.exception()  # it is wait_ended that raises it

    async def wait_ended(self) -> None:
        """Until the origin has closed the control link.

        Raises:
            LinkLostError: a link was lost.
            ProtocolError: a peer broke the rules.
            StageFailedError: the stage cannot go on.
        """
        assert self._working is not None, "a stage works inside its context"
        await asyncio.shield(self._working)

    async def refuse_offender(self) -> None:
        """Close the link of the peer that broke the rules, if one did, and tell it why. The origin is told before."""
        if self._offence is not None:
            link, error = self._offence
            await link.close(error)

    async def _work(self) -> None:
        await run_until_first_ends(
            self._blaming(self._control, self._read_control()),
            self._blaming(self._behind, self._behind.deliver(self._take_chunk)),
            self._blaming(self._ahead, self._ahead.deliver(self._take_credit, self._take_room)),
            self._jobs.wait_failed(),
            self._count_packets(),
            self._tell_energy(),
        )

    async def _blaming(self, link: Link, reading: Coroutine[Any, Any, None]) -> None:
        """Read a link; what breaks the rules is its peer's fault."""
        try:
            await reading
        except ProtocolError as cause:
            named = f"peer {link.peer}"
            error = cause if str(cause).startswith(named) else ProtocolError(f"{named}: {cause}")
            self._offence = self._offence or (link, error.again())
            raise error.again() from cause

    async def _read_control(self) -> None:
        async for message in self._control:
            match message:
                case wire.OpenSession(spec):
                    if spec.capacity > self._max_capacity:
                        raise ProtocolError(
                            f"a session of {spec.capacity} rows exceeds the {self._max_capacity} that this model "
                            "can use"
                        )
                    self._is_used.set()
                    self._tell(ev.SessionRequested(spec))
                case wire.AdvanceSession(session, at, to):
                    self._tell(ev.AdvanceArrived(session, at, to))
                case wire.BeginTurn(session, turn):
                    self._tell(ev.TurnBegan(session, turn))
                case wire.CloseSession(session, is_kept):
                    self._tell(ev.SessionEnded(session, is_kept))
                case _:
                    raise ProtocolError(f"peer {self._control.peer}: {type(message).__name__} came on a control link")

    def _take_chunk(self, message: wire.Message) -> None:
        if not isinstance(message, wire.ChunkMessage):
            raise ProtocolError(f"peer {self._behind.peer}: {type(message).__name__} came where a chunk was expected")
        self._tell(ev.ChunkArrived(message.chunk))

    def _take_credit(self, message: wire.Message) -> None:
        self._tell(ev.CreditArrived(wire.expect(message, wire.Credit, self._ahead.peer).num_chunks))

    def _take_room(self, has_room: bool) -> None:
        self._tell(ev.LinkResumed() if has_room else ev.LinkPaused())

    async def _count_packets(self) -> None:
        """Tell the origin what is lost on the ways to the neighbours, which it cannot see."""
        await self._is_used.wait()
        counter = PacketCounter(self._ahead, self._behind)
        while True:
            ahead, behind = await counter.count()
            packets = wire.PacketsSent(*ahead, *behind)
            if packets.num_ahead or packets.num_behind:
                self._control.send(packets)

    async def _tell_energy(self) -> None:
        """Also while nothing is computed here: what the board takes then belongs to the texts that wait for others."""
        await self._is_used.wait()
        while True:
            if (taken := self._energy()) is not None:
                self._control.send(taken)
            await asyncio.sleep(TELL_ENERGY_S)

    def _run(self, forward: ev.RunForward) -> None:
        """Run a forward, behind what else has to be done."""
        running = self._running = _Running(forward, time.monotonic())
        running.busy.enter_context(self._activity.busy())
        self._jobs.submit(partial(self._take_result, running), self._compute, forward, running.asks)

    def _compute(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished:
        """On the thread of forwards."""
        came = forward.hidden
        if came is not None and (whole := widen(came)) is not came:
            forward = replace(forward, hidden=whole)
        finished = self._runner.run(forward, is_cancelled)
        if self._row_kind == "float32":
            return finished
        return replace(finished, hidden=narrow(finished.hidden, self._row_kind))

    def _take_result(self, running: _Running, ended: Future[ev.ForwardFinished]) -> None:
        running.busy.close()
        if self._running is running:
            self._running = None
        if self._working is None:  # nobody waits for it any more
            return
        try:
            finished = ended.result()
        except (CacheFullError, RowsTooLargeError) as cause:
            self._end_session(running.forward, cause)
            return
        if self._recorder is not None and not running.is_cancelled:
            self._recorder.add(len(running.forward.rows), time.monotonic() - running.began_at)
        self._tell(finished)

    def _cancel(self) -> None:
        if self._running is not None:
            self._running.is_cancelled = True

    def _say_opened(self, session: int, num_kept: int, ended: Future[bool]) -> None:
        if self._working is not None:
            self._board.send(self._control, wire.SessionOpened(session, num_kept if ended.result() else 0))

    def _end_session(self, forward: ev.RunForward, cause: CacheFullError | RowsTooLargeError) -> None:
        """End the session that a forward is of, and tell the origin. No row of the forward lives any more."""
        _log.warning("session %d has ended: %s", forward.session, cause)
        self._board.send(self._control, wire.SessionFailure(forward.session, str(cause)).plain)
        self._tell(ev.SessionEnded(forward.session))
        self._tell(ev.ForwardFinished(np.zeros((len(forward.rows), 0), np.float32)))

    def _tell(self, event: ev.StageEvent) -> None:
        actions = self._journal.handle(self._core, event, time.monotonic())
        actions.sort(key=_can_wait)
        for action in actions:
            match action:
                case ev.OpenCache(session, capacity, kept, num_kept):
                    self._runner.open_cache(session, capacity)
                    if num_kept:
                        then = partial(self._say_opened, session, num_kept)
                        self._jobs.submit(then, self._runner.take_over_cache, session, kept)
                    else:
                        self._board.send(self._control, wire.SessionOpened(session))
                case ev.KeepCache(session, moves):
                    self._jobs.submit(expect_done, self._runner.keep_cache, session, moves)
                case ev.FreeCache(session):  # behind the forward that may run; to free a gigabyte takes a while
                    self._jobs.submit(expect_done, self._runner.free_cache, session)
                case ev.RunForward():
                    self._run(action)
                case ev.CancelForward():
                    self._cancel()
                case ev.SendChunk(chunk):
                    self._board.send(self._ahead, wire.ChunkMessage(self._num_sent, chunk))
                    self._num_sent += 1
                case ev.GrantCredit(num_chunks):
                    self._board.send(self._behind, wire.Credit(num_chunks))
                case ev.SendTapped(session, layer, ids, hidden):
                    self._board.send(self._control, wire.TappedRows(session, layer, ids, hidden))


def _can_wait(action: ev.StageAction) -> bool:
    """Whether an action comes behind the others: to send takes a while, and a credit is early by the whole forward."""
    return isinstance(action, ev.GrantCredit)
