"""Orders nodes so that no two neighbours of a ring are cut off from each other, for rings that no planner orders."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from flowspec_edge.core.planning.losses import Way, way_between
from flowspec_edge.core.planning.placement import NodeOffer
from flowspec_edge.core.planning.planner import MAX_DEVICES
from flowspec_edge.core.planning.ring_order import read_order, shortest_paths


def around_cut_ways(offers: Sequence[NodeOffer], cut: Collection[Way], origin: str) -> list[NodeOffer]:
    """As many of the nodes as can make a ring with the origin without a way that is cut, in an order that does.

    Of several choices it is the one with the most memory, and then the one closest to the order given. Where ways
    between them are cut, MAX_DEVICES nodes are considered.
    """
    ends = {offer.node for offer in offers} | {origin}
    if not any(ends.issuperset(way) for way in cut):
        return list(offers)
    offers = offers[:MAX_DEVICES]
    names = [*(offer.node for offer in offers), origin]
    hop = np.array([[max(i - j, 0.0) for j in range(len(names))] for i in range(len(names))])  # how far out of order
    hop[-1] = 0.0
    hop[[[way_between(a, b) in cut for b in names] for a in names]] = np.inf
    paths = shortest_paths(hop)
    ways = paths + hop[:-1, -1, None]  # [last device, subset]
    possible = np.flatnonzero(np.isfinite(ways).any(axis=0))
    if not len(possible):
        return []

    def worth(subset: int) -> tuple[int, int, float]:
        members = [offer.free_memory_bytes for i, offer in enumerate(offers) if subset >> i & 1]
        return len(members), sum(members), -float(ways[:, subset].min())

    subset = max(map(int, possible), key=worth)
    return [offers[i] for i in read_order(paths, hop, int(np.argmin(ways[:, subset])), subset)]
