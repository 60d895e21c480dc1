"""The ring of a service: opened when a text needs it, opened anew when something in it was lost, and moved when boards
have come or got hot.

``core/planning/rebalancing.py`` decides when the ring moves; this module performs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, Self

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning import rebalancing as rb
from flowspec_edge.core.planning import recovery as rc
from flowspec_edge.core.planning.losses import Part, Way
from flowspec_edge.core.planning.packet_loss import Lossy, slowed
from flowspec_edge.core.planning.placement import Plan, StagePlan
from flowspec_edge.errors import FlowspecError, NodeUnavailableError, PlacementError, RingLostError
from flowspec_edge.files import open_record
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.node import Node
from flowspec_edge.origin.dialogue import OnFetch, is_whole
from flowspec_edge.origin.engine import KeptEngine
from flowspec_edge.origin.losses import Losses
from flowspec_edge.origin.opening import open_ring, plan_layers
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.ring import Ring, RingStage
from flowspec_edge.origin.shares import check_room
from flowspec_edge.origin.standby import Standbys

NO_ROOM = (NodeUnavailableError, PlacementError)
"""What an opening raises where the nodes that are there are none, or too small."""

_log = logging.getLogger(__name__)


class Boards(Protocol):
    """The nodes that are there at any time, for a ring that follows them. ``Directory`` is one."""

    @property
    def found(self) -> list[Announcement]: ...

    async def wait_for(
        self, is_enough: Callable[[list[Announcement]], bool], timeout_s: float | None
    ) -> list[Announcement]: ...

    def doubt(self, node: str) -> None: ...

    def hear_of(self, board: Announcement) -> None: ...


Search = Callable[[], Awaitable[Sequence[Announcement]]]
"""Finds the nodes to open a ring with; raises NodeUnavailableError where there are none."""


class RingUpkeep:
    """The ring that texts share, as long as the ``async with`` block lasts.

    Args:
        node: the origin's own listener.
        bundle: the model.
        search: asked for nodes each time a ring is opened.
        on_fetch, plan_options: as for :func:`open_ring`.
        boards: where given, the ring moves to a better plan when other nodes are there than those it was opened
            with, or when a node got hot. They are also asked when the ring was lost.
        moves: whether the ring moves for other nodes at all; it does where it loses packets.
        moves_at_once: move while texts are written, which go on over the new ring; else only when none is.
        has_standbys: have boards stand by for each other while no text is written.
        kept_bytes: as for :func:`open_ring`.
    """

    def __init__(
        self,
        node: Node,
        bundle: Bundle,
        search: Search,
        *,
        on_fetch: OnFetch,
        plan_options: PlanOptions | None,
        boards: Boards | None,
        moves: bool,
        moves_at_once: bool,
        has_standbys: bool,
        kept_bytes: int | None,
    ) -> None:
        self._node, self._bundle, self._search = node, bundle, search
        self._on_fetch, self._boards = on_fetch, boards
        self._plan_options, self._searches, self._kept_bytes = plan_options, _of_search(plan_options), kept_bytes
        itself: dict[str, Any] = {"at_once": moves_at_once, "follows": moves}
        self._core = rb.Rebalancing(**itself)
        self._journal = Journal("rebalancing", itself, open_record("rebalancing"))
        self._engine = KeptEngine()
        self._ring: Ring | None = None
        self._next_plan: Plan | None = None
        self._refused: frozenset[str] = frozenset()  # boards that a ring could not be moved to, while they are there
        self._dealt: frozenset[str] = frozenset()  # boards that were there when the ring was opened, and still are
        self._served: Sequence[RingStage] = ()  # the stages of the latest ring
        self._around: frozenset[Way] = frozenset()  # the cut ways that the latest ring was opened around
        self._lost = Losses(node.settings, self._try_way, self._take_back, self._take_way_back)
        self.standbys = Standbys(node, bundle, self._searches, is_wanted=has_standbys)
        self._mourned: RingLostError | None = None  # the latest loss whose nodes were noted
        self._lossy: Lossy | None = None  # a part of the ring that loses packets, of which no plan knows yet
        self._given_up: Part | None = None  # the one that the latest plan does without
        self._changed = asyncio.Event()  # boards have come or left
        self._trouble = ""  # why the latest opening failed
        self._cramped: tuple[float, FlowspecError] | None = None  # until when, and why, no opening is tried
        self._opening = asyncio.Lock()
        self._is_in_doubt = asyncio.Event()  # whether all boards of a ring that opens are there
        self._closing = contextlib.AsyncExitStack()  # closes the ring
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        if self._boards is not None:
            self._spawn(self._watch(self._boards), "watching for boards")
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._timer is not None:
            self._timer.cancel()
        await self._lost.close()
        await self.standbys.close()
        self._ring = None
        await self._closing.aclose()
        await asyncio.to_thread(self._engine.close)

    @property
    def ring(self) -> Ring | None:
        """The ring that is open, or was open until something in it was lost."""
        return self._ring

    @property
    def is_opening(self) -> bool:
        """Whether a ring is opened or moved now."""
        return self._opening.locked()

    @property
    def trouble(self) -> str:
        """Why no text can be written now, as far as is known; empty where there is no reason."""
        if self._ring is not None and self._ring.is_open:
            return ""
        if self._boards is not None and not self._boards.found:
            return "no node answers; start one with: flowspec node"
        return self._trouble

    @property
    def lost(self) -> frozenset[str]:
        """The nodes that rings do without until they answer."""
        return self._lost.names

    @property
    def had_room(self) -> bool:
        """Whether there has been a ring, or a board was lost while the first one opened: boards may come back."""
        return bool(self._served or self._lost.names)

    def begin_session(self) -> None:
        """A text is to be written; the ring stays for it, where it does not move at once."""
        self.standbys.begin_text()
        self._tell(rb.SessionBegan())

    def end_session(self) -> None:
        """A text has ended."""
        self._tell(rb.SessionEnded())
        self.standbys.end_text()

    async def usable_ring(self) -> Ring:
        """The ring that is open; where none is, one that is opened now."""
        self._is_in_doubt.set()
        async with self._opening:
            if self._ring is None or not self._ring.is_open:
                await self._close_lost_ring()
                if self._cramped is not None and time.monotonic() < self._cramped[0]:
                    raise self._cramped[1].again()  # of several texts that wait one has just tried
                try:
                    found = await self._find()
                    if not await self._take_over(found):
                        await self._open_trusted(found)
                    self._trouble = ""
                except NO_ROOM as cause:
                    self._trouble = f"{self.homeless()}{cause}"
                    again = time.monotonic() + rc.RETRY_S / 2
                    self._cramped = (again, cause.again()) if self.had_room else None
                    raise
            assert self._ring is not None
            return self._ring

    def homeless(self) -> str:
        """The layers whose nodes were lost, for the beginning of an error's text."""
        there = _names(self._usable(self._boards)) if self._boards is not None else None
        lost = self._lost.names
        gone = [
            stage.plan
            for stage in self._served
            if (stage.plan.node in lost if there is None else stage.plan.node not in there)
        ]
        return f"layers {', '.join(map(_describe_home, gone))} have no home: " if gone else ""

    async def wait_for_boards(self, until: float) -> None:
        """Wait until a board has come or left, or until then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(until - time.monotonic()):
                self._changed.clear()
                await self._changed.wait()

    async def _find(self) -> list[Announcement]:
        """The boards to open a ring with: for the first one those that a search finds, later those that are left."""
        found = self._boards.found if self._boards is not None and self._served else await self._search()
        there = self._lost.answering_of(found)
        if not there:
            raise NodeUnavailableError(f"no node is left; lost: {', '.join(sorted(self._lost.names)) or 'all of them'}")
        return there

    async def _take_over(self, found: Sequence[Announcement]) -> bool:
        """Open the ring for which layers stand by, where one board was lost and they do."""
        left, ways = self._lost.left_of(found), self._lost.ways
        plan = self.standbys.take_over(_names(left), ways)
        if plan is None:
            return False
        try:
            await self._open_ring(left, plan, ways)
        except NO_ROOM as cause:
            _log.warning("a ring is planned anew, since boards that stood by cannot be used: %s", cause)
            return False
        return True

    async def _open_trusted(self, found: Sequence[Announcement]) -> None:
        """Open a ring without the boards that none could be moved to, and without nodes and ways that are doubted;
        where there is no room for that, with all that answer.
        """
        trusted = [board for board in self._lost.left_of(found) if board.node not in self._refused]
        ways, missing = self._lost.ways, self._lost.missing_ways
        try:
            await self._open_ring(trusted, None, ways)
        except NO_ROOM as cause:
            if len(trusted) == len(found) and ways == missing:
                raise
            _log.warning("all boards are tried, since no ring can be opened with those that served: %s", cause)
            self._refuse(frozenset())
            await self._open_ring(self._lost.answering_of(found), None, self._lost.missing_ways)

    async def _open_ring(self, found: Sequence[Announcement], plan: Plan | None, cut: frozenset[Way]) -> None:
        opening = open_ring(
            self._node,
            self._bundle,
            found,
            load_engine=self._engine.load,
            on_fetch=self._on_fetch,
            plan_options=self._plan_options,
            plan=plan,
            on_lost=lambda board: self._lose([board]),
            cut=cut,
            is_urgent=bool(self._served),
            is_in_doubt=self._is_in_doubt,
            on_lossy=self._note_lossy,
            kept_bytes=self._kept_bytes,
        )
        try:
            self._ring = await self._closing.enter_async_context(opening)
        except RingLostError as cause:
            self._blame(cause, found)
            raise
        self._dealt, self._around = _names(self._lost.answering_of(found)), cut
        self._served = self._ring.stages
        _log.info("the ring is open: %s", ", ".join(_describe(stage.plan) for stage in self._served))
        self._spawn(self._watch_ring(self._ring), "watching the ring")
        self.standbys.follow(self._ring, self._lost.left_of(found), self._lost.ways)
        self._tell(rb.RingOpened(self._dealt))

    async def _close_lost_ring(self) -> None:
        if self._ring is not None:
            await self._ring.wait_ended()  # whoever is lost is known by then
            self._mourn(self._ring)
        await self._close_ring()

    async def _close_ring(self) -> None:
        self._ring = self._lossy = None
        self.standbys.pause()
        self._tell(rb.RingClosed())
        await self._closing.aclose()

    # ------------------------------------------------------------------- losing

    async def _watch_ring(self, ring: Ring) -> None:
        """Note who is lost as soon as a ring is, so that nobody waits for them who asks later."""
        await ring.wait_ended()
        self._mourn(ring)

    def _mourn(self, ring: Ring) -> None:
        """Note, once, whom the ring has lost."""
        loss = ring.loss
        if loss is None or loss is self._mourned:
            return
        self._mourned = loss
        whom = ", ".join(loss.lost) or loss.failed or (" to ".join(loss.cut) if loss.cut else "nobody known")
        _log.warning("the ring was lost (%s); its texts go on with who is left: %s", whom, loss.__cause__ or loss)
        found = [stage.announcement for stage in ring.stages]
        self._blame(loss, found)
        self._lose([board for board in found if board.node in loss.lost])

    def _blame(self, loss: RingLostError, found: Sequence[Announcement]) -> None:
        """Note which stage failed or which way is cut, where the loss of a ring came from that."""
        self._lost.fail_if_known(loss.failed, found)
        if loss.cut is not None:
            self._lost.cut(*loss.cut, found)

    def _note_lossy(self, found: Lossy) -> None:
        """Have a ring planned without this part; its texts go on over that one, where it is expected to be quicker."""
        own = self._node.settings.name
        _log.warning("%s loses %.0f %% of its packets", _describe_part(found.part, own), 100 * found.share)
        if self._ring is not None and found.part != own:
            self._lossy = found
            self._lost.lose_packets(found.part, [stage.announcement for stage in self._ring.stages])
            self._report_boards()
            self._tell(rb.PacketsLost())

    def _lose(self, boards: Sequence[Announcement]) -> None:
        """These do not answer: they are planned without until they do."""
        for board in boards:
            _log.warning("%s is lost; rings do without it until it answers", board.node)
        if self._boards is not None:
            for board in boards:
                self._boards.doubt(board.node)
        self._lost.lose(boards)
        self._report_boards()

    def _take_back(self, board: Announcement) -> None:
        """A node that was lost may serve again."""
        if self._boards is not None:
            self._boards.hear_of(board)
        self._wake()
        self._report_boards()

    async def _try_way(self, way: Way) -> bool:
        there = self._boards.found if self._boards is not None else [stage.announcement for stage in self._served]
        return await is_whole(self._node.settings, self._bundle, there, way)

    def _take_way_back(self) -> None:
        """A way that was cut may be used again."""
        self._wake()
        self._tell(rb.WayReturned())

    def _wake(self) -> None:
        """Let texts that wait for boards try again."""
        self._cramped, self._trouble = None, ""
        self._changed.set()

    # ------------------------------------------------------------------ moving

    def _tell(self, event: rb.RebalancingEvent) -> None:
        """Tell the core what happened, start what it asks for, and set the timer to its next deadline."""
        if self._boards is None:
            return
        for action in self._journal.handle(self._core, event, time.monotonic()):
            match action:
                case rb.MakePlan():
                    self._spawn(self._plan(self._boards), "planning anew")
                case rb.MoveRing():
                    self._spawn(self._move(self._boards), "moving the ring")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (deadline := self._core.next_deadline()) is not None:
            delay = max(deadline - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tell, rb.TimePassed())

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._end_task)

    def _end_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed, and is given up; please report this", task.get_name(), exc_info=error)

    async def _watch(self, boards: Boards) -> None:
        """Tell the core each time that boards have come or left."""
        seen: frozenset[str] | None = None
        while True:
            found = await boards.wait_for(_differs_from(seen), None)
            seen = _names(found)
            self._wake()
            if self._ring is not None and self._ring.is_open:
                self.standbys.follow(self._ring, self._usable(boards), self._lost.ways)
            self._dealt &= seen  # a board that left and came back gets another chance
            self._refuse(self._refused & seen)

    async def _plan(self, boards: Boards) -> None:
        """Make a plan, and tell the core whether it is better than the ring that is open."""
        ring, found, is_better = self._ring, self._usable(boards), False
        lossy, self._lossy = self._lossy, None
        self._next_plan, self._given_up = None, lossy.part if lossy is not None else None
        try:
            if ring is not None and lossy is not None:
                self._next_plan, is_better = await self._plan_without(lossy, ring, found)
            elif ring is not None and self._searches is not None:
                ways = self._lost.ways
                plan = await plan_layers(self._node, self._bundle, found, self._searches, ring.stages, ways)
                if is_served := _has_plan(ring, plan):
                    ring.plan = plan  # with what is known by now
                is_better = not plan.is_kept and not is_served
                self._next_plan = plan
            elif ring is not None:  # equal shares: a ring over more boards counts as better
                is_around = bool(self._around - self._lost.ways)  # more than it need be
                serving = frozenset(stage.plan.node for stage in ring.stages)
                is_better = bool(_names(found) - (serving if is_around else self._dealt))
        except FlowspecError as cause:
            _log.warning("the ring stays as it is, since it cannot be planned anew: %s", cause)
        except Exception:  # a bug; the core has to hear of it too, or it would never ask for another plan
            _log.exception("the ring stays as it is, since planning anew failed; please report this")
        is_better &= ring is self._ring and ring is not None and ring.is_open  # the plan was compared with that ring
        is_better &= self._lossy is None  # or it is older than what is known of the ring's losses
        self._tell(rb.PlanMade(_names(found), is_better, _used(self._next_plan, found)))

    async def _plan_without(self, lossy: Lossy, ring: Ring, found: Sequence[Announcement]) -> tuple[Plan | None, bool]:
        """A plan without the part that loses packets, and whether its ring is expected to be quicker than this one.

        Where nothing is planned, a ring with room for all layers counts as quicker.
        """
        ways = self._lost.ways
        stays = [stage for stage in ring.stages if stage.plan.node in _names(found)]
        plan = self.standbys.take_over(_names(found), ways)
        if plan is None and ring.plan is not None and self._searches is not None:
            plan = await plan_layers(self._node, self._bundle, found, self._searches, stays, ways)
        elif plan is None:
            await check_room(self._node.settings, self._bundle, found, stays, ways)
        if plan is None or ring.plan is None:
            return plan, True
        now_per_s = slowed(ring.plan, lossy, self._node.settings.name)
        if plan.tokens_per_s <= now_per_s:
            _log.info("the ring stays: %.1f tokens/s with the loss, %.1f without", now_per_s, plan.tokens_per_s)
            self.standbys.follow(ring, found, ways)
        return plan, plan.tokens_per_s > now_per_s

    async def _move(self, boards: Boards) -> None:
        """Leave the ring, and open one with the latest plan.

        Where that fails, the boards that were to join are refused, and the next text opens a ring without them.
        """
        async with self._opening:
            ring, plan, found = self._ring, self._next_plan, self._usable(boards)
            if ring is None or not ring.is_open:
                await self._close_lost_ring()
                return
            before, lost = {stage.plan.node for stage in ring.stages}, self._lost.names
            ring.leave(self._given_up)
            await self._close_ring()
            try:
                await self._open_ring(found, plan, self._lost.ways)
            except FlowspecError as cause:
                if self._lost.names <= lost:
                    self._refuse(self._refused | _used(plan, found) - before)
                _log.warning("the ring is opened as it was, since it cannot be moved: %s", cause)
                return
            assert self._ring is not None
            report = self._plan_options.report if self._plan_options is not None else _log.info
            report(f"the ring has moved: {', '.join(_describe(stage.plan) for stage in self._ring.stages)}")

    def _refuse(self, boards: frozenset[str]) -> None:
        """From now on plan without these boards, and with all others that are there."""
        self._refused = boards
        self._report_boards()

    def _report_boards(self) -> None:
        if self._boards is not None:
            self._tell(rb.BoardsFound(_names(self._usable(self._boards))))

    def _usable(self, boards: Boards) -> list[Announcement]:
        return [board for board in self._lost.left_of(boards.found) if board.node not in self._refused]


def _names(found: Sequence[Announcement]) -> frozenset[str]:
    return frozenset(board.node for board in found)


def _of_search(plan_options: PlanOptions | None) -> PlanOptions | None:
    """With which better rings are searched for; None where shares are to be equal."""
    return None if plan_options is None or plan_options.is_equal_split else plan_options


def _differs_from(seen: frozenset[str] | None) -> Callable[[Sequence[Announcement]], bool]:
    return lambda found: _names(found) != seen


def _used(plan: Plan | None, found: Sequence[Announcement]) -> frozenset[str]:
    """The boards that are to serve; without a plan those are all, in equal shares."""
    return frozenset(stage.node for stage in plan.stages) if plan is not None else _names(found)


def _has_plan(ring: Ring, plan: Plan) -> bool:
    """Whether the ring serves just what the plan says. A stage without a precision runs in its node's own."""
    served = [(stage.plan.node, stage.plan.start, stage.plan.stop, stage.plan.precision) for stage in ring.stages]
    return len(served) == len(plan.stages) and all(
        now in [(stage.node, stage.start, stage.stop, precision) for precision in ("", stage.precision)]
        for now, stage in zip(served, plan.stages, strict=True)
    )


def _describe_part(part: Part, own: str) -> str:
    """Of a ring, for the beginning of a sentence. ``own`` is the name of the origin's own node."""
    if part == own:
        return "this machine's own link"
    return f"the link of {part}" if isinstance(part, str) else f"the way between {' and '.join(part)}"


def _describe_home(stage: StagePlan) -> str:
    return f"[{stage.start}, {stage.stop}) of {stage.node}"


def _describe(stage: StagePlan) -> str:
    return f"{stage.node} [{stage.start}, {stage.stop})"
