"""Rings of equal shares go around ways that are cut: compared with trying every order."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.planning.detours import around_cut_ways
from flowspec_edge.core.planning.losses import way_between
from flowspec_edge.core.planning.placement import NodeOffer

NAMES = ["attic", "cellar", "hall", "kitchen"]
ENDS = [*NAMES, "origin"]
WAYS = [way_between(*pair) for pair in itertools.combinations(ENDS, 2)]


def is_whole(order: tuple[str, ...], cut: set[tuple[str, str]]) -> bool:
    return not cut & {way_between(*hop) for hop in itertools.pairwise(("origin", *order, "origin"))}


@given(st.sets(st.sampled_from(WAYS)))
def test_as_many_nodes_as_possible_make_a_ring(cut: set[tuple[str, str]]) -> None:
    offers = [NodeOffer(name, 2**number) for number, name in enumerate(NAMES)]
    order = tuple(offer.node for offer in around_cut_ways(offers, cut, "origin"))
    rings = [ring for size in range(1, 5) for ring in itertools.permutations(NAMES, size) if is_whole(ring, cut)]
    assert (order in rings) if rings else order == ()
    if rings:
        worth = {name: 2**number for number, name in enumerate(NAMES)}
        best = max(rings, key=lambda ring: (len(ring), sum(worth[name] for name in ring)))
        assert set(order) == set(best)


def test_the_order_given_is_kept_where_it_can_be() -> None:
    offers = [NodeOffer(name, 1) for name in NAMES]
    for cut in (set(), {way_between("gone", "attic")}, {way_between("attic", "kitchen")}):
        assert around_cut_ways(offers, cut, "origin") == offers
    order = around_cut_ways(offers, {way_between("attic", "cellar")}, "origin")
    assert sum(order.index(a) > order.index(b) for a, b in itertools.combinations(offers, 2)) == 1
