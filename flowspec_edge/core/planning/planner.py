"""The planner: it chooses devices, their order, their layers and precisions, and explains the choice to the user."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from flowspec_edge.core.planning.choices import Choices, fits_of
from flowspec_edge.core.planning.placement import (
    CUT,
    Device,
    Hop,
    Instead,
    LeftOut,
    Links,
    ModelNeeds,
    Plan,
    PlannedHop,
    PlannedStage,
    StagePlan,
    mib,
)
from flowspec_edge.core.planning.ring_problem import FoundRing, fastest_ring, rate_of
from flowspec_edge.core.planning.ring_search import RingSearch
from flowspec_edge.core.planning.settling import Loaded
from flowspec_edge.core.planning.shared_cores import groups_of
from flowspec_edge.core.planning.throughput import Throughput
from flowspec_edge.errors import NotMeasuredError, PlacementError

MAX_DEVICES = 16
"""The most devices that are weighed against each other, because every device doubles the number of subsets."""
KEEP_SHARE = 0.02
"""Loaded layers stay where they are while no other ring is better by more than this share. Curves are not measured
more exactly, and loading takes longer than so little saves.
"""


def plan_ring(devices: Sequence[Device], links: Links, model: ModelNeeds, throughput: Throughput) -> Plan:
    """Find the ring that is expected to bring the most tokens/s, and explain the choice.

    Raises:
        PlacementError: there is no device, the model does not fit into the memory of all devices together, or it would
            only fit into a ring with a way that is cut.
    """
    weighed, beyond = _quickest(devices, model)
    choices = Choices(weighed, links, model, throughput)
    if not any(choices.fits):
        raise PlacementError(_no_room(devices, model))
    search = RingSearch(choices.problem())
    ring = search.best()
    if ring is None:
        raise PlacementError(_no_room(devices, model))
    loaded = Loaded(choices, search)
    kept = loaded.ring()
    is_kept = rate_of(kept) >= rate_of(ring) * (1 - KEEP_SHARE)
    ring = kept if kept is not None and is_kept else loaded.settled(ring)
    plan = plan_of(choices, ring)
    if (cut := next((hop for hop in plan.hops if hop.link is CUT), None)) is not None:
        raise PlacementError(f"{_no_room(devices, model)}; {cut.start} and {cut.end} cannot reach each other")
    alone = _best_alone(choices, search)
    like = alone.node if alone is not None else min(weighed, key=lambda device: _layer_ms(device)).node
    return replace(
        plan,
        left_out=(*_left_out(choices, search, ring), *beyond),
        alone=alone,
        one_more=_one_more(choices, like, ring),
        is_kept=is_kept,
    )


def plan_shares(
    shares: Sequence[StagePlan], devices: Sequence[Device], links: Links, model: ModelNeeds, throughput: Throughput
) -> Plan:
    """What layers that are dealt like this are expected to bring.

    Raises:
        NotMeasuredError: one of the nodes is none of the devices, about which something is known.
        PlacementError: the layers of a node and their caches do not fit into its memory, as far as that is known.
    """
    by_name = {device.node: device for device in devices}
    if unknown := [share.node for share in shares if share.node not in by_name]:
        raise NotMeasuredError(f"nothing is known of {', '.join(unknown)}")
    choices = Choices([by_name[share.node] for share in shares], links, model, throughput)
    counts = [sum(share.start <= start < share.stop for start, _ in model.blocks) for share in shares]
    ring = fastest_ring(choices.problem(), range(len(shares)), counts)
    if math.isinf(ring.trip_ms):
        raise PlacementError(_no_room(choices.devices, model))
    return plan_of(choices, ring)


def plan_of(choices: Choices, ring: FoundRing) -> Plan:
    """The plan of a ring that was found, without what other choices would bring."""
    return Plan(
        stages=_stages(choices, ring),
        num_rows=ring.num_rows,
        trip_ms=ring.trip_ms,
        interval_ms=ring.interval_ms,
        tokens_per_s=ring.tokens_per_s,
        head_ms=choices.model.head_ms,
        hops=_hops(choices, ring),
        sharing=_sharing(choices, ring),
        schedule=choices.throughput.schedule,
        acceptance=choices.throughput.acceptance,
    )


def _quickest(devices: Sequence[Device], model: ModelNeeds) -> tuple[list[Device], list[LeftOut]]:
    """The quickest devices, at most MAX_DEVICES, in the order given; and why the others are left out."""
    order = sorted(range(len(devices)), key=lambda i: (not fits_of(devices[i], model), _layer_ms(devices[i])))
    reason = f"only the {MAX_DEVICES} quickest devices are weighed against each other"
    beyond = [LeftOut(devices[i].node, reason) for i in sorted(order[MAX_DEVICES:])]
    return [devices[i] for i in sorted(order[:MAX_DEVICES])], beyond


def _layer_ms(device: Device) -> float:
    return min(device.stage(precision, 1).at(1) for precision in device.layer)


def _stages(choices: Choices, ring: FoundRing) -> tuple[PlannedStage, ...]:
    stages: list[PlannedStage] = []
    first = 0
    for i, count in zip(ring.order, ring.num_blocks, strict=True):
        device, blocks = choices.devices[i], choices.model.blocks[first : first + count]
        first += count
        precision = choices.precision(i, count, ring.num_rows)
        memory_bytes = choices.model.memory_bytes_on(device, precision, count)
        start, stop = blocks[0][0], blocks[-1][1]
        stages.append(
            PlannedStage(
                node=device.node,
                start=start,
                stop=stop,
                memory_bytes=memory_bytes,
                precision=precision,
                left_bytes=device.free_memory_bytes - memory_bytes,
                time=device.stage(precision, stop - start, is_last=len(stages) == len(ring.order) - 1),
                slowdown=device.slowdown,
            )
        )
    return tuple(stages)


def _hops(choices: Choices, ring: FoundRing) -> tuple[PlannedHop, ...]:
    links = choices.links
    nodes = [links.origin, *(choices.devices[i].node for i in ring.order), links.origin]
    return tuple(
        PlannedHop(start, end, links.between(start, end), choices.row_bytes(is_first=at == 0))
        for at, (start, end) in enumerate(itertools.pairwise(nodes))
    )


def _sharing(choices: Choices, ring: FoundRing) -> tuple[tuple[str, ...], ...]:
    serving = [choices.devices[i] for i in ring.order]
    groups = groups_of(device.machine for device in serving)
    return tuple(tuple(serving[at].node for at in group) for group in groups)


def _best_alone(choices: Choices, search: RingSearch) -> Instead | None:
    """The best device that can hold the whole model; None where there is none."""
    rings = [(search.best_of([i]), device.node) for i, device in enumerate(choices.devices)]
    found = [Instead(node, ring.tokens_per_s) for ring, node in rings if ring is not None]
    return max(found, key=lambda instead: instead.tokens_per_s, default=None)


def _one_more(choices: Choices, node: str, ring: FoundRing) -> Instead:
    """The tokens/s with one more device like ``node``, at the same switch, in addition to the devices of the ring."""
    links = choices.links
    near_ones = [device for i, device in enumerate(choices.devices) if i in ring.order or device.node == node]
    like = next(device for device in near_ones if device.node == node)
    ends = dict.fromkeys([*(device.node for device in near_ones), links.origin])
    name = f"another {node}"
    measured: dict[tuple[str, str], Hop] = dict(links.measured)
    near = [links.between(node, end) for end in ends if end != node]
    measured[name, node] = min(near, key=lambda hop: hop.latency_ms, default=links.usual)
    for end in ends:
        if end != node:
            measured[name, end], measured[end, name] = links.between(node, end), links.between(end, node)
    another = replace(like, node=name, beside_ms=0.0, beside_bytes=0, loaded=None, machine="")
    more = Choices([*near_ones, another], replace(links, measured=measured), choices.model, choices.throughput)
    return Instead(node, max(rate_of(RingSearch(more.problem()).best()), ring.tokens_per_s))


def _left_out(choices: Choices, search: RingSearch, ring: FoundRing) -> list[LeftOut]:
    """The devices that are not in the ring, each with the reason."""
    model = choices.model
    same_size = ring.num_rows in choices.throughput.chunk_rows(len(ring.order) + 1)
    found = []
    for i, device in enumerate(choices.devices):
        if i in ring.order:
            continue
        with_it = None
        if choices.fits[i]:
            with_it = search.best_of([*ring.order, i], ring.num_rows if same_size else None)
        if not choices.fits[i]:
            least = min(model.memory_bytes_on(device, precision, 1) for precision in device.layer)
            reason = f"{mib(device.free_memory_bytes)} free; a stage of the fewest layers needs {mib(least)}"
        elif with_it is not None and any(hop.link is CUT for hop in _hops(choices, with_it)):
            reason = "cannot reach the nodes that would be its neighbours"
        elif with_it is None:
            reason = f"the model has {len(model.blocks)} blocks of layers, and each node of the ring serves one already"
        else:
            reason = (
                f"would slow the ring: {with_it.tokens_per_s:.2f} tokens/s with it, {ring.tokens_per_s:.2f} without"
            )
            if mates := [choices.devices[k].node for k in ring.order if choices.are_mates(i, k)]:
                reason += f"; {mates[0]} has its cores"
        found.append(LeftOut(device.node, reason))
    return found


def _no_room(devices: Sequence[Device], model: ModelNeeds) -> str:
    if not devices:
        return "no node offers to serve layers; start one with: flowspec node"
    precision = min(model.block_bytes, key=lambda name: model.block_bytes[name])
    needed = model.memory_bytes(precision, len(model.blocks))
    free = ", ".join(f"{device.node} {mib(device.free_memory_bytes)}" for device in devices)
    return (
        f"the model needs {mib(needed)} on one node, caches included, and more on several; the {len(devices)} nodes "
        f"found have {free} free: add a node (flowspec node), shorten the sessions (--context), or use a smaller "
        "precision"
    )
