"""A ring as its origin sees it: stages opened on nodes, links to all of them, and the generations that run through it.

The origin's core decides; this module performs its actions. A ring is used until something in it is lost, then closed for
good: whoever needs another one opens another one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from flowspec_edge.answer import Answer
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.drafting import DraftShape
from flowspec_edge.core.fetching import Source
from flowspec_edge.core.generation import TargetLimits
from flowspec_edge.core.origin import Origin
from flowspec_edge.core.placement import LeftOut, LoadedLayers, NodeOffer, Plan, PlannedStage, StagePlan, spread_layers
from flowspec_edge.core.prediction import Outcome, hold_against, name_link
from flowspec_edge.engine.drafters import Drafter
from flowspec_edge.engine.drafters.eagle3 import load_drafter
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    NotMeasuredError,
    ProtocolError,
    StageFailedError,
)
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import Link, open_link
from flowspec_edge.node import Board, Bundle, Node
from flowspec_edge.planning import Peer, PlanWishes, keep_placement, links_now, make_plan
from flowspec_edge.tasks import run_until_first_ends

STAGE_OPEN_S = 300.0
"""How long a stage may take to load its layers: 8 GB from an SD card at 40 MB/s takes 200 s."""

MAX_SOURCES = 64
"""Nodes to name as sources of weights: four times the largest ring, and 64 names of 60 bytes fit into a message."""

OnTrip = Callable[[ev.ReportTrip], None]
OnFetch = Callable[[StagePlan, int, int], None]
"""Told, while rings open, of a stage's weights how many bytes came and how many were missing."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RingStage:
    """One stage of an opened ring; ``load_ms`` is what the node took to load its layers, of which it fetched so many bytes, and
    ``held_bytes`` what it holds for them of the memory that it offers.
    """

    plan: StagePlan
    announcement: Announcement
    load_ms: int
    fetched_bytes: int = 0
    held_bytes: int = 0


class OriginEngine:
    """Head, drafter and tokenizer of a bundle: what the origin itself computes with."""

    def __init__(self, bundle: Bundle, num_threads: int, shape: DraftShape) -> None:
        directory, manifest = bundle.directory, bundle.manifest
        self.tokenizer = Tokenizer(directory / manifest.tokenizer.file)
        self.head = Head(directory, manifest, num_threads=num_threads)
        self.drafter: Drafter | None = None
        if manifest.drafter is not None:
            self.drafter = load_drafter(directory, manifest, self.head, k=shape.proposals, num_threads=num_threads)

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        if isinstance(job, ev.RunHead):
            return ev.HeadFinished(self.head.logits(job.hidden))
        assert self.drafter is not None, "the core drafts only where there is a drafter"
        return self.drafter.run(job)


LoadEngine = Callable[[Bundle, int, DraftShape], OriginEngine]
"""Makes the engine of a bundle, with that many threads."""


class Ring:
    """Opened stages of one bundle. Made by :func:`open_ring`."""

    def __init__(
        self,
        engine: OriginEngine,
        bundle: Bundle,
        stages: list[RingStage],
        controls: list[Link],
        board: Board | None = None,
    ) -> None:
        self.stages = stages
        self.plan: Plan | None = None
        """What the planner expects of it, where it was planned."""
        self._engine = engine
        self._board = board or Board()
        self._controls = controls
        manifest = bundle.manifest
        self._limits = TargetLimits(
            manifest.geometry.max_context, manifest.geometry.vocab_size, frozenset(manifest.eos_token_ids)
        )
        self._core = Origin(
            num_stages=len(stages),
            limits=self._limits,
            has_drafter=engine.drafter is not None,
            taps=tuple(manifest.drafter.taps) if manifest.drafter is not None else (),
        )
        self._answers: dict[int, asyncio.Queue[ev.OriginAction]] = {}
        self._sessions = itertools.count(1)
        self._jobs: asyncio.Queue[ev.RunHead | ev.RunDraft] = asyncio.Queue()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="origin")
        self._timer: asyncio.TimerHandle | None = None
        self._deadline: float | None = None  # that the timer was last set for
        self._num_sent = 0
        self._lost: str | None = None
        self._is_left = False
        self._ahead: Link
        self._behind: Link

    @property
    def is_open(self) -> bool:
        """False once something in the ring was lost, or it was left."""
        return self._lost is None and not self._is_left

    def outcome(self, statistics: dict[str, Any]) -> Outcome | None:
        """The plan's prediction against a finished generation; None where there was no plan, or the text was short."""
        if self.plan is None:
            return None
        num_tokens = int(statistics["completion_tokens"])
        return hold_against(self.plan, self._core.costs, float(statistics["tokens_per_s"]), num_tokens)

    def begin(self, prompt: str | Sequence[int], options: GenerateOptions) -> Answer:
        """An answer to a text or to token ids, of which nothing is written yet."""
        return Answer(self._engine.tokenizer, prompt, options)

    async def generate(
        self, prompt: str | Sequence[int], options: GenerateOptions, on_trip: OnTrip | None = None
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of the continuation, as they become final.

        The last piece has the finish reason and the statistics. Closing the generator cancels the generation.

        Raises:
            RequestError: the prompt does not fit, or an option is not known.
            StageFailedError: the ring lost a node, or a stage failed.
        """
        async with contextlib.aclosing(self.write(self.begin(prompt, options), on_trip)) as pieces:
            async for piece in pieces:
                yield piece

    async def write(self, answer: Answer, on_trip: OnTrip | None = None) -> AsyncGenerator[Piece, None]:
        """The same from where an answer is; without a last piece where the ring was left, and another one is to go on."""
        if self._lost is not None:
            raise StageFailedError(self._lost)
        session = next(self._sessions)
        events: asyncio.Queue[ev.OriginAction] = asyncio.Queue()
        self._answers[session] = events
        try:
            self._tell(ev.PromptSubmitted(session, answer.written, answer.options_left))
            answer.begin(self._core.statistics(session))
            while True:
                match await events.get():
                    case ev.EmitTokens(_, tokens):
                        yield answer.take(tokens)
                        if answer.is_stopped:
                            yield answer.finish("stop")
                            return
                    case ev.ReportTrip() as trip if on_trip is not None:
                        on_trip(trip)
                    case ev.FinishGeneration(_, "failed", error):
                        raise StageFailedError(error or "the ring was lost")
                    case ev.FinishGeneration(_, reason):
                        if reason != "cancelled" or not self._is_left:  # it may have ended before that
                            yield answer.finish(reason)
                        return
        finally:
            del self._answers[session]
            self._tell(ev.GenerationCancelled(session))  # says nothing where it has ended by itself

    def leave(self) -> None:
        """End what runs without a last piece: another ring goes on with it."""
        self._is_left = True
        for session in list(self._answers):
            self._tell(ev.GenerationCancelled(session))

    async def _run(self) -> None:
        """Perform until something in the ring is lost; the reason then ends every generation."""
        try:
            await run_until_first_ends(
                self._read_credits(),
                self._read_chunks(),
                self._compute(),
                *(
                    self._read_control(stage, control)
                    for stage, control in zip(self.stages, self._controls, strict=True)
                ),
            )
        except FlowspecError as cause:
            _log.info("ring lost: %s", cause)
            self._tell(ev.RingLost(f"{cause}; see that all its nodes run (flowspec devices), then repeat the request"))
        except Exception:  # a bug: nobody may wait for what will not come
            _log.exception("ring lost")
            self._tell(ev.RingLost("the origin failed, which is a bug in flowspec-edge; its log has the details"))

    async def _read_control(self, stage: RingStage, control: Link) -> None:
        while True:
            match await control.receive():
                case wire.SessionOpened(session):
                    self._tell(ev.StageReady(session))
                case wire.TappedRows(session, layer, ids, hidden):
                    self._tell(ev.TappedArrived(session, layer, ids, hidden))
                case wire.StageFailure(reason):
                    raise StageFailedError(
                        f"node {stage.plan.node}, layers [{stage.plan.start}, {stage.plan.stop}): {reason}"
                    )
                case message:
                    raise ProtocolError(f"peer {control.peer}: {type(message).__name__} came on a control link")

    async def _read_credits(self) -> None:
        while True:
            message = await self._ahead.receive()
            if not isinstance(message, wire.Credit):
                raise ProtocolError(f"peer {self._ahead.peer}: {type(message).__name__} came where Credit was expected")
            self._tell(ev.CreditArrived(message.num_chunks))

    async def _read_chunks(self) -> None:
        while True:
            message = await self._behind.receive()
            if not isinstance(message, wire.ChunkMessage) or message.hidden is None:
                raise ProtocolError(
                    f"peer {self._behind.peer}: hidden rows were expected, not {type(message).__name__}"
                )
            self._tell(ev.ChunkReturned(message.session, message.rows, message.hidden, message.passages))

    async def _compute(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            job = await self._jobs.get()
            self._tell(await loop.run_in_executor(self._executor, self._engine.run, job))

    def _tell(self, event: ev.OriginEvent, not_before: float = 0.0) -> None:
        if isinstance(event, ev.RingLost):
            self._lost = event.reason
        for action in self._core.handle(event, max(time.monotonic(), not_before)):
            match action:
                case ev.SendChunk(session, rows, num_wanted, hidden, turn, passages):
                    chunk = wire.ChunkMessage(self._num_sent, session, rows, num_wanted, hidden, turn, passages)
                    self._send(self._ahead, chunk)
                    self._num_sent += 1
                case ev.GrantCredit(num_chunks):
                    self._send(self._behind, wire.Credit(num_chunks))
                case ev.BroadcastAdvance(session, at, to):
                    self._broadcast(wire.AdvanceSession(session, at, to))
                case ev.BroadcastTurn(session, turn):
                    self._broadcast(wire.BeginTurn(session, turn))
                case ev.RunHead() | ev.RunDraft():
                    self._jobs.put_nowait(action)
                case ev.OpenSessions(session, capacity, cancels, is_tapped, num_prompt):
                    if self._engine.drafter is not None:
                        self._engine.drafter.open(session, capacity)
                    self._broadcast(wire.OpenSession(session, capacity, cancels, is_tapped, num_prompt))
                case ev.CloseSessions(session):
                    if self._engine.drafter is not None:
                        self._engine.drafter.close(session)
                    self._broadcast(wire.CloseSession(session))
                case ev.EmitTokens(session) | ev.ReportTrip(session) | ev.FinishGeneration(session):
                    if isinstance(action, ev.FinishGeneration) and action.error is not None:
                        self._lost = action.error  # a ring that failed once is not trusted again
                    if session in self._answers:
                        self._answers[session].put_nowait(action)
        self._arm_timer()

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

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)


@contextlib.asynccontextmanager
async def open_ring(
    node: Node,
    bundle: Bundle,
    found: Sequence[Announcement],
    load_engine: LoadEngine = OriginEngine,
    on_fetch: OnFetch = lambda plan, num_bytes, total_bytes: None,
    wishes: PlanWishes | None = None,
    plan: Plan | None = None,
) -> AsyncIterator[Ring]:
    """Spread the layers of ``bundle`` over the nodes that were found, open the stages, and keep the ring while in use.

    With a ``plan`` they are dealt like that, with ``wishes`` as the planner says, else equally.

    ``node`` is the origin's own listener, to which the last stage returns; nodes fetch from it what they lack.

    Raises:
        NodeUnavailableError: no node that was found can be reached, or none of them has the bundle.
        PlacementError: the layers do not fit into the nodes' memory.
        StageFailedError: a stage could not be opened.
    """
    name = f"{node.settings.name}-{secrets.token_hex(4)}"
    async with contextlib.AsyncExitStack() as closing:
        peers, refused = await _welcomed(node, bundle, found, name, closing)
        if plan is None and wishes is not None:
            plan = await _planned(node, bundle, peers, refused, wishes)
        plans = _deal(bundle, peers, refused, plan, is_any_precision=wishes is not None and wishes.is_any_precision)
        addresses = {announcement.node: announcement for announcement in found}
        links = [peers[part.node].link for part in plans]
        loop = asyncio.get_running_loop()
        closing.enter_context(node.expect(f"{name}/{len(plans)}"))
        engine = loop.run_in_executor(None, load_engine, bundle, node.settings.num_threads, DraftShape())
        try:
            opened = await _open_stages(node, bundle, name, plans, links, addresses, on_fetch)
        finally:
            await asyncio.wait({engine})
        stages = [
            RingStage(part, addresses[part.node], message.load_ms, message.fetched_bytes, message.memory_bytes)
            for part, message in zip(plans, opened, strict=True)
        ]
        ring = Ring(engine.result(), bundle, stages, links, node.board)
        if plan is not None:
            ring.plan = plan
            await asyncio.to_thread(keep_placement, bundle.digest, plan)
        closing.callback(ring._stop)
        first = addresses[plans[0].node]
        hello, credentials = node.hello(wire.DATA, f"{name}/0"), node.settings.credentials
        ring._ahead, _ = await open_link(first.host, first.port, hello, node=first.node, credentials=credentials)
        closing.push_async_callback(ring._ahead.close)
        ring._behind = await closing.enter_async_context(node.data_link(f"{name}/{len(stages)}"))
        running = asyncio.create_task(ring._run(), name=f"ring {name}")
        try:
            yield ring
        finally:
            running.cancel()
            await asyncio.wait({running})


def _deal(
    bundle: Bundle,
    peers: Mapping[str, Peer],
    refused: Sequence[LeftOut],
    plan: Plan | None,
    *,
    is_any_precision: bool,
) -> list[StagePlan]:
    """The layers as the plan says, in its precisions where it may choose them; without one in equal shares."""
    if plan is None:
        offers = [NodeOffer(name, peer.free_memory_bytes) for name, peer in peers.items()]
        return spread_layers(bundle.manifest.blocks, offers)
    _check_reached(plan.stages, peers, refused)
    return [replace(stage.stage_plan, precision=stage.precision if is_any_precision else "") for stage in plan.stages]


def _check_reached(
    stages: Sequence[StagePlan | PlannedStage], peers: Mapping[str, Peer], refused: Sequence[LeftOut]
) -> None:
    """Raises NodeUnavailableError where a node that serves, or is to serve, is not among those that answered."""
    reasons = {out.node: out.reason for out in refused}
    for stage in stages:
        if stage.node not in peers:
            raise NodeUnavailableError(reasons.get(stage.node, f"node {stage.node} is not found any more"))


async def plan_layers(
    node: Node,
    bundle: Bundle,
    found: Sequence[Announcement],
    wishes: PlanWishes,
    stages: Sequence[RingStage] = (),
) -> Plan:
    """The plan that a ring would be opened with now; nothing is loaded to serve. ``stages`` are those of a ring that it would
    take the place of unless it is clearly better: what they hold counts as free.

    Raises:
        NodeUnavailableError, PlacementError: as for :func:`open_ring`.
        NotMeasuredError: no node knows what a layer takes.
    """
    async with contextlib.AsyncExitStack() as closing:
        peers, refused = await _welcomed(node, bundle, found, "", closing)
        _check_reached([stage.plan for stage in stages], peers, refused)
        held = {stage.plan.node: stage.held_bytes for stage in stages}
        freed = {
            name: replace(peer, free_memory_bytes=peer.free_memory_bytes + held.get(name, 0))
            for name, peer in peers.items()
        }
        loaded = {
            stage.plan.node: LoadedLayers(stage.plan.start, stage.plan.stop, stage.plan.precision) for stage in stages
        }
        return await make_plan(node, bundle, freed, refused, wishes, loaded)


async def explain_outcome(node: Node, bundle: Bundle, ring: Ring, outcome: Outcome) -> Outcome:
    """Where the network was off: which link of the ring, by a new measurement of each with at most 1 MiB. Seconds, at most."""
    if not outcome.is_network or ring.plan is None:
        return outcome
    found = [stage.announcement for stage in ring.stages]
    async with contextlib.AsyncExitStack() as closing:
        try:
            peers, _ = await _welcomed(node, bundle, found, "", closing)
        except NodeUnavailableError:
            return outcome  # all of it has been lost meanwhile
        return name_link(outcome, ring.plan, await links_now(node, peers, ring.plan))


async def _planned(
    node: Node, bundle: Bundle, peers: dict[str, Peer], refused: list[LeftOut], wishes: PlanWishes
) -> Plan | None:
    """None, and equal shares, where nothing is known of the nodes; they learn from the session that follows."""
    try:
        return await make_plan(node, bundle, peers, refused, wishes)
    except NotMeasuredError as cause:
        _log.info("equal shares: %s", cause)
        return None


async def _welcomed(
    node: Node, bundle: Bundle, found: Sequence[Announcement], ring: str, closing: contextlib.AsyncExitStack
) -> tuple[dict[str, Peer], list[LeftOut]]:
    """The nodes that answer and have the bundle or may fetch it, in the order found, and the others with the reason."""
    hello, credentials = node.hello(wire.CONTROL, ring), node.settings.credentials

    async def open_to(peer: Announcement) -> tuple[Link, wire.Welcome]:
        answer = await open_link(peer.host, peer.port, hello, node=peer.node, credentials=credentials)
        closing.push_async_callback(answer[0].close)  # at once: whoever waits for the others may be cancelled
        return answer

    answers = await asyncio.gather(*(open_to(peer) for peer in found), return_exceptions=True)
    peers: dict[str, Peer] = {}
    refused: list[LeftOut] = []
    for announcement, answer in zip(found, answers, strict=True):
        if isinstance(answer, FlowspecError):
            refused.append(LeftOut(announcement.node, str(answer)))
            continue
        if isinstance(answer, BaseException):
            raise answer
        link, welcome = answer
        if bundle.digest not in welcome.bundles and not welcome.can_fetch:
            reason = (
                f"node {welcome.node} does not have this bundle and may not fetch it; start it with --bundle "
                f"{bundle.directory}, or without --no-cache"
            )
            refused.append(LeftOut(welcome.node, reason))
            continue
        peers[welcome.node] = Peer(link, announcement, welcome.free_memory_bytes)
    for out in refused:
        _log.warning("%s", out.reason)
    if found and not peers:
        raise NodeUnavailableError(f"none of the {len(found)} nodes found can serve: {refused[0].reason}")
    return peers, refused


async def _open_stages(
    node: Node,
    bundle: Bundle,
    ring: str,
    plans: list[StagePlan],
    links: list[Link],
    addresses: dict[str, Announcement],
    on_fetch: OnFetch,
) -> list[wire.StageOpened]:
    for hop, (plan, link) in enumerate(zip(plans, links, strict=True)):
        if hop + 1 < len(plans):
            ahead = addresses[plans[hop + 1].node]
            name, host, port = ahead.node, ahead.host, ahead.port
        else:
            name, host, port = node.settings.name, link.local_host, node.port
        sources = [Source(node.settings.name, link.local_host, node.port)]
        sources += [Source(peer.node, peer.host, peer.port) for peer in addresses.values() if peer.node != plan.node]
        texts = [source.to_text() for source in sources[:MAX_SOURCES]]
        link.send(
            wire.OpenStage(ring, hop, bundle.digest, plan.start, plan.stop, name, host, port, texts, plan.precision)
        )

    async def opened(plan: StagePlan, link: Link) -> wire.StageOpened:
        message = await _receive(plan, link)
        while isinstance(message, wire.StageProgress):
            on_fetch(plan, message.num_bytes, message.total_bytes)
            message = await _receive(plan, link)
        if isinstance(message, wire.StageFailure):
            raise StageFailedError(f"node {plan.node}, layers [{plan.start}, {plan.stop}): {message.reason}")
        if not isinstance(message, wire.StageOpened):
            raise ProtocolError(f"peer {plan.node}: {type(message).__name__} came where StageOpened was expected")
        return message

    waiting = [asyncio.create_task(opened(plan, link)) for plan, link in zip(plans, links, strict=True)]
    try:
        return await asyncio.gather(*waiting)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def _receive(plan: StagePlan, link: Link) -> wire.Message:
    """The next message of a stage that opens; a node that fetches says so often."""
    try:
        async with asyncio.timeout(STAGE_OPEN_S):
            return await link.receive()
    except TimeoutError:
        raise StageFailedError(
            f"node {plan.node}: layers [{plan.start}, {plan.stop}) were not loaded within {STAGE_OPEN_S:.0f} s; is the disk stuck?"
        ) from None
