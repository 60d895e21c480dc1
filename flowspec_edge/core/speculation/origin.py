"""The origin of a ring: its generations, the credit of the first hop, and one compute lane for head and drafter.

Generations share both, and those that have used the least of the ring come first. The head runs before the drafter, for
a verified token is worth more than a drafted one. Where there is one generation, its schedule alone decides when a
chunk leaves. Where there are several, chunks leave one by one, when the ring is ready for the next one; then those that
have a chunk offer it, and ``sharing.py`` says whose leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowspec_edge.config import GenerateOptions, UnfinishedText
from flowspec_edge.core.events import (
    ChunkReturned,
    CloseSessions,
    CreditArrived,
    DeadlinePassed,
    DraftFinished,
    DraftsChecked,
    FinishGeneration,
    GenerationCancelled,
    GrantCredit,
    HeadFinished,
    OpenSessions,
    OriginAction,
    OriginEvent,
    PromptSubmitted,
    RingLost,
    RunDraft,
    RunHead,
    SendChunk,
    StageReady,
    TappedArrived,
)
from flowspec_edge.core.limits import CREDITS_PER_HOP
from flowspec_edge.core.rows import SessionSpec
from flowspec_edge.core.speculation.acceptance import Acceptance
from flowspec_edge.core.speculation.credits import add_credits
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import Generation, TargetLimits
from flowspec_edge.core.speculation.kept_sessions import KeptSessions
from flowspec_edge.core.speculation.pictures import TextPicture, picture_of
from flowspec_edge.core.speculation.pipeline import RingCosts, Traffic
from flowspec_edge.core.speculation.prefill import RingTimes
from flowspec_edge.core.speculation.prompt_check import check_tokens, ending_of, room_behind
from flowspec_edge.core.speculation.schedules import find_schedule
from flowspec_edge.core.speculation.sharing import Shares
from flowspec_edge.core.speculation.statistics import GenerationStatistics

PROGRESS_TIMEOUT_S = 60.0
"""A ring from which nothing has come back for this long is lost. A 13B model on slow boards answers in seconds."""

TICK_S = 1e-6
"""What is due within this time is due now: times that are added up differ in their last digits."""


@dataclass(slots=True)
class _Running:
    generation: Generation
    missing: set[int]  # the stages that have not opened their cache
    progress_at: float
    label: str


class Origin:
    """All generations of one ring of ``num_stages`` stages.

    ``taps`` are the layers whose hidden rows the drafter wants, if it wants others than the last stage's. Sessions that
    have ended are kept for prompts that begin like their texts, in caches of ``max_kept_slots`` slots. ``expected`` is
    what is known of the ring's times before it has run, and ``num_blocks`` the blocks of each stage, behind each of
    which it may give up a forward.
    """

    def __init__(
        self,
        *,
        num_stages: int,
        limits: TargetLimits,
        has_drafter: bool,
        shape: DraftShape | None = None,
        taps: tuple[int, ...] = (),
        max_kept_slots: int = 0,
        expected: RingTimes | None = None,
        num_blocks: tuple[int, ...] | None = None,
    ) -> None:
        self._num_stages = num_stages
        self._limits = limits
        self._has_drafter = has_drafter
        self._taps = taps
        self._shape = shape or DraftShape()
        self._credits = CREDITS_PER_HOP
        costs = RingCosts(num_stages, expected, num_blocks)
        self._traffic, self._shares = Traffic(costs), Shares(costs)
        self._slot_at: float | None = None  # when the ring is ready for a chunk, where somebody waits for that
        self._acceptance = Acceptance()
        self._kept = KeptSessions(max_kept_slots)
        self._running: dict[int, _Running] = {}
        self._computing: int | None = None  # the session the compute lane works for

    def handle(self, event: OriginEvent, now: float) -> list[OriginAction]:
        """Take one event and answer with what to do.

        Raises:
            RequestError: the prompt does not fit, or names an unknown schedule; nothing has been started.
            ProtocolError: a stage granted more credits than there are, or sent rows other than were asked for.
        """
        actions: list[OriginAction] = []
        is_more_credit = False  # where there was some, and nothing else
        match event:
            case PromptSubmitted():
                self._submit(event, now, actions)
            case StageReady(session, stage, num_kept):
                self._take_ready(session, stage, num_kept, now, actions)
            case ChunkReturned(chunk):
                actions.append(GrantCredit(1))
                if chunk.session in self._running:
                    self._running[chunk.session].progress_at = now
                    self._running[chunk.session].generation.take_returned(chunk, now)
            case TappedArrived(session, layer, ids, hidden) if session in self._running:
                self._running[session].generation.take_tapped(layer, ids, hidden)
            case HeadFinished():
                if (generation := self._computed()) is not None:
                    actions += generation.take_drawn(event, now)
                    if generation.is_finished:
                        self._close(generation.session, now, actions)
            case DraftFinished():
                if (generation := self._computed()) is not None:
                    generation.take_draft(event, now)
            case DraftsChecked(session, num_allowed) if session in self._running:
                self._running[session].generation.take_checked(num_allowed)
            case CreditArrived(num_chunks):
                is_more_credit = self._credits > 0
                self._credits = add_credits(self._credits, num_chunks)
            case GenerationCancelled(session):
                self._finish(session, "cancelled", None, now, actions)
            case RingLost(reason):
                self._lose_ring(reason, now, actions)
            case DeadlinePassed():
                self._give_up_silent(now, actions)
        actions += map(CloseSessions, self._kept.expire(now))
        self._go_on(now, actions, is_more_credit=is_more_credit)
        return actions

    def next_deadline(self) -> float | None:
        """When to send ``DeadlinePassed`` unless something happens before."""
        times = [running.progress_at + PROGRESS_TIMEOUT_S for running in self._running.values()]
        if (expires_at := self._kept.next_deadline()) is not None:
            times.append(expires_at)
        if self._slot_at is not None:
            times.append(self._slot_at)
        elif self._credits:
            ready = [running.generation for running in self._running.values() if not running.missing]
            times += [at for generation in ready if (at := generation.next_deadline()) is not None]
        return min(times, default=None)

    @property
    def costs(self) -> RingCosts:
        """What the ring's stages, hops, head and drafter take, as measured so far."""
        return self._traffic.costs

    @property
    def kept(self) -> tuple[int, int]:
        """How many ended sessions are kept, and the slots of their caches."""
        return len(self._kept), self._kept.num_slots

    def statistics(self, session: int) -> GenerationStatistics:
        """Live counts of a running generation."""
        return self._running[session].generation.statistics

    def prompt_progress(self, session: int) -> tuple[int, int] | None:
        """How many rows of a session's prompt have entered the ring, and how many there are; None once it has ended."""
        running = self._running.get(session)
        return None if running is None else running.generation.prompt_progress

    def num_drafted(self, session: int) -> int:
        """Draft rows of a running generation, sent or not; 0 of one that does not run."""
        running = self._running.get(session)
        return len(running.generation.drafting) if running else 0

    def pictures(self) -> list[TextPicture]:
        """What all texts are at, those first that began first."""
        return [picture_of(running.generation, running.label) for running in self._running.values()]

    def ending_of(self, text: UnfinishedText, options: GenerateOptions) -> str | None:
        """Why a text that was written so far elsewhere has ended already: ``stop`` or ``length``, or None.

        Raises:
            RequestError: it has what is no token, or more tokens than it may have.
        """
        limits = self._limits
        room = room_behind(text.prompt, limits.max_context, limits.vocab_size)
        ends = options.end_token_ids(limits.eos_token_ids)
        ending = ending_of(text.tokens, min(options.max_new_tokens, room), ends)
        check_tokens("the text so far", text.tokens, limits.vocab_size)
        return ending

    def check(self) -> None:
        """Assert the invariants; run at every test's teardown."""
        assert self._credits >= 0
        self._kept.check()
        for running in self._running.values():
            running.generation.check()

    def _submit(self, event: PromptSubmitted, now: float, actions: list[OriginAction]) -> None:
        event.options.check_vocabulary(self._limits.vocab_size)
        generation = Generation(
            event.session,
            event.prompt,
            event.options,
            schedule=find_schedule(event.options.schedule)(self._num_stages),
            limits=self._limits,
            traffic=self._traffic,
            acceptance=self._acceptance,
            has_drafter=self._has_drafter,
            shape=self._shape,
            taps=self._taps,
            num_written=event.num_written,
        )
        reuse = self._kept.take(event.options.owner, event.prompt, has_drafts=generation.has_drafts)
        if reuse is not None:
            generation.begin(reuse.text, reuse.num_rows)
        self._running[event.session] = _Running(generation, set(range(self._num_stages)), now, event.options.label)
        self._shares.enter(event.session)
        spec = SessionSpec(
            event.session,
            generation.capacity,
            generation.cancels,
            generation.is_tapped,
            len(event.prompt),
            *((reuse.session, reuse.num_rows) if reuse is not None else ()),
        )
        actions.append(OpenSessions(spec))

    def _take_ready(self, session: int, stage: int, num_kept: int, now: float, actions: list[OriginAction]) -> None:
        """A stage has opened its cache. Where it no longer has the rows that it should, the session is cancelled, and
        begins anew as another one.
        """
        if (running := self._running.get(session)) is None:
            return
        running.missing.discard(stage)
        if running.generation.statistics.num_rows_kept != num_kept:
            running.generation.statistics.num_rows_kept = 0
            self._finish(session, "cancelled", None, now, actions)

    def _computed(self) -> Generation | None:
        """The generation whose computation has finished, unless it is gone."""
        session, self._computing = self._computing, None
        running = self._running.get(session) if session is not None else None
        return running.generation if running else None

    def _finish(self, session: int, reason: str, error: str | None, now: float, actions: list[OriginAction]) -> None:
        if session in self._running:
            actions.append(FinishGeneration(session, reason, error))
            self._close(session, now, actions)

    def _give_up_silent(self, now: float, actions: list[OriginAction]) -> None:
        """End all generations where for one of them nothing came back for too long: the ring is lost."""
        if any(running.progress_at + PROGRESS_TIMEOUT_S <= now for running in self._running.values()):
            reason = f"nothing came back from the ring for {PROGRESS_TIMEOUT_S:.0f} s; check its nodes"
            self._lose_ring(reason, now, actions)

    def _lose_ring(self, reason: str, now: float, actions: list[OriginAction]) -> None:
        self._kept.stop()
        for session in list(self._running):
            self._finish(session, "failed", reason, now, actions)

    def _close(self, session: int, now: float, actions: list[OriginAction]) -> None:
        generation, gone = self._running.pop(session).generation, [session]
        generation.pipeline.leave(now)
        self._shares.leave(session)
        if self._kept.is_on and (ended := generation.end()) is not None:
            text, taken, told = ended
            gone = self._kept.keep(session, generation.owner, text, now)
            if session not in gone:
                actions += [*told, CloseSessions(session, is_kept=True, taken=taken)]
        actions += map(CloseSessions, gone)

    def _ready_generations(self) -> list[Generation]:
        """Those for which every stage has opened its cache, the one first that has used the least of the ring."""
        running = [self._running[session] for session in self._shares.in_order()]
        return [one.generation for one in running if not one.missing]

    def _go_on(self, now: float, actions: list[OriginAction], *, is_more_credit: bool) -> None:
        """Do all that can be done now. With more credit than there was, who waits for a time still waits for it."""
        ready = self._ready_generations()
        self._begin_turns(ready, actions)
        if not (is_more_credit and self._slot_at is None and all(one.waits(now) for one in ready)):
            ready = self._send_chunks(ready, now, actions)
        self._begin_turns(ready, actions)  # a turn does not wait for a chunk that has no credit now
        checks = [running.generation.next_check() for running in self._running.values()]
        actions += [check for check in checks if check is not None]
        self._compute(ready, now, actions)

    def _begin_turns(self, ready: Sequence[Generation], actions: list[OriginAction]) -> None:
        for generation in ready:
            while (turn := generation.next_turn(has_credit=self._credits > 0)) is not None:
                actions.append(turn)

    def _send_chunks(self, ready: list[Generation], now: float, actions: list[OriginAction]) -> list[Generation]:
        """Returns those that are ready in the order that they have then."""
        self._slot_at = None
        while self._credits and ready:
            if len(ready) > 1 and self._traffic.slot_at > now + TICK_S:
                self._slot_at = self._traffic.slot_at
                break
            offered = {one.session: offer for one in ready if (offer := one.offer(now)) is not None}
            if not offered:
                break
            session = self._shares.choose(offered)
            running, offer = self._running[session], offered[session]
            if not offer.ids:
                if len(ready) == 1 and self._credits < CREDITS_PER_HOP:
                    break  # a chunk of the prompt waits at the first stage: another session would come behind two
                running.progress_at = now  # the ring takes a prompt, of which nothing may come back before its end
            chunk = running.generation.send(offer, now)
            self._shares.charge(session, len(chunk.rows))
            self._credits -= 1
            actions.append(SendChunk(chunk))
            ready = self._ready_generations()
        return ready

    def _compute(self, ready: Sequence[Generation], now: float, actions: list[OriginAction]) -> None:
        if self._computing is not None:
            return
        jobs: tuple[Callable[[Generation], RunHead | RunDraft | None], ...] = (
            lambda generation: generation.next_head(now),
            lambda generation: generation.next_draft(now),
        )
        for job in jobs:
            for generation in ready:
                action = job(generation)
                if action is not None:
                    self._computing = generation.session
                    actions.append(action)
                    return
