"""Generations over one ring, which they share: opened at the first of them, opened anew when something in it was lost, and
moved when boards have come or got hot. ``core/rebalancing.py`` decides when; this module performs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.planning import rebalancing as rb
from flowspec_edge.core.planning.placement import Plan
from flowspec_edge.errors import FlowspecError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.node import Node
from flowspec_edge.origin.answer import Answer
from flowspec_edge.origin.opening import OnFetch, explain_outcome, open_ring, plan_layers
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.ring import Ring

_log = logging.getLogger(__name__)


class Boards(Protocol):
    """The nodes there are, for as long as a ring is to follow them. See ``Directory``."""

    @property
    def found(self) -> list[Announcement]: ...

    async def wait_for(
        self, is_enough: Callable[[list[Announcement]], bool], timeout_s: float | None
    ) -> list[Announcement]: ...


Search = Callable[[], Awaitable[Sequence[Announcement]]]


class GenerationService:
    """Answers prompts of several users. Made by :meth:`start`."""

    def __init__(
        self,
        node: Node,
        bundle: Bundle,
        search: Search,
        on_fetch: OnFetch,
        plan_options: PlanOptions | None,
        boards: Boards | None,
        *,
        moves_at_once: bool,
        names_links: bool,
    ) -> None:
        self._node = node
        self._bundle = bundle
        self._search = search
        self._on_fetch = on_fetch
        self._plan_options = plan_options
        self._boards = boards
        self._names_links = names_links
        self._core = rb.Rebalancing(at_once=moves_at_once)
        self._ring: Ring | None = None
        self._writer: Ring | None = None
        self._next_plan: Plan | None = None
        self._refused: frozenset[str] = frozenset()  # boards that a ring could not be moved to, while they are there
        self._dealt: frozenset[str] = frozenset()  # boards that were there when the ring was opened, and still are
        self._opening = asyncio.Lock()
        self._closing = contextlib.AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        node: Node,
        bundle: Bundle,
        search: Search,
        on_fetch: OnFetch = lambda plan, num_bytes, total_bytes: None,
        plan_options: PlanOptions | None = None,
        boards: Boards | None = None,
        *,
        moves_at_once: bool = False,
        names_links: bool = False,
    ) -> AsyncIterator[GenerationService]:
        """``search`` finds the nodes to serve with, each time a ring is opened. Where ``boards`` tells of later ones, the ring
        moves to a better plan while nobody uses it, or with ``moves_at_once`` whoever does. With ``names_links`` a last piece
        may wait until the links of the ring are measured anew, if only that tells why it was slow. The others are those of
        ``open_ring``.
        """
        service = cls(
            node, bundle, search, on_fetch, plan_options, boards, moves_at_once=moves_at_once, names_links=names_links
        )
        if boards is not None:
            service._spawn(service._watch(boards), "watching for boards")
        try:
            yield service
        finally:
            await service._close()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._timer is not None:
            self._timer.cancel()
        await self._closing.aclose()

    @property
    def model(self) -> str:
        return self._bundle.manifest.name

    @property
    def ring(self) -> Ring | None:
        """The one that is open, or was until something in it was lost."""
        return self._ring

    @property
    def writer(self) -> Ring | None:
        """The ring that the latest text was or is written by, though it may have been left since."""
        return self._writer

    async def generate(self, prompt: str, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        """Pieces of the answer; see :meth:`Ring.generate`, and :func:`open_ring` for what may go wrong before.

        The statistics of the last one hold ``prediction``: what was expected of the ring, beside what it brought.
        """
        ring = await self._open()
        self._tell(rb.SessionBegan())
        try:
            answer = ring.begin(prompt, options)
            while True:
                self._writer = ring
                async with contextlib.aclosing(self._write(ring, answer)) as pieces:
                    async for piece in pieces:
                        yield piece
                        if piece.finish_reason is not None:
                            return
                ring = await self._open()  # that one was left in the middle
        finally:
            self._tell(rb.SessionEnded())

    async def _write(self, ring: Ring, answer: Answer) -> AsyncGenerator[Piece, None]:
        async with contextlib.aclosing(ring.write(answer)) as pieces:
            async for piece in pieces:
                if piece.statistics is not None:
                    outcome = ring.outcome(piece.statistics) if answer.num_rings == 1 else None
                    if outcome is not None and self._names_links:
                        outcome = await explain_outcome(self._node, self._bundle, ring, outcome)
                    piece.statistics["prediction"] = outcome.to_report() if outcome else None
                yield piece

    async def _open(self) -> Ring:
        async with self._opening:
            if self._ring is None or not self._ring.is_open:
                await self._leave()
                await self._enter_found(await self._search())
            assert self._ring is not None
            return self._ring

    async def _enter_found(self, found: Sequence[Announcement]) -> None:
        """Without the boards that a ring could not be moved to, as long as the others can do it."""
        trusted = [board for board in found if board.node not in self._refused]
        try:
            await self._enter(trusted, None)
        except FlowspecError as cause:
            if len(trusted) == len(found):
                raise
            _log.warning("all boards are tried, since no ring can be opened with those that served: %s", cause)
            self._refuse(frozenset())
            await self._enter(found, None)

    async def _leave(self) -> None:
        self._ring = None
        self._tell(rb.RingClosed())
        await self._closing.aclose()

    async def _enter(self, found: Sequence[Announcement], plan: Plan | None) -> None:
        opening = open_ring(
            self._node, self._bundle, found, on_fetch=self._on_fetch, plan_options=self._plan_options, plan=plan
        )
        self._ring = await self._closing.enter_async_context(opening)
        self._dealt = _names(found)
        self._tell(rb.RingOpened(self._dealt))

    # ------------------------------------------------------------------ while it serves

    def _tell(self, event: rb.RebalancingEvent) -> None:
        if self._boards is None:
            return
        for action in self._core.handle(event, time.monotonic()):
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
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s failed, and is given up; please report this", task.get_name(), exc_info=error)

    async def _watch(self, boards: Boards) -> None:
        seen: frozenset[str] | None = None
        while True:
            found = await boards.wait_for(lambda found, seen=seen: _names(found) != seen, None)  # type: ignore[misc]
            seen = _names(found)
            self._dealt &= seen  # who comes back under its name gets another chance
            self._refuse(self._refused & seen)

    async def _plan(self, boards: Boards) -> None:
        ring, found = self._ring, self._usable(boards)
        self._next_plan, is_better = None, False
        try:
            if ring is not None and self._plan_options is not None:
                plan = await plan_layers(self._node, self._bundle, found, self._plan_options, ring.stages)
                is_better = not plan.is_kept and not _is_that_of(ring, plan)
                self._next_plan = plan
            elif ring is not None:  # equal shares for all that there are
                is_better = bool(_names(found) - self._dealt)
        except FlowspecError as cause:
            _log.warning("the ring stays as it is, since it cannot be planned anew: %s", cause)
        except Exception:  # a bug: the core waits for this plan, and makes others later
            _log.exception("the ring stays as it is, since planning anew failed; please report this")
        is_better &= ring is self._ring and ring is not None and ring.is_open  # it was held against that one
        self._tell(rb.PlanMade(_names(found), is_better, _used(self._next_plan, found)))

    async def _move(self, boards: Boards) -> None:
        async with self._opening:
            ring, plan, found = self._ring, self._next_plan, self._usable(boards)
            if ring is None or not ring.is_open:
                await self._leave()
                return
            before = {stage.plan.node for stage in ring.stages}
            ring.leave()
            await self._leave()
            try:
                await self._enter(found, plan)
            except FlowspecError as cause:
                self._refuse(self._refused | _used(plan, found) - before)
                _log.warning("the ring is opened as it was, since it cannot be moved: %s", cause)
                return
            assert self._ring is not None
            report = self._plan_options.report if self._plan_options is not None else _log.info
            report(f"the ring has moved: {', '.join(_describe(stage.plan) for stage in self._ring.stages)}")

    def _refuse(self, boards: frozenset[str]) -> None:
        """No plan is made with these from now on; with all others that there are."""
        self._refused = boards
        if self._boards is not None:
            self._tell(rb.BoardsFound(_names(self._usable(self._boards))))

    def _usable(self, boards: Boards) -> list[Announcement]:
        return [board for board in boards.found if board.node not in self._refused]


def _names(found: Sequence[Announcement]) -> frozenset[str]:
    return frozenset(board.node for board in found)


def _used(plan: Plan | None, found: Sequence[Announcement]) -> frozenset[str]:
    """The boards that are to serve: without a plan, equally, all."""
    return frozenset(stage.node for stage in plan.stages) if plan is not None else _names(found)


def _is_that_of(ring: Ring, plan: Plan) -> bool:
    served = [(stage.plan.node, stage.plan.start, stage.plan.stop, stage.plan.precision) for stage in ring.stages]
    return len(served) == len(plan.stages) and all(
        now in [(stage.node, stage.start, stage.stop, precision) for precision in ("", stage.precision)]
        for now, stage in zip(served, plan.stages, strict=True)
    )


def _describe(stage: Any) -> str:
    return f"{stage.node} [{stage.start}, {stage.stop})"
