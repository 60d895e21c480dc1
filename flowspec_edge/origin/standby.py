"""Has boards stand by for each other while nobody writes: asks what is planned, has layers prepared, and tells the ring
to open when a board is lost. ``core/planning/standby.py`` says who, ``core/planning/preparing.py`` when.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Collection, Coroutine, Sequence
from typing import Any

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning import preparing as pr
from flowspec_edge.core.planning.losses import Way, way_between
from flowspec_edge.core.planning.placement import Plan, Standby
from flowspec_edge.core.planning.standby import plan_standbys
from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.errors import FlowspecError, LinkLostError, NodeUnavailableError, NotMeasuredError, ProtocolError
from flowspec_edge.files import open_record
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import OPENING, open_link
from flowspec_edge.origin.dialogue import source_texts, welcome_nodes
from flowspec_edge.origin.measured_links import Report
from flowspec_edge.origin.opening import OriginNode
from flowspec_edge.origin.planning import Known, PlanOptions, assume_equal, survey
from flowspec_edge.origin.ring import Ring
from flowspec_edge.origin.shares import with_what_they_serve

_log = logging.getLogger(__name__)


class Standbys:
    """The standbys of one ring after another, where they are wanted; ``close`` lets go of them.

    All boards count as equal where ``plan_options`` are None.
    """

    def __init__(
        self, node: OriginNode, bundle: Bundle, plan_options: PlanOptions | None, *, is_wanted: bool = True
    ) -> None:
        self._node, self._bundle, self._plan_options = node, bundle, plan_options
        self._is_wanted = is_wanted
        self._report: Report = _log.info if plan_options is None else plan_options.report
        self._core = pr.Preparing()
        self._journal = Journal("preparing", {}, open_record("preparing"))
        self._ring: Ring | None = None
        self._found: Sequence[Announcement] = ()
        self._cut: Collection[Way] = ()
        self._standbys: tuple[Standby, ...] = ()
        self._links: dict[str, Link] = {}  # to the nodes that stand by
        self._ending: dict[str, asyncio.Task[None]] = {}  # of links to nodes that did
        self._asked: dict[str, pr.Layers] = {}  # by node, what is to be answered
        self._work: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        self._is_wanted = False
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._ring = None

    def follow(self, ring: Ring, found: Sequence[Announcement], cut: Collection[Way] = ()) -> None:
        """From now on this is the ring, and these are the nodes that may stand by for it, without ways that are cut."""
        if ring is not self._ring:
            self._ring, self._standbys = ring, ()
        self._found, self._cut = found, cut
        self._tell(pr.RingOpened())

    def pause(self) -> None:
        """The ring has ended. What stands by does so until the next one is open."""
        self._tell(pr.RingClosed())

    def begin_text(self) -> None:
        """Until it has ended nothing is prepared."""
        self._tell(pr.TextBegan())

    def end_text(self) -> None:
        self._tell(pr.TextEnded())

    @property
    def ready(self) -> dict[str, Plan]:
        """By each node whose loss is prepared for, the plan of the ring that opens at once then."""
        return {
            standby.node: standby.plan
            for standby in self._standbys
            if standby.plan is not None and all(map(self._core.holds, self._blocks(standby)))
        }

    def take_over(self, found: Collection[str], cut: Collection[Way] = ()) -> Plan | None:
        """The plan of a ring that needs nothing loaded, where just one node of the ring is lost; once.

        A node that was started anew may be found, but has nothing loaded. The ring uses none of the ways that are cut.
        """
        loss = self._ring.loss if self._ring is not None else None
        left = set(found) - set(loss.lost if loss is not None else ())
        lost = [standby.node for standby in self._standbys if standby.node not in left]
        plan = self.ready.get(lost[0]) if len(lost) == 1 else None
        if plan is None:
            return None
        own, nodes = self._node.settings.name, [stage.node for stage in plan.stages]
        ways = {way_between(*ends) for ends in itertools.pairwise([own, *nodes, own])}
        if not left.issuperset(nodes) or ways.intersection(cut):
            return None
        self._standbys = ()
        return plan

    # --------------------------------------------------------------- performing

    def _tell(self, event: pr.PreparingEvent) -> None:
        if not self._is_wanted:
            return
        for action in self._journal.handle(self._core, event, time.monotonic()):
            match action:
                case pr.PlanStandbys():
                    self._begin(self._plan(), pr.StandbysPlanned(None))
                case pr.PrepareLayers(layers):
                    self._begin(self._prepare(layers), pr.LayersRefused(layers))
                case pr.StopWork():
                    self._stop()
                case pr.ReleaseNode(node):
                    self._ending[node] = self._spawn(self._links.pop(node).close(), f"end of standby on {node}")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (deadline := self._core.next_deadline()) is not None:
            delay = max(deadline - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tell, pr.TimePassed())

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin(self, work: Coroutine[Any, Any, None], if_cancelled: pr.PreparingEvent) -> None:
        """Do what the core has asked for; it is told the end, even where that was cancelled before it began."""
        self._work = self._spawn(work, "standbys")
        self._work.add_done_callback(lambda task: self._tell(if_cancelled) if task.cancelled() else None)

    def _stop(self) -> None:
        """A node that prepares is asked to give up, and answers; whatever else is done ends at once."""
        for node in self._asked:
            with contextlib.suppress(LinkLostError, ProtocolError):  # its reader tells
                self._links[node].send(wire.CancelPreparing())
        if not self._asked and self._work is not None:
            self._work.cancel()

    # ----------------------------------------------------------------- planning

    async def _plan(self) -> None:
        wanted: tuple[pr.Layers, ...] | None = None
        ring = self._ring
        assert ring is not None, "there is a ring to plan for"
        try:
            standbys = await self._standbys_of(ring)
            if ring is self._ring:
                self._standbys = standbys
                wanted = tuple(dict.fromkeys(block for standby in standbys for block in self._blocks(standby)))
                for standby in standbys:
                    if standby.plan is None:
                        self._report(f"nobody stands by for {standby.node}: none of the others has room")
        except FlowspecError as cause:
            _log.warning("nobody stands by, since that cannot be planned: %s", cause)
        except Exception:  # a bug; the core has to hear of it too
            _log.exception("nobody stands by, since planning that failed; please report this")
        self._tell(pr.StandbysPlanned(wanted))

    async def _standbys_of(self, ring: Ring) -> tuple[Standby, ...]:
        """Raises NodeUnavailableError where nobody is there, and LinkLostError where a node was lost meanwhile."""
        settings = self._node.settings
        async with contextlib.AsyncExitStack() as closing:
            peers, _ = await welcome_nodes(settings, self._bundle, self._found, "", closing)
            freed, loaded = with_what_they_serve(peers, ring.stages)
            known: Known | None = None
            if self._plan_options is not None:
                with contextlib.suppress(NotMeasuredError):
                    known = await survey(settings, self._bundle, freed, [], self._plan_options, loaded, cut=self._cut)
            wanted = self._plan_options or PlanOptions()
            known = known or assume_equal(settings, self._bundle, freed, wanted, self._cut)
        there = {device.node for device in known.devices}
        if any(stage.plan.node not in there for stage in ring.stages):
            return ()  # of this ring a node is being lost
        plans = [stage.plan for stage in ring.stages]
        return await asyncio.to_thread(plan_standbys, *known.measured, plans)

    def _blocks(self, standby: Standby) -> list[pr.Layers]:
        """What stands by, block by block."""
        return [
            pr.Layers(layers.node, block.start, block.stop)
            for layers in standby.layers
            for block in self._bundle.manifest.blocks_of(layers.start, layers.stop)
        ]

    # ---------------------------------------------------------------- preparing

    async def _prepare(self, layers: pr.Layers) -> None:
        node = layers.node
        try:
            link = await self._link_to(node)
        except FlowspecError as cause:
            _log.info("%s cannot stand by: %s", node, cause)
            self._tell(pr.NodeGone(node))
            return
        own = Source(self._node.settings.name, link.local_host, self._node.port)
        sources, precision = source_texts(own, self._found, node), self._precision_of(layers)
        self._asked[node] = layers
        with contextlib.suppress(LinkLostError, ProtocolError):  # its reader tells
            link.send(wire.PrepareLayers(self._bundle.digest, layers.start, layers.stop, sources, precision))

    def _precision_of(self, layers: pr.Layers) -> str:
        """Empty where each node has its own."""
        if self._plan_options is None or not self._plan_options.is_any_precision:
            return ""
        planned = (
            other.precision
            for standby in self._standbys
            for other in standby.layers
            if other.node == layers.node and other.start <= layers.start < other.stop
        )
        return next(planned, "")

    async def _link_to(self, node: str) -> Link:
        """The link on which the node stands by.

        Raises:
            NodeUnavailableError: it does not answer.
        """
        if node in self._links:
            return self._links[node]
        if node in self._ending:
            await asyncio.wait({self._ending.pop(node)})  # what stood by there until now counts as free then
        board = next((board for board in self._found if board.node == node), None)
        if board is None:
            raise NodeUnavailableError(f"node {node} is not found any more")
        settings = self._node.settings
        link, _ = await open_link(
            board.host,
            board.port,
            settings.hello(wire.CONTROL, ""),
            node=node,
            credentials=settings.credentials,
            timeouts=OPENING,
        )
        self._links[node] = link
        self._spawn(self._read(node, link), f"standby link to {node}")
        return link

    async def _read(self, node: str, link: Link) -> None:
        """Until the link ends, or is not needed any more."""
        broken: ProtocolError | None = None
        try:
            async for message in link:
                match message:
                    case wire.LayersPrepared(start, stop):
                        self._asked.pop(node, None)
                        before = self.ready.keys()
                        self._tell(pr.LayersPrepared(pr.Layers(node, start, stop)))
                        for lost in self.ready.keys() - before:
                            self._report(f"others stand by for {lost}")
                    case wire.StageFailure(reason) if node in self._asked:
                        _log.info("%s: %s", node, reason)
                        self._tell(pr.LayersRefused(self._asked.pop(node)))
                    case wire.LayersGivenBack(start, stop):
                        self._tell(pr.LayersGone(pr.Layers(node, start, stop)))
                    case _:
                        raise ProtocolError(f"peer {node}: {type(message).__name__} came where layers stand by")
        except FlowspecError as cause:
            _log.info("%s does not stand by any more: %s", node, cause)
            broken = cause if isinstance(cause, ProtocolError) else None
        if self._links.get(node) is link:
            del self._links[node]
            self._asked.pop(node, None)
            self._tell(pr.NodeGone(node))
        await link.close(broken)
