"""A ring as its origin sees it: stages opened on nodes, links to all of them, and the generations that run through it.

The origin's core decides; this module performs its actions. A ring is used until something in it is lost, then closed
for good: whoever needs another one opens another one (``opening.py``).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from flowspec_edge.config import GenerateOptions, Grammar, Piece, Prompt, RowKind, Text, TextPart, UnfinishedText
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.device.energy_shares import EnergyShares
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning.arithmetic import ComputedLayers
from flowspec_edge.core.planning.losses import Part
from flowspec_edge.core.planning.packet_loss import Lossy, PacketLoss
from flowspec_edge.core.planning.placement import Plan, StagePlan
from flowspec_edge.core.planning.prediction import Outcome, hold_against
from flowspec_edge.core.row_kinds import kind_of
from flowspec_edge.core.rows import SessionSpec
from flowspec_edge.core.speculation.lanes import Lanes
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.pictures import RingPicture
from flowspec_edge.core.speculation.pipeline import RingCosts
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import (
    FieldError,
    FlowspecError,
    LinkLostError,
    ProtocolError,
    RequestError,
    RingLostError,
    StageFailedError,
    release_frames,
)
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.packet_counter import PacketCounter
from flowspec_edge.net.standstill import THIS_PROCESS
from flowspec_edge.node.pacing import Board
from flowspec_edge.origin.answer import Answer
from flowspec_edge.origin.blame import ANSWER_S, loss_of, next_silent, stage_loss
from flowspec_edge.origin.engine import OriginEngine
from flowspec_edge.origin.status import KeptStatus, StageStatus, StageWork
from flowspec_edge.tasks import Jobs, expect_done, run_until_first_ends

PROGRESS_S = 10.0
"""How often a text that waits for its prompt to be read says how far that is."""
MAX_UNREAD = 256
"""What a session may tell of its answer that nobody has read. Sockets take some thousand tokens before: so whoever
leaves that much unread reads nothing, and to read prompt and text once more costs nobody else anything."""
COMPILING_S = 10.0
"""How long a text may wait until its grammar is compiled. Most take some milliseconds."""

NOTE_ENERGY_S = 0.5
"""How often it is noted what the origin's own board takes: as often as stages tell it of theirs."""
LOOKED_S = 3.0
"""How long a ring goes on noting what it does for somebody who does not look any more."""

OnTrip = Callable[[ev.ReportTrip], None]

OnLossy = Callable[[Lossy], None]
"""Told of each part of a ring that loses packets, once."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RingStage:
    """One stage of an opened ring. ``load_ms`` is what the node took to load its layers, of which it fetched so many
    bytes, and ``held_bytes`` what it holds for them of the memory that it offers. ``arithmetic`` is how it describes
    what decides on the bits of its rows.
    """

    plan: StagePlan
    announcement: Announcement
    load_ms: int
    fetched_bytes: int = 0
    held_bytes: int = 0
    arithmetic: str = ""


@dataclass(frozen=True, slots=True)
class RingLinks:
    """``controls`` lead to the stages, in their order, ``ahead`` to the first one; ``behind`` comes from the last."""

    controls: Sequence[Link]
    ahead: Link
    behind: Link


class _Writing(NamedTuple):
    """The answer of a session, and what its core says of it that was not read yet."""

    answer: Answer
    unread: asyncio.Queue[ev.OriginAction]


class Ring:
    """Opened and connected stages of one bundle, which work as long as the context lasts. Made by ``open_ring``.

    ``journal`` writes down what ``core`` is told, where that is wanted. ``plan`` is what the planner expects of the
    ring, where it was planned. ``on_lossy`` is told which part of the ring loses packets. A slot of a session's cache
    takes ``slot_bytes`` on all stages together. ``energy`` is what the origin's own board takes. Hidden rows come as
    ``row_kind``.
    """

    def __init__(
        self,
        core: Origin,
        journal: Journal,
        engine: OriginEngine,
        stages: list[RingStage],
        links: RingLinks,
        board: Board,
        plan: Plan | None = None,
        on_lossy: OnLossy = lambda found: None,
        slot_bytes: int = 0,
        energy: Callable[[], wire.EnergyTaken | None] = lambda: None,
        row_kind: RowKind = "float32",
    ) -> None:
        self.stages, self.plan = stages, plan
        self._computed = [ComputedLayers(stage.plan.start, stage.plan.stop, stage.arithmetic) for stage in stages]
        self._core, self._journal, self._engine = core, journal, engine
        self._controls, self._ahead, self._behind = links.controls, links.ahead, links.behind
        self._origin = links.ahead.hello.node
        self._work_of = [StageWork() for _ in stages]
        self._energy, self._own_energy = EnergyShares({self._origin, *(stage.plan.node for stage in stages)}), energy
        self._is_in_doubt = asyncio.Event()  # whether all stages are there
        self._packet_loss, self._on_lossy = PacketLoss(self._origin), on_lossy
        self._board, self._slot_bytes, self._row_kind = board, slot_bytes, row_kind
        self._answers: dict[int, _Writing] = {}  # by session
        self._sessions = itertools.count(1)
        self._executor, self._checking, self._compiling, self._tokenising = (
            ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("origin", "drafts", "grammar", "tokenizer")
        )
        self._jobs, self._checks = Jobs(self._executor), Jobs(self._checking)
        self._lanes: Lanes | None = None  # while somebody looks
        self._looked_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None  # that the timer was last set for
        self._num_sent = 0
        self._lost: StageFailedError | None = None
        self._is_ending = False  # something was lost, and soon it is known who
        self._ended = asyncio.Event()
        self._is_left = False
        self._working: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._working = asyncio.create_task(self._work(), name=f"ring of {len(self.stages)} stages")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, traceback: TracebackType | None
    ) -> None:
        working, self._working = self._working, None  # its error holds this object
        assert working is not None, "entered before"
        working.cancel()
        await asyncio.wait({working})
        if self._answers and not self._ended.is_set():
            self._give_up(RingLostError("the ring was closed"))
        self._ended.set()
        if self._timer is not None:
            self._timer.cancel()
        self._tokenising.shutdown(wait=False)
        self._compiling.shutdown(wait=False, cancel_futures=True)
        self._checking.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._executor.shutdown, cancel_futures=True)  # behind the last job

    @property
    def is_open(self) -> bool:
        """False once something in the ring was lost, or it was left."""
        return not (self._is_ending or self._is_left)

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the bundle. It stays usable when the ring is closed."""
        return self._engine.tokenizer

    @property
    def loss(self) -> RingLostError | None:
        """Why the ring was lost, where another one may go on."""
        return self._lost if isinstance(self._lost, RingLostError) else None

    @property
    def status(self) -> list[StageStatus]:
        """Its stages, and what each has done."""
        return [
            StageStatus(
                node=stage.plan.node,
                address=f"{stage.announcement.host}:{stage.announcement.port}",
                start=stage.plan.start,
                stop=stage.plan.stop,
                work=work,
            )
            for stage, work in zip(self.stages, self._work_of, strict=True)
        ]

    @property
    def kept(self) -> KeptStatus:
        """The ended sessions that it keeps for prompts that go on from them."""
        num_sessions, num_slots = self._core.kept
        return KeptStatus(num_sessions, num_slots * self._slot_bytes)

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes that were sent to the first stage, and that came from the last one."""
        return self._ahead.num_sent_bytes, self._behind.num_received_bytes

    @property
    def costs(self) -> RingCosts:
        """What its stages, hops, head and drafter take, as measured so far."""
        return self._core.costs

    def look(self) -> RingPicture:
        """What it does now. What it did lately is noted from the first look on, as long as looks go on."""
        self._looked_at = now = time.monotonic()
        lanes = self._lanes = self._lanes or Lanes()
        return RingPicture(now=now, texts=self._core.pictures(), trips=[*lanes.trips], jobs=[*lanes.jobs])

    async def wait_ended(self) -> None:
        """Until the ring was lost, left or closed."""
        await self._ended.wait()

    def outcome(self, answer: Answer, statistics: dict[str, Any]) -> Outcome | None:
        """The plan's prediction against a finished answer with these statistics. None where there was no plan, or the
        text was short, or the ring was not for it alone, or wrote it by another schedule than was planned.
        """
        if self.plan is None or not answer.had_ring_for_itself(self.plan.schedule):
            return None
        num_tokens = int(statistics["completion_tokens"])
        return hold_against(self.plan, self._core.costs, float(statistics["tokens_per_s"]), num_tokens)

    async def begin(self, prompt: Prompt, options: GenerateOptions) -> Answer:
        """An answer to a text or to token ids, of which nothing is written yet, or one to go on with. Texts are
        tokenised one by one.

        Raises:
            RequestError: the text is too long, or has half of a character, or what is written of it cannot be, or its
                grammar cannot be followed.
        """
        tokenizer, loop = self._engine.tokenizer, asyncio.get_running_loop()
        if options.grammar is not None:
            await self._compile(options.grammar)
        if isinstance(prompt, UnfinishedText):
            ending = self._core.ending_of(prompt, options)
            resume = functools.partial(Answer.resume, tokenizer, prompt, options, ending)
            return await loop.run_in_executor(self._tokenising, resume)
        if isinstance(prompt, str):
            prompt = [TextPart(prompt)]
        if texts := [part for part in prompt if isinstance(part, TextPart)]:
            prompt = await loop.run_in_executor(self._tokenising, tokenizer.encode, texts)
        return Answer(tokenizer, cast(Sequence[int], prompt), options)

    async def _compile(self, grammar: Grammar) -> None:
        """Make sure that a grammar can be followed before anything is begun. One is compiled after the other."""
        try:
            async with asyncio.timeout(COMPILING_S):
                with THIS_PROCESS.expected():
                    await asyncio.get_running_loop().run_in_executor(
                        self._compiling, self._engine.grammars.compile, grammar
                    )
        except TimeoutError:
            fault = f"was not compiled within {COMPILING_S:g} s; make it smaller"
            raise FieldError("grammar", fault, "too_large") from None

    async def generate(
        self, prompt: Text | Sequence[int], options: GenerateOptions, on_trip: OnTrip | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of the continuation, as they become final.

        The last piece has the finish reason and the statistics. Closing the generator cancels the generation.

        Raises:
            RequestError: the prompt or the text does not fit, or an option is not known.
            RingLostError: the ring lost a node, or a stage failed.
            StageFailedError: the origin itself failed.
        """
        async with contextlib.aclosing(self.write(await self.begin(prompt, options), on_trip)) as pieces:
            async for piece in pieces:
                yield piece

    async def write(self, answer: Answer, on_trip: OnTrip | None = None) -> AsyncGenerator[Piece, None]:
        """Pieces of an answer from where it is now, as ``generate`` gives them.

        Where the ring was left there is no last piece, since another ring is to go on with the answer. An answer that
        nobody reads stands still, and goes on in another session once all that was written is read.
        """
        if answer.ending is not None:
            yield answer.finish(answer.ending)
            return
        while True:
            if self._lost is not None:
                raise self._lost.again()
            async with contextlib.aclosing(self._write_session(answer, on_trip)) as pieces:
                async for piece in pieces:
                    yield piece
                    if piece.finish_reason is not None:
                        return
            if self._is_left:
                return

    async def _write_session(self, answer: Answer, on_trip: OnTrip | None) -> AsyncGenerator[Piece, None]:
        """The pieces of one session; without a last one where it was cancelled."""
        session = next(self._sessions)
        events: asyncio.Queue[ev.OriginAction] = asyncio.Queue()
        self._answers[session] = _Writing(answer, events)
        if len(self._answers) > 1:
            for writing in self._answers.values():
                writing.answer.note_company()
        self._is_in_doubt.set()
        try:
            self._tell(ev.PromptSubmitted(session, answer.written, answer.options_left, answer.num_written))
            energy = self._energy.begin(session, time.monotonic())
            answer.begin(self._core.statistics(session), self._computed, energy, self._row_kind)
            while True:
                match await self._next_action(session, events):
                    case Piece() as notice:
                        yield notice
                    case ev.EmitTokens(_, tokens, logprobs):
                        yield answer.take(tokens, logprobs)
                        if answer.is_stopped:
                            yield self._finish(answer, "stop")
                            return
                    case ev.ReportTrip() as trip if on_trip is not None:
                        on_trip(trip)
                    case ev.FinishGeneration(_, "failed", error):
                        raise (self._lost or RingLostError(error or "the ring was lost")).again()
                    case ev.FinishGeneration(_, "refused", error):
                        raise RequestError(error or "a stage ended the session")
                    case ev.FinishGeneration(_, reason):
                        if reason != "cancelled":
                            yield self._finish(answer, reason)
                        return
        finally:
            del self._answers[session]
            self._energy.end(session, time.monotonic())
            self._tell(ev.GenerationCancelled(session))  # says nothing where it has ended by itself

    def _finish(self, answer: Answer, reason: str) -> Piece:
        """Its last piece, with all the energy that it took."""
        self._energy.settle(time.monotonic())
        return answer.finish(reason)

    async def _next_action(self, session: int, events: asyncio.Queue[ev.OriginAction]) -> ev.OriginAction | Piece:
        """What comes next for a session; a notice where nothing does for PROGRESS_S."""
        while True:
            if not events.empty():
                return events.get_nowait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROGRESS_S):
                    return await events.get()
            if (progress := self._core.prompt_progress(session)) is not None:
                notice = f"{progress[0]} of the prompt's {progress[1]} tokens are read"
                return Piece(text="", token_ids=[], notice=notice)

    def leave(self, lossy: Part | None = None) -> None:
        """End what runs without a last piece: another ring goes on with it. Nobody says goodbye to a ``lossy`` node."""
        self._is_left = True
        self._ended.set()
        if lossy is not None:
            self._abort_to({lossy})
        for session in list(self._answers):
            self._tell(ev.GenerationCancelled(session))

    async def _work(self) -> None:
        """Perform until something in the ring is lost; the reason then ends every generation."""
        try:
            await run_until_first_ends(
                self._ahead.deliver(self._take_credit),
                self._behind.deliver(self._take_chunk),
                self._jobs.wait_failed(),
                self._checks.wait_failed(),
                self._ask_when_in_doubt(),
                self._count_packets(),
                self._note_own_energy(),
                *(
                    self._read_control(number, stage, control)
                    for number, (stage, control) in enumerate(zip(self.stages, self._controls, strict=True))
                ),
            )
        except FlowspecError as cause:
            release_frames(cause)
            self._is_ending = True
            if self._timer is not None:  # where the core has raised the error, it hears of nothing but its end
                self._timer.cancel()
            loss = await loss_of(cause, self._controls, self._origin)
            _log.info("ring lost: %s", cause)
            self._give_up(loss)
        except Exception:  # a bug: nobody may wait for what will not come
            _log.exception("ring lost")
            text = "the origin failed, which is a bug in flowspec-edge; its log has the details"
            self._give_up(StageFailedError(text))

    def _give_up(self, loss: StageFailedError) -> None:
        """End every generation. Links to nodes that are gone are not waited for when they are closed."""
        self._is_ending, self._lost = True, loss
        if isinstance(loss, RingLostError):
            self._abort_to(loss.lost)
        self._tell(ev.RingLost(str(loss)))
        self._ended.set()

    def _abort_to(self, nodes: Collection[Part]) -> None:
        """Closing a link takes a second where its peer does not hear it."""
        for link in (*self._controls, self._ahead, self._behind):
            if link.peer in nodes:
                link.abort()

    async def _ask_when_in_doubt(self) -> None:
        """Ask all stages whether they are there each time that a text begins: nobody may have noticed a loss yet."""
        link, *_ = await next_silent(self._is_in_doubt, self._controls)
        raise LinkLostError(f"peer {link.peer}: no answer within {ANSWER_S:g} s")

    async def _count_packets(self) -> None:
        """Count what is lost of what the origin itself sends; stages tell what they do."""
        names = [stage.plan.node for stage in self.stages]
        ends = [*(link.peer for link in self._controls), names[0], names[-1]]
        counter = PacketCounter(*self._controls, self._ahead, self._behind)
        while True:
            for node, packets in zip(ends, await counter.count(), strict=True):
                self._note_packets(self._origin, node, *packets)

    def _note_packets(self, near: str, far: str, num_sent: int, num_lost: int) -> None:
        if (found := self._packet_loss.count(near, far, num_sent, num_lost, time.monotonic())) is not None:
            self._on_lossy(found)

    async def _note_own_energy(self) -> None:
        while True:
            if (taken := self._own_energy()) is not None:
                self._note_energy(self._origin, taken)
            await asyncio.sleep(NOTE_ENERGY_S)

    def _note_energy(self, node: str, taken: wire.EnergyTaken) -> None:
        self._energy.take(node, taken.machine, taken.joules, taken.watts, time.monotonic())

    def _neighbours(self, number: int) -> tuple[str, str]:
        """The names of the nodes ahead of a stage and behind it."""
        nodes = [self._origin, *(stage.plan.node for stage in self.stages), self._origin]
        return nodes[number + 2], nodes[number]

    async def _read_control(self, number: int, stage: RingStage, control: Link) -> None:
        while True:
            match await control.receive():
                case wire.SessionOpened(session, num_kept):
                    self._tell(ev.StageReady(session, number, num_kept))
                case wire.TappedRows(session, layer, ids, hidden):
                    self._tell(ev.TappedArrived(session, layer, ids, hidden))
                case wire.PacketsSent(num_ahead, num_lost_ahead, num_behind, num_lost_behind):
                    ahead, behind = self._neighbours(number)
                    self._note_packets(stage.plan.node, ahead, num_ahead, num_lost_ahead)
                    self._note_packets(stage.plan.node, behind, num_behind, num_lost_behind)
                case wire.EnergyTaken() as taken:
                    self._note_energy(stage.plan.node, taken)
                case wire.SessionFailure(session, reason):
                    if session in self._answers:
                        text = f"node {stage.plan.node}: {reason}"
                        self._answers[session].unread.put_nowait(ev.FinishGeneration(session, "refused", text))
                case wire.StageFailure() as failure:
                    raise stage_loss(stage.plan, failure)
                case message:
                    raise RingLostError(
                        f"peer {control.peer}: {type(message).__name__} came on a control link", failed=stage.plan.node
                    )

    def _take_credit(self, message: wire.Message) -> None:
        self._tell(ev.CreditArrived(wire.expect(message, wire.Credit, self._ahead.peer).num_chunks))

    def _take_chunk(self, message: wire.Message) -> None:
        if not isinstance(message, wire.ChunkMessage) or message.chunk.hidden is None:
            raise ProtocolError(f"peer {self._behind.peer}: hidden rows were expected, not {type(message).__name__}")
        if (kind := kind_of(message.chunk.hidden)) != self._row_kind:
            raise ProtocolError(f"peer {self._behind.peer}: rows in {kind} came, and {self._row_kind} was asked for")
        for work, passage in zip(self._work_of, message.chunk.passages, strict=False):
            work.add(passage)
        self._tell(ev.ChunkReturned(message.chunk))

    def _take_computed(self, ended: Future[ev.HeadFinished | ev.DraftFinished | ev.DraftsChecked]) -> None:
        """What a job has found; nobody is told of it where the ring ends."""
        if self._working is not None and not self._is_ending:
            self._tell(ended.result())

    def _tell(self, event: ev.OriginEvent, not_before: float = 0.0) -> None:
        now = max(time.monotonic(), not_before)
        actions = self._journal.handle(self._core, event, now)
        if self._lanes is not None:
            self._lanes.see(event, actions, now)
            if now - self._looked_at > LOOKED_S:
                self._lanes = None
        for action in actions:
            match action:
                case ev.SendChunk(chunk):
                    self._send(self._ahead, wire.ChunkMessage(self._num_sent, chunk))
                    self._num_sent += 1
                case ev.GrantCredit(num_chunks):
                    self._send(self._behind, wire.Credit(num_chunks))
                case ev.BroadcastAdvance(session, at, to):
                    self._broadcast(wire.AdvanceSession(session, at, to))
                case ev.BroadcastTurn(session, turn):
                    self._broadcast(wire.BeginTurn(session, turn))
                case ev.RunHead() | ev.RunDraft():
                    self._jobs.submit(self._take_computed, self._engine.run, action)
                case ev.CheckDrafts():
                    self._checks.submit(self._take_computed, self._engine.check, action)
                case ev.OpenSessions(spec):
                    self._open_draft_cache(spec)
                    self._broadcast(wire.OpenSession(spec))
                case ev.CloseSessions(session, is_kept, taken):
                    self._close_draft_cache(session, is_kept, taken)
                    self._broadcast(wire.CloseSession(session, is_kept))
                case ev.EmitTokens(session) | ev.ReportTrip(session) | ev.FinishGeneration(session):
                    if isinstance(action, ev.FinishGeneration) and action.error is not None:
                        # A ring that failed once is not trusted again.
                        self._is_ending, self._lost = True, self._lost or RingLostError(action.error)
                        self._ended.set()
                    if (writing := self._answers.get(session)) is not None:
                        writing.unread.put_nowait(action)
                        if writing.unread.qsize() > MAX_UNREAD:  # the actions that are left come first
                            asyncio.get_running_loop().call_soon(self._let_stand, session)
        self._arm_timer()

    def _open_draft_cache(self, spec: SessionSpec) -> None:
        if (drafter := self._engine.drafter) is not None:
            drafter.open(spec.session, spec.capacity)
            if spec.num_kept:
                self._jobs.submit(expect_done, drafter.take_over, spec.session, spec.kept, spec.num_kept)

    def _close_draft_cache(self, session: int, is_kept: bool, taken: Sequence[int]) -> None:
        if (drafter := self._engine.drafter) is None:
            return
        if is_kept:  # behind all its passes, and so is the other
            self._jobs.submit(expect_done, drafter.keep, session, taken)
        else:
            self._jobs.submit(expect_done, drafter.close, session)

    def _let_stand(self, session: int) -> None:
        """End a session whose answer nobody reads. It holds no cache then, and takes no time of others."""
        if session in self._answers:
            self._tell(ev.GenerationCancelled(session))

    def _broadcast(self, message: wire.Message) -> None:
        for control in self._controls:
            self._send(control, message)

    def _send(self, link: Link, message: wire.Message) -> None:
        # A link that has ended is noticed by its reader, which ends the ring; here nothing is left to do.
        with contextlib.suppress(LinkLostError, ProtocolError):
            self._board.send(link, message)

    def _arm_timer(self) -> None:
        """Each deadline is told once: one that has passed and still stands waits for another event."""
        deadline = self._core.next_deadline()
        if deadline == self._deadline:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._deadline = deadline
        if deadline is not None:
            delay = max(deadline - time.monotonic(), 0)
            # Timers may be early by the clock's resolution; the core is told a time at which the deadline has passed.
            self._timer = asyncio.get_running_loop().call_later(delay, self._tell, ev.DeadlinePassed(), deadline)
