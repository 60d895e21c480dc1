"""Equal shares, memory limits, and what is said when the model does not fit."""

import dataclasses
import json
from collections.abc import Sequence

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.core.planning.placement import (
    RUNTIME_BYTES,
    NodeOffer,
    StagePlan,
    origin_memory_bytes,
    spread_layers,
    stage_memory_bytes,
)
from flowspec_edge.errors import PlacementError
from flowspec_edge.manifest import BlockEntry, load_manifest
from tests.narrowing import present

MIB = 2**20


def make_blocks(num_blocks: int, memory_bytes: int = 100 * MIB) -> list[BlockEntry]:
    return [
        BlockEntry(file=f"{i}", num_bytes=1, sha256="", start=i, stop=i + 1, memory_bytes=memory_bytes)
        for i in range(num_blocks)
    ]


def test_what_the_origin_loads_counts_as_its_bundle_says_or_as_its_files() -> None:
    manifest = load_manifest(DEMO_BUNDLE)
    head, drafter = manifest.head, present(manifest.drafter)
    told = dataclasses.replace(
        manifest,
        head=dataclasses.replace(head, memory_bytes=5 * MIB),
        drafter=dataclasses.replace(drafter, memory_bytes=7 * MIB),
    )
    assert origin_memory_bytes(told) == 12 * MIB
    older = dataclasses.replace(
        manifest,
        head=dataclasses.replace(head, memory_bytes=0),
        drafter=dataclasses.replace(drafter, memory_bytes=0, top=head),
    )
    assert origin_memory_bytes(older) == 2 * head.num_bytes + drafter.num_bytes
    assert "memory_bytes" not in json.loads(older.to_json())["head"], "a digest stays what it was"


def ranges(plans: Sequence[StagePlan]) -> list[tuple[str, int, int]]:
    return [(plan.node, plan.start, plan.stop) for plan in plans]


def test_equal_shares_in_the_order_of_offers() -> None:
    offers = [NodeOffer(name, 10**12) for name in "abc"]
    assert ranges(spread_layers(make_blocks(8), offers)) == [("a", 0, 3), ("b", 3, 6), ("c", 6, 8)]


def test_a_node_with_little_memory_takes_fewer_layers() -> None:
    blocks = make_blocks(8)
    offers = [NodeOffer("small", stage_memory_bytes(blocks[:1])), NodeOffer("large", 10**12)]
    assert ranges(spread_layers(blocks, offers)) == [("small", 0, 1), ("large", 1, 8)]


def test_a_node_without_room_stays_out() -> None:
    offers = [NodeOffer("tiny", RUNTIME_BYTES), NodeOffer("large", 10**12)]
    assert ranges(spread_layers(make_blocks(4), offers)) == [("large", 0, 4)]


def test_more_nodes_than_blocks() -> None:
    offers = [NodeOffer(name, 10**12) for name in "abc"]
    assert ranges(spread_layers(make_blocks(2), offers)) == [("a", 0, 1), ("b", 1, 2)]


def test_no_node_and_not_enough_memory_are_errors_with_a_remedy() -> None:
    with pytest.raises(PlacementError, match="flowspec node"):
        spread_layers(make_blocks(2), [])
    with pytest.raises(PlacementError, match=r"layers \[1, 8\) have no place: add a node"):
        spread_layers(make_blocks(8), [NodeOffer("small", stage_memory_bytes(make_blocks(1)))])
