"""Rings are opened, and planned, with the nodes that were found: who answers, who gets which layers, and who fetches from whom."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.planning.placement import (
    LeftOut,
    LoadedLayers,
    NodeOffer,
    Plan,
    PlannedStage,
    StagePlan,
    spread_layers,
)
from flowspec_edge.core.planning.prediction import Outcome, name_link
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.errors import (
    FlowspecError,
    NodeUnavailableError,
    NotMeasuredError,
    ProtocolError,
    StageFailedError,
)
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import Link, open_link
from flowspec_edge.node.node import Node
from flowspec_edge.origin.engine import LoadEngine, OriginEngine
from flowspec_edge.origin.planning import Peer, PlanOptions, keep_placement, links_now, make_plan
from flowspec_edge.origin.ring import Ring, RingStage

STAGE_OPEN_S = 300.0
"""How long a stage may take to load its layers: 8 GB from an SD card at 40 MB/s takes 200 s."""

MAX_SOURCES = 64
"""Nodes to name as sources of weights: four times the largest ring, and 64 names of 60 bytes fit into a message."""

OnFetch = Callable[[StagePlan, int, int], None]
"""Told, while rings open, of a stage's weights how many bytes came and how many were missing."""

_log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def open_ring(
    node: Node,
    bundle: Bundle,
    found: Sequence[Announcement],
    load_engine: LoadEngine = OriginEngine,
    on_fetch: OnFetch = lambda plan, num_bytes, total_bytes: None,
    plan_options: PlanOptions | None = None,
    plan: Plan | None = None,
) -> AsyncIterator[Ring]:
    """Spread the layers of ``bundle`` over the nodes that were found, open the stages, and keep the ring while in use.

    With a ``plan`` they are dealt like that, with ``plan_options`` as the planner says, else equally.

    ``node`` is the origin's own listener, to which the last stage returns; nodes fetch from it what they lack.

    Raises:
        NodeUnavailableError: no node that was found can be reached, or none of them has the bundle.
        PlacementError: the layers do not fit into the nodes' memory.
        StageFailedError: a stage could not be opened.
    """
    name = f"{node.settings.name}-{secrets.token_hex(4)}"
    async with contextlib.AsyncExitStack() as closing:
        peers, refused = await _welcomed(node, bundle, found, name, closing)
        if plan is None and plan_options is not None:
            plan = await _planned(node, bundle, peers, refused, plan_options)
        plans = _deal(
            bundle, peers, refused, plan, is_any_precision=plan_options is not None and plan_options.is_any_precision
        )
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
    plan_options: PlanOptions,
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
        return await make_plan(node, bundle, freed, refused, plan_options, loaded)


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
    node: Node, bundle: Bundle, peers: dict[str, Peer], refused: list[LeftOut], plan_options: PlanOptions
) -> Plan | None:
    """None, and equal shares, where nothing is known of the nodes; they learn from the session that follows."""
    try:
        return await make_plan(node, bundle, peers, refused, plan_options)
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
