"""An origin's plan: it asks the nodes what they measured, counts their links, and deals the layers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.limits import TREE_MARGIN
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.losses import Way
from flowspec_edge.core.planning.measured import curves_from_text, rounded
from flowspec_edge.core.planning.placement import Device, Hop, LeftOut, Links, LoadedLayers, ModelNeeds, Plan
from flowspec_edge.core.planning.planner import plan_ring, plan_shares
from flowspec_edge.core.planning.shared_cores import Cores, core_shares, crowding
from flowspec_edge.core.planning.standby import with_standbys
from flowspec_edge.core.planning.throughput import NO_DRAFTS, Throughput
from flowspec_edge.errors import NotMeasuredError, PlacementError
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.costs import origin_costs, with_origin_memory
from flowspec_edge.origin.measured_links import Peer, Report, known_links, origin_name, way_as_measured
from flowspec_edge.origin.remembered import load_draft_gain, load_placement
from flowspec_edge.origin.shares import equal_shares

STAGE_MS = 0.7
"""What a stage takes per chunk beside its layers: Python and threads (docs/performance.md, "In real time"; x86)."""
ORIGIN_MS = 3.0
"""What an origin takes per chunk beside head and drafter: to plan, pack and send (docs/performance.md, "What planning
costs"; x86)."""
USUAL_HOP = Hop(2.0)
"""A link that could not be measured is taken for this: a message on a LAN of small boards."""
MEASURE_S = 180.0
"""For a node to measure its layers: it may have to read gigabytes from an SD card first."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What a plan is made for: a schedule, and sessions of at most ``num_tokens`` (None: all that the model allows).

    With ``is_equal_split`` each node has an equal share, and the plan says what that is expected to bring. With
    ``is_any_precision`` it chooses among the bundle's precisions for each device; else each device has its own. With
    ``has_standbys`` it says who stands by for whom. ``report`` is told of what takes long.
    """

    schedule: str = "flowspec"
    num_tokens: int | None = None
    is_equal_split: bool = False
    is_any_precision: bool = False
    has_standbys: bool = False
    report: Report = _log.info


@dataclass(frozen=True, slots=True)
class Known:
    """What a plan is made of, and the nodes that cannot be planned with."""

    devices: list[Device]
    links: Links
    model: ModelNeeds
    throughput: Throughput
    refused: Sequence[LeftOut] = ()

    @property
    def measured(self) -> tuple[list[Device], Links, ModelNeeds, Throughput]:
        return self.devices, self.links, self.model, self.throughput


async def make_plan(
    settings: NodeSettings,
    bundle: Bundle,
    peers: Mapping[str, Peer],
    refused: Sequence[LeftOut],
    plan_options: PlanOptions,
    loaded: Mapping[str, LoadedLayers] | None = None,
    *,
    cut: Collection[Way] = (),
    measures_links: bool = True,
) -> Plan:
    """Measure what is not known, and plan.

    ``settings`` are those of the origin's own node; ``refused`` are left out already. ``loaded`` is what a ring serves
    that the plan may take the place of, else what was served last. The plan goes around the ways that are ``cut``.
    Where ``measures_links`` is not set, links that are not known count as usual ones.

    Raises:
        PlacementError: the model does not fit; NotMeasuredError: no node could measure its layers.
        RequestError: there is no such schedule.
        LinkLostError: a node was lost meanwhile.
    """
    known = await survey(settings, bundle, peers, refused, plan_options, loaded, cut=cut, measures_links=measures_links)
    if plan_options.is_equal_split:
        there = {name: peer for name, peer in peers.items() if peer.link.is_open}
        shares = equal_shares(bundle, there, frozenset(cut), settings.name)
        plan = await asyncio.to_thread(plan_shares, shares, *known.measured)
    else:
        plan = await asyncio.to_thread(plan_ring, *known.measured)
    plan = replace(plan, left_out=(*plan.left_out, *known.refused))
    return await asyncio.to_thread(with_standbys, plan, *known.measured) if plan_options.has_standbys else plan


async def plan_if_measured(
    settings: NodeSettings,
    bundle: Bundle,
    peers: Mapping[str, Peer],
    refused: Sequence[LeftOut],
    plan_options: PlanOptions,
    *,
    cut: Collection[Way],
    measures_links: bool,
) -> Plan | None:
    """As :func:`make_plan`; None where nothing is known of the nodes, which get equal shares and learn from the session
    that follows. Shares that are to be equal need no plan: whether there is room for them, the ring will show.
    """
    try:
        return await make_plan(settings, bundle, peers, refused, plan_options, cut=cut, measures_links=measures_links)
    except PlacementError as cause:
        if not isinstance(cause, NotMeasuredError) and not plan_options.is_equal_split:
            raise
        _log.info("equal shares, of which nothing is expected: %s", cause)
        return None


async def survey(
    settings: NodeSettings,
    bundle: Bundle,
    peers: Mapping[str, Peer],
    refused: Sequence[LeftOut],
    plan_options: PlanOptions,
    loaded: Mapping[str, LoadedLayers] | None = None,
    *,
    cut: Collection[Way] = (),
    measures_links: bool = True,
) -> Known:
    """Measure what is not known; the arguments and errors are those of :func:`make_plan`."""
    manifest = bundle.manifest
    # One after another: an origin that serves would measure its head and its layers at once, and links beside both.
    head_ms, draft_ms = await asyncio.to_thread(origin_costs, bundle, settings.num_threads)
    whom = "one node what a layer takes it" if len(peers) == 1 else f"{len(peers)} nodes what a layer takes them"
    plan_options.report(f"asking {whom}, which is measured the first time ...")
    answers = await asyncio.gather(*(_layers(name, peer, bundle, plan_options) for name, peer in peers.items()))
    refused = [*refused, *(answer for answer in answers if isinstance(answer, LeftOut))]
    told = {n: answer for n, answer in zip(peers, answers, strict=True) if not isinstance(answer, LeftOut)}
    if not any(answer.curves for answer in told.values()):
        raise NotMeasuredError(
            f"none of the {len(told)} nodes that answered has measured a layer of this model yet; they do with their "
            "first session (flowspec generate --equal-split), or at once where they have the whole bundle"
        )
    peers = {name: peers[name] for name in told}
    links = await _links(settings, peers, plan_options.report, cut, measures=measures_links)
    loaded = loaded or load_placement(bundle.digest)
    sure = manifest.precision if plan_options.is_any_precision else None
    devices = _devices(settings, peers, told, loaded, head_ms + draft_ms + ORIGIN_MS, sure)
    model = _needs(settings, bundle, plan_options, head_ms)
    throughput = _throughput(bundle, plan_options, draft_ms)
    return Known(with_origin_memory(devices, settings.name, model), links, model, throughput, refused)


def assume_equal(
    settings: NodeSettings,
    bundle: Bundle,
    peers: Mapping[str, Peer],
    plan_options: PlanOptions,
    cut: Collection[Way] = (),
) -> Known:
    """What is taken for granted where nothing is measured: equal boards, and links that need no time."""
    layer = {bundle.manifest.precision: Line(1.0)}
    devices = [
        Device(node=name, free_memory_bytes=peer.free_memory_bytes, has_half_cache=peer.has_half_cache, layer=layer)
        for name, peer in peers.items()
    ]
    model = _needs(settings, bundle, plan_options, head_ms=0.0)
    return Known(
        with_origin_memory(devices, settings.name, model),
        Links(origin=origin_name(settings, peers), usual=Hop(0.0), cut=_as_measured(settings, peers, cut)),
        model,
        _throughput(bundle, plan_options, draft_ms=0.0),
    )


def _needs(settings: NodeSettings, bundle: Bundle, plan_options: PlanOptions, head_ms: float) -> ModelNeeds:
    limit = bundle.manifest.geometry.max_context
    num_tokens = min(plan_options.num_tokens or limit, limit)
    return ModelNeeds.from_manifest(
        bundle.manifest, num_tokens=num_tokens + TREE_MARGIN, head_ms=head_ms, row_kind=settings.row_kind
    )


def _throughput(bundle: Bundle, plan_options: PlanOptions, draft_ms: float) -> Throughput:
    acceptance = load_draft_gain(bundle.digest).acceptance if bundle.manifest.drafter else NO_DRAFTS
    return Throughput(plan_options.schedule, acceptance, draft_ms)


async def _links(
    settings: NodeSettings, peers: Mapping[str, Peer], report: Report, cut: Collection[Way], *, measures: bool
) -> Links:
    hops = await known_links(settings, peers, report, measures=measures)
    ways = _as_measured(settings, peers, cut)
    return Links(origin=origin_name(settings, peers), usual=USUAL_HOP, measured=hops, cut=ways)


def _as_measured(settings: NodeSettings, peers: Mapping[str, Peer], cut: Collection[Way]) -> frozenset[Way]:
    return frozenset(way_as_measured(settings, peers, way) for way in cut)


@dataclass(frozen=True, slots=True)
class _Told:
    """What a node says: its curves by precision, none where it has nothing to measure with, how slow it is at present,
    and what it runs on.
    """

    curves: dict[str, Line]
    slowdown: float
    cores: Cores


async def _layers(name: str, peer: Peer, bundle: Bundle, plan_options: PlanOptions) -> _Told | LeftOut:
    """What a node says of its layers, or why it could not measure them."""
    try:
        async with asyncio.timeout(MEASURE_S):
            peer.link.send(wire.MeasureLayers(bundle.digest, plan_options.is_any_precision))
            answer = await peer.link.receive()
    except TimeoutError:
        await peer.link.close()
        return LeftOut(name, f"did not measure its layers within {MEASURE_S:.0f} s; is it swapping, or its disk stuck?")
    if isinstance(answer, wire.StageFailure):
        return LeftOut(name, f"could not measure its layers: {answer.reason}")
    measured = wire.expect(answer, wire.LayersMeasured, name)
    return _Told(
        curves_from_text(measured.curves, name),
        max(rounded(measured.slowdown_permille / 1000), 1.0),
        Cores(measured.machine, frozenset(measured.cores), measured.num_threads),
    )


def _devices(
    settings: NodeSettings,
    peers: Mapping[str, Peer],
    told: Mapping[str, _Told],
    loaded: Mapping[str, LoadedLayers],
    origin_ms: float,
    sure: str | None,
) -> list[Device]:
    """A node without a curve is taken for an average one, in the precision ``sure`` if there is one that every node can
    run; it learns its own from the first forwards that it runs. ``settings`` are those of the origin's own node, whose
    work is counted on all nodes of its machine. What nodes of one machine may have slowed each other by is no slowdown,
    for it is planned with.
    """
    usual = _average([answer.curves for answer in told.values() if answer.curves], sure)
    layers = {name: told[name].curves or usual for name in peers}
    cores, here = {name: answer.cores for name, answer in told.items()}, settings.cores.machine
    shares, crowds = core_shares(cores), crowding(cores)
    return [
        Device(
            node=name,
            free_memory_bytes=peer.free_memory_bytes,
            has_half_cache=peer.has_half_cache,
            layer=layers[name],
            stage_ms=STAGE_MS,
            beside_ms=origin_ms if name == settings.name or cores[name].machine == here != "" else 0.0,
            slowdown=max(told[name].slowdown / crowds[name], 1.0),
            loaded=_in_its_precision(loaded.get(name), layers[name], sure),
            machine=cores[name].machine,
            core_share=shares[name],
        )
        for name, peer in peers.items()
    ]


def _average(known: Sequence[Mapping[str, Line]], sure: str | None) -> dict[str, Line]:
    """The mean curve of each precision, of the precision ``sure`` alone where that is among them."""
    usual = {
        precision: Line(fmean(line.fixed for line in lines), fmean(line.per_row for line in lines))
        for precision in {name for curves in known for name in curves}
        for lines in [[curves[precision] for curves in known if precision in curves]]
    }
    return {sure: usual[sure]} if sure in usual else usual


def _in_its_precision(loaded: LoadedLayers | None, curves: Mapping[str, Line], sure: str | None) -> LoadedLayers | None:
    """A stage that was left its node's own precision has that of the only curve, or the bundle's of several curves."""
    if loaded is None or loaded.precision:
        return loaded
    return replace(loaded, precision=next(iter(curves)) if len(curves) == 1 else sure or "")
