"""Rings are opened, and planned, with the nodes that were found.

The dialogue on the control links comes first (``dialogue.py``): nodes welcome the origin, are asked for a plan, load
their stages and connect them. A ring is made when all of its links stand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning.kept_room import KeptRoom
from flowspec_edge.core.planning.losses import Way
from flowspec_edge.core.planning.placement import (
    Plan,
    StagePlan,
)
from flowspec_edge.core.planning.prediction import Outcome, name_link
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.errors import (
    LinkLostError,
    NodeUnavailableError,
    ProtocolError,
    RingLostError,
    StageFailedError,
)
from flowspec_edge.files import open_record, records_text
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import OPENING, open_link
from flowspec_edge.net.standstill import THIS_PROCESS
from flowspec_edge.node.arrivals import Arrivals
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.blame import asking, silent_links
from flowspec_edge.origin.dialogue import (
    OnFetch,
    OnLost,
    open_stages,
    raise_failure,
    stage_requests,
    welcome_nodes,
)
from flowspec_edge.origin.engine import LoadEngine, OriginEngine, read_tokenizer
from flowspec_edge.origin.measured_links import Peer, links_now
from flowspec_edge.origin.planning import PlanOptions, make_plan, plan_if_measured
from flowspec_edge.origin.remembered import keep_placement
from flowspec_edge.origin.ring import OnLossy, Ring, RingLinks, RingStage
from flowspec_edge.origin.shares import (
    check_reached,
    equal_shares,
    planned_shares,
    room_for_sessions,
    with_what_they_serve,
)
from flowspec_edge.tasks import run_until_first_ends

_log = logging.getLogger(__name__)


class OriginNode(Protocol):
    """What a ring needs of the origin's own node, to which its last stage returns."""

    @property
    def settings(self) -> NodeSettings: ...

    @property
    def port(self) -> int: ...

    @property
    def arrivals(self) -> Arrivals: ...

    @property
    def board(self) -> Board: ...

    def energy(self) -> wire.EnergyTaken | None: ...


@contextlib.asynccontextmanager
async def open_ring(
    node: OriginNode,
    bundle: Bundle,
    found: Sequence[Announcement],
    load_engine: LoadEngine = OriginEngine,
    on_fetch: OnFetch = lambda plan, num_bytes, total_bytes: None,
    plan_options: PlanOptions | None = None,
    plan: Plan | None = None,
    on_lost: OnLost = lambda board: None,
    cut: frozenset[Way] = frozenset(),
    is_urgent: bool = False,
    is_in_doubt: asyncio.Event | None = None,
    on_lossy: OnLossy = lambda found: None,
    kept_bytes: int | None = 0,
) -> AsyncIterator[Ring]:
    """Spread the layers of ``bundle`` over the nodes that were found, open the stages, and keep the ring while in use.

    With a ``plan`` they are dealt like that, with ``plan_options`` as these say, else equally. Nodes fetch from
    the origin's ``node`` what they lack. ``on_lost`` is told of nodes that do not answer, or no longer. The ring goes
    around the ways that are ``cut``. Where it ``is_urgent``, since texts wait that had a ring before, no link is
    measured, and who hesitates to answer is left out. ``is_in_doubt`` is set when a text begins to wait meanwhile: all
    nodes are then asked whether they are there, as by a ring that is open. ``on_lossy`` is told of parts of the open
    ring that lose packets. Ended sessions are kept in ``kept_bytes`` on all nodes together; where that is None, in a
    share of what they have to spare.

    Raises:
        NodeUnavailableError: no node that was found can be reached, or none of them has the bundle.
        PlacementError: the layers do not fit into the nodes' memory.
        StageFailedError: a stage could not be opened.
        LinkLostError, ProtocolError: a node was lost meanwhile, or broke the rules.
    """
    name = f"{node.settings.name}-{secrets.token_hex(4)}"
    with THIS_PROCESS.expected():
        tokenizer = await asyncio.to_thread(read_tokenizer, bundle)  # before there are links that would be lost by it
    async with contextlib.AsyncExitStack() as closing:
        peers, refused = await welcome_nodes(node.settings, bundle, found, name, closing, on_lost, is_urgent=is_urgent)
        async with _telling_losses(peers, on_lost), asking([peer.link for peer in peers.values()], is_in_doubt):
            if plan is None and plan_options is not None:
                plan = await plan_if_measured(
                    node.settings, bundle, peers, refused, plan_options, cut=cut, measures_links=not is_urgent
                )
            if plan is None:
                plans = equal_shares(bundle, peers, cut, node.settings.name)
            else:
                is_any_precision = plan_options is not None and plan_options.is_any_precision
                plans = planned_shares(plan, peers, refused, is_any_precision=is_any_precision)
            controls = [peers[part.node].link for part in plans]
            closing.enter_context(node.arrivals.expect(f"{name}/{len(plans)}"))
            there = [peer.address for peer in peers.values()]
            own, row_kind = (node.settings.name, node.port), node.settings.row_kind
            requests = stage_requests(*own, bundle, name, plans, controls, there, row_kind)
            loads = asyncio.to_thread(load_engine, bundle, node.settings.num_threads, DraftShape())
            loading = asyncio.create_task(loads, name="loading head and drafter")
            closing.push_async_callback(_close_when_loaded, loading)
            opened = await open_stages(plans, controls, requests, on_fetch)
            await asyncio.wait({loading})
            engine = loading.result()
            del tokenizer  # which the engine has
            stages = _ring_stages(plans, opened, there)
            if plan is not None:
                await asyncio.to_thread(keep_placement, bundle.digest, plan)
            links = await _connect(node, name, stages, controls, closing)
        room = room_for_sessions(bundle, stages, peers, kept_bytes)
        core, journal = _core_of(bundle, plans, room, plan, has_drafter=engine.drafter is not None)
        async with Ring(
            core, journal, engine, stages, links, node.board, plan, on_lossy, room.slot_bytes, node.energy, row_kind
        ) as ring:
            yield ring


@contextlib.asynccontextmanager
async def _telling_losses(peers: Mapping[str, Peer], on_lost: OnLost) -> AsyncIterator[None]:
    """Where the opening fails, tell which nodes were lost. Whoever is lost explains what others have said.

    Raises:
        RingLostError: a stage failed, or lost a neighbour that answers.
    """
    try:
        yield
    except (LinkLostError, StageFailedError, ProtocolError) as cause:
        silent = await silent_links([peer.link for peer in peers.values()])
        for peer in peers.values():
            if peer.link in silent:
                on_lost(peer.address)
        if silent and isinstance(cause, RingLostError):
            raise RingLostError(str(cause), lost=tuple(link.peer for link in silent)) from cause
        raise


async def plan_layers(
    node: OriginNode,
    bundle: Bundle,
    found: Sequence[Announcement],
    plan_options: PlanOptions,
    stages: Sequence[RingStage] = (),
    cut: frozenset[Way] = frozenset(),
) -> Plan:
    """The plan that a ring would be opened with now; nothing is loaded to serve. ``stages`` are those of a ring that
    stays unless the plan is clearly better; what they hold counts as free. The plan goes around ways that are ``cut``.

    Raises:
        NodeUnavailableError, PlacementError: as for :func:`open_ring`.
        NotMeasuredError: no node knows what a layer takes.
    """
    async with contextlib.AsyncExitStack() as closing:
        peers, refused = await welcome_nodes(node.settings, bundle, found, "", closing)
        check_reached([stage.plan for stage in stages], peers, refused)
        freed, loaded = with_what_they_serve(peers, stages)
        return await make_plan(node.settings, bundle, freed, refused, plan_options, loaded, cut=cut)


async def explain_outcome(node: OriginNode, bundle: Bundle, ring: Ring, outcome: Outcome) -> Outcome:
    """Where the network was off: which link of the ring, by a new measurement of each with at most 1 MiB."""
    if not outcome.is_network or ring.plan is None:
        return outcome
    found = [stage.announcement for stage in ring.stages]
    async with contextlib.AsyncExitStack() as closing:
        try:
            peers, _ = await welcome_nodes(node.settings, bundle, found, "", closing)
        except NodeUnavailableError:
            return outcome  # all of it has been lost meanwhile
        return name_link(outcome, ring.plan, await links_now(node.settings, peers, ring.plan))


async def _close_when_loaded(loading: asyncio.Task[OriginEngine]) -> None:
    """A thread that loads cannot be ended; what it loads is not left behind, even where the opening has failed."""
    await asyncio.wait({loading})
    if not loading.cancelled() and loading.exception() is None:
        await asyncio.to_thread(loading.result().close)


def _core_of(
    bundle: Bundle, stages: Sequence[StagePlan], room: KeptRoom, plan: Plan | None, *, has_drafter: bool
) -> tuple[Origin, Journal]:
    """What decides on a ring's generations, and the journal of what it is told."""
    manifest = bundle.manifest
    geometry = manifest.geometry
    itself: dict[str, Any] = {
        "num_stages": len(stages),
        "limits": TargetLimits(
            geometry.max_context, geometry.vocab_size, frozenset(manifest.eos_token_ids), geometry.hidden_size
        ),
        "has_drafter": has_drafter,
        "taps": tuple(manifest.drafter.taps) if manifest.drafter is not None else (),
        "max_kept_slots": room.num_slots,
        "expected": None if plan is None else plan.times,
        "num_blocks": tuple(len(manifest.blocks_of(stage.start, stage.stop)) for stage in stages),
    }
    return Origin(**itself), Journal("origin", itself, open_record("origin"), has_text=records_text())


def _ring_stages(
    plans: Sequence[StagePlan], opened: Sequence[wire.StageOpened], found: Sequence[Announcement]
) -> list[RingStage]:
    addresses = {announcement.node: announcement for announcement in found}
    return [
        RingStage(
            plan,
            addresses[plan.node],
            message.load_ms,
            message.fetched_bytes,
            message.memory_bytes,
            message.arithmetic,
        )
        for plan, message in zip(plans, opened, strict=True)
    ]


async def _connect(
    node: OriginNode,
    ring: str,
    stages: Sequence[RingStage],
    controls: Sequence[Link],
    closing: contextlib.AsyncExitStack,
) -> RingLinks:
    """All links of the ring: to ``controls`` come the data link to the first stage, and that from the last one.

    Raises:
        LinkLostError, RingLostError: a stage was lost, or failed, before its links stood.
        ProtocolError: a stage said what it may not say yet.
    """
    first, settings = stages[0].announcement, node.settings
    hello = settings.hello(wire.DATA, f"{ring}/0")
    found: list[RingLinks] = []

    async def connect() -> None:
        try:
            ahead, _ = await open_link(
                first.host, first.port, hello, node=first.node, credentials=settings.credentials, timeouts=OPENING
            )
        except NodeUnavailableError as cause:
            raise RingLostError(str(cause), cut=(settings.name, first.node)) from cause
        closing.push_async_callback(ahead.close)
        behind = await closing.enter_async_context(node.arrivals.data_link(f"{ring}/{len(stages)}"))
        found.append(RingLinks(controls, ahead, behind))

    async def watch(stage: RingStage, control: Link) -> None:
        raise_failure(stage.plan, await control.receive())

    await run_until_first_ends(connect(), *map(watch, stages, controls))
    return found[0]
