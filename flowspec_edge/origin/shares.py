"""The layers of a ring by node: in equal shares, or as a plan says. And the room beside them for ended sessions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.planning.detours import around_cut_ways
from flowspec_edge.core.planning.kept_room import KeptRoom, Spare
from flowspec_edge.core.planning.losses import Way
from flowspec_edge.core.planning.placement import (
    LeftOut,
    LoadedLayers,
    NodeOffer,
    Plan,
    PlannedStage,
    StagePlan,
    origin_memory_bytes,
    spread_layers,
)
from flowspec_edge.errors import NodeUnavailableError, PlacementError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.dialogue import welcome_nodes
from flowspec_edge.origin.measured_links import Peer
from flowspec_edge.origin.ring import RingStage


def equal_shares(bundle: Bundle, peers: Mapping[str, Peer], cut: frozenset[Way], origin: str) -> list[StagePlan]:
    """The layers in equal shares, in an order that goes around the ways that are ``cut``.

    The node ``origin`` needs some of its memory for head and drafter.
    """
    beside = {origin: origin_memory_bytes(bundle.manifest)}
    offers = [NodeOffer(name, peer.free_memory_bytes - beside.get(name, 0)) for name, peer in peers.items()]
    while True:
        there = around_cut_ways(offers, cut, origin)
        if offers and not there:
            names = ", ".join(offer.node for offer in offers)
            raise PlacementError(f"no data link can be opened between the origin and any of {names}; is a firewall on?")
        plans = spread_layers(bundle.manifest.blocks, there)
        if len(plans) == len(there):
            return plans
        serving = {plan.node for plan in plans}  # who gets no layers is no neighbour of anybody
        offers = [offer for offer in there if offer.node in serving]


async def check_room(
    settings: NodeSettings,
    bundle: Bundle,
    found: Sequence[Announcement],
    stages: Sequence[RingStage],
    cut: frozenset[Way],
) -> None:
    """Whether all layers fit into equal shares on these nodes. What the ``stages`` of a ring hold counts as free.

    Raises:
        NodeUnavailableError: none of them can be reached, or none has the bundle.
        PlacementError: the layers do not fit.
    """
    async with contextlib.AsyncExitStack() as closing:
        peers, _ = await welcome_nodes(settings, bundle, found, "", closing, is_urgent=True)
        equal_shares(bundle, with_what_they_serve(peers, stages)[0], cut, settings.name)


def with_what_they_serve(
    peers: Mapping[str, Peer], stages: Sequence[RingStage]
) -> tuple[dict[str, Peer], dict[str, LoadedLayers]]:
    """The peers with what the stages of a ring hold as free memory, for its layers may move; and these layers."""
    held = {stage.plan.node: stage.held_bytes for stage in stages}
    freed = {
        name: replace(peer, free_memory_bytes=peer.free_memory_bytes + held.get(name, 0))
        for name, peer in peers.items()
    }
    plans = [stage.plan for stage in stages]
    return freed, {plan.node: LoadedLayers(plan.start, plan.stop, plan.precision) for plan in plans}


def planned_shares(
    plan: Plan, peers: Mapping[str, Peer], refused: Sequence[LeftOut], *, is_any_precision: bool
) -> list[StagePlan]:
    """The layers as the plan says, in its precisions where it may choose them."""
    check_reached(plan.stages, peers, refused)
    return [replace(stage.stage_plan, precision=stage.precision if is_any_precision else "") for stage in plan.stages]


def check_reached(
    stages: Sequence[StagePlan | PlannedStage], peers: Mapping[str, Peer], refused: Sequence[LeftOut]
) -> None:
    """Raises NodeUnavailableError where a node that serves, or is to serve, is not among those that answered."""
    reasons = {out.node: out.reason for out in refused}
    for stage in stages:
        if stage.node not in peers:
            raise NodeUnavailableError(reasons.get(stage.node, f"node {stage.node} is not found any more"))


def room_for_sessions(
    bundle: Bundle, stages: Sequence[RingStage], peers: Mapping[str, Peer], most_bytes: int | None
) -> KeptRoom:
    """What the ring of these stages may keep of ended sessions; see ``KeptRoom.on``."""
    spare = [
        Spare(stage.plan.stop - stage.plan.start, peers[stage.plan.node].free_memory_bytes - stage.held_bytes)
        for stage in stages
    ]
    return KeptRoom.on(bundle.manifest.geometry, spare, most_bytes)
