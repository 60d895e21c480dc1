"""Generations of several users over one ring, which they share.

Texts go on over the next ring where they were. ``core/planning/recovery.py`` decides what becomes of a text whose ring
was lost, and this module performs it; ``upkeep.py`` keeps the ring.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Self

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, Piece, Prompt
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning import recovery as rc
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    PlacementError,
    ProtocolError,
    RingLostError,
    StageFailedError,
)
from flowspec_edge.files import open_record
from flowspec_edge.node.node import Node, ask_nodes
from flowspec_edge.origin.answer import Answer
from flowspec_edge.origin.dialogue import OnFetch
from flowspec_edge.origin.opening import explain_outcome
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.remembered import learn_draft_gain
from flowspec_edge.origin.ring import Ring
from flowspec_edge.origin.standby import Standbys
from flowspec_edge.origin.status import BoardWatch, ServiceStatus
from flowspec_edge.origin.upkeep import NO_ROOM, Boards, RingUpkeep, Search
from flowspec_edge.origin.view import Fetches, RingView, ServiceView, WorkView

WAIT_FOR_BOARDS_S = 60.0
"""How long a text waits for a board: a Raspberry Pi that lost its power is back within 40 s."""
IDLE, OPENING = "no ring is open; the next text opens one", "a ring is opened: boards are asked, and load layers"
NOTICE_S = 3.0
"""How often a text that waits says so; clients and proxies take a minute of silence for an end."""


class GenerationService:
    """Answers prompts as long as its ``async with`` block lasts, by rings that it opens and closes.

    Args:
        node, bundle, search, on_fetch, plan_options, boards, moves, moves_at_once, has_standbys, kept_bytes: as for
            :class:`RingUpkeep`.
        names_links: where only that can tell why a ring was slow, measure its links before the last piece is given.
        wait_for_boards_s: how long a text waits for a board where those that are left have no room for all layers.
    """

    def __init__(
        self,
        node: Node,
        bundle: Bundle,
        search: Search,
        *,
        on_fetch: OnFetch = lambda plan, num_bytes, total_bytes: None,
        plan_options: PlanOptions | None = None,
        boards: Boards | None = None,
        moves: bool = True,
        moves_at_once: bool = False,
        names_links: bool = False,
        wait_for_boards_s: float = WAIT_FOR_BOARDS_S,
        has_standbys: bool = False,
        kept_bytes: int | None = 0,
    ) -> None:
        self._node = node
        self._bundle = bundle
        self._wait_for_boards_s = wait_for_boards_s
        self._names_links = names_links
        self._writer: Ring | None = None
        self._boards = boards
        self._watch = BoardWatch(self._ask_boards)
        self._tokenizer: Tokenizer | None = None
        self._fetches = Fetches(on_fetch)
        self._upkeep = RingUpkeep(
            node,
            bundle,
            search,
            on_fetch=self._fetches.note,
            plan_options=plan_options,
            boards=boards,
            moves=moves,
            moves_at_once=moves_at_once,
            has_standbys=has_standbys,
            kept_bytes=kept_bytes,
        )

    async def __aenter__(self) -> Self:
        await self._upkeep.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._watch.close()
        await self._upkeep.__aexit__()
        self._writer = None

    @property
    def model(self) -> str:
        """The name of the model that answers."""
        return self._bundle.manifest.name

    @property
    def bundle(self) -> str:
        """The digest of its bundle."""
        return self._bundle.digest

    @property
    def ring(self) -> Ring | None:
        """The ring that is open, or was open until something in it was lost."""
        return self._upkeep.ring

    def status(self) -> ServiceStatus:
        """Whether texts can be written now, and by whom. It is told at once, from what is known."""
        ring, trouble = self._upkeep.ring, self._upkeep.trouble
        if ring is None or not ring.is_open:
            reason = trouble or (OPENING if self._upkeep.is_opening else IDLE)
            return ServiceStatus(is_ready=not trouble, reason=reason, boards=self._watch.known)
        sent, received = ring.num_bytes
        return ServiceStatus(
            is_ready=True,
            reason="",
            stages=ring.status,
            boards=self._watch.known,
            sent_bytes=sent,
            received_bytes=received,
            kept=ring.kept,
        )

    def view(self) -> ServiceView:
        """All that is shown of it, but for what moves: that is ``ring.look()``."""
        ring, status = self._upkeep.ring, self.status()
        return ServiceView(
            model=self.model,
            drafts=self._bundle.manifest.drafts,
            origin=self._node.settings.name,
            is_ready=status.is_ready,
            reason=status.reason,
            ring=RingView.of(ring) if ring is not None and ring.is_open else None,
            boards=status.boards,
            lost=sorted(self._upkeep.lost),
            fetches=self._fetches.under_way if self._upkeep.is_opening else [],
        )

    def look(self, label: str, since: float) -> WorkView | None:
        """What the ring does now, as a viewer of that label is shown it, with what ended behind ``since``; None while
        none is open.
        """
        ring = self._upkeep.ring
        if ring is None or not ring.is_open:
            return None
        bytes_of = ring.tokenizer.bytes_of
        return WorkView.of(ring.look(), lambda token: bytes_of(token).decode(errors="replace"), label, since)

    async def _ask_boards(self) -> Sequence[dict[str, Any]]:
        settings = self._node.settings
        found = [] if self._boards is None else self._boards.found
        return await ask_nodes(found, settings.cluster, settings.credentials)

    @property
    def standbys(self) -> Standbys:
        """Which boards stand by for which."""
        return self._upkeep.standbys

    @property
    def writer(self) -> Ring | None:
        """The ring that wrote or writes the latest text; the service may have left it since."""
        return self._writer

    async def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer: that of the ring, or one that is loaded while there is none, on a thread.

        Raises:
            BundleError: it cannot be read.
        """
        if self.ring is not None:
            self._tokenizer = self.ring.tokenizer
        if self._tokenizer is None:
            manifest = self._bundle.manifest
            path = self._bundle.directory / manifest.tokenizer.file
            self._tokenizer = await asyncio.to_thread(Tokenizer, path, manifest.geometry.max_context)
        return self._tokenizer

    async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer. Where nodes are lost it goes on over those that are left, and waits for boards where
        those are too few; pieces with a ``notice`` then say so.

        The statistics of the last piece hold ``prediction``: what was expected of the ring, beside what it brought.

        Raises:
            RequestError: the prompt does not fit, or an option is not known.
            NodeUnavailableError, PlacementError: there is no room for all layers.
            StageFailedError: one ring after another was lost, or the origin itself failed.
        """
        decide, answer, noticed_at = self._decisions(), None, -math.inf
        self._upkeep.begin_session()
        try:
            while True:
                try:
                    ring = await self._upkeep.usable_ring()
                    decide(rc.RingOpened())
                    answer = answer or await ring.begin(prompt, options)
                    self._writer = ring
                    async with contextlib.aclosing(self._write(ring, answer)) as pieces:
                        async for piece in pieces:
                            yield piece
                            if piece.finish_reason is not None:
                                return
                    continue  # the text is unfinished, since the ring was left meanwhile
                except FlowspecError as cause:
                    event = self._event_of(cause, 0 if answer is None else len(answer.written))
                    if event is None:
                        raise
                    (action,) = decide(event)
                    if isinstance(action, rc.GiveUp):
                        raise self._final_error(cause, action.reason) from cause
                if isinstance(action, rc.WaitForBoards):
                    if time.monotonic() - noticed_at >= NOTICE_S:
                        noticed_at = time.monotonic()
                        yield Piece(text="", token_ids=[], notice=f"waiting for boards: {event.reason}")
                    await self._upkeep.wait_for_boards(action.until)
        finally:
            self._upkeep.end_session()

    def _decisions(self) -> Callable[[rc.RecoveryEvent], list[rc.RecoveryAction]]:
        """What is to become of one text: told what happened, it answers what to do."""
        recovery = rc.Recovery(self._wait_for_boards_s)
        journal = Journal("recovery", {"wait_s": recovery.wait_s}, open_record("recovery"))
        return lambda event: journal.handle(recovery, event, time.monotonic())

    def _event_of(self, cause: FlowspecError, num_tokens: int) -> rc.RingFailed | rc.RoomMissing | None:
        """What a text that met this error is to be told; None where it is the request's fault, or a bug."""
        if isinstance(cause, NO_ROOM):
            return rc.RoomMissing(f"{self._upkeep.homeless()}{cause}", self._upkeep.had_room)
        if isinstance(cause, RingLostError | LinkLostError | ProtocolError):
            return rc.RingFailed(num_tokens, str(cause.__cause__ or cause))
        return None

    def _final_error(self, cause: FlowspecError, reason: str) -> FlowspecError:
        if str(cause) == reason:
            return cause
        return PlacementError(reason) if isinstance(cause, NO_ROOM) else StageFailedError(reason)

    async def _write(self, ring: Ring, answer: Answer) -> AsyncGenerator[Piece, None]:
        """The pieces that this ring writes, with its prediction. The next plan knows what drafts brought."""
        async with contextlib.aclosing(ring.write(answer)) as pieces:
            async for piece in pieces:
                if piece.statistics is not None:
                    outcome = ring.outcome(answer, piece.statistics)
                    if outcome is not None and self._names_links:
                        outcome = await explain_outcome(self._node, self._bundle, ring, outcome)
                    if outcome is not None and outcome.gain is not None:
                        digest, gain = self._bundle.digest, outcome.gain
                        await asyncio.to_thread(learn_draft_gain, digest, gain, answer.num_written)
                    piece.statistics["prediction"] = outcome.to_report() if outcome else None
                yield piece
