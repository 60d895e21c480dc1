"""Which node serves which layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowspec_edge.errors import PlacementError
from flowspec_edge.manifest import BlockEntry

WEIGHT_FACTOR = 1.2
"""Loading takes this much of the weights' size: ONNX Runtime packs them anew (x86, onnxruntime 1.32)."""
RUNTIME_BYTES = 60 * 2**20
"""What ONNX Runtime and Python take beside the weights (x86, onnxruntime 1.32)."""


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """A node that could serve layers, and the memory it may use for that, in bytes."""

    node: str
    free_memory_bytes: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers ``[start, stop)`` on a node, which need about ``memory_bytes`` there."""

    node: str
    start: int
    stop: int
    memory_bytes: int


def spread_layers(blocks: Sequence[BlockEntry], offers: Sequence[NodeOffer]) -> list[StagePlan]:
    """Equal shares of consecutive blocks, in the order of ``offers``, a node taking fewer where its memory ends.

    With more nodes than blocks the last ones stay out.

    Raises:
        PlacementError: no node, or the model does not fit into the memory of all of them.
    """
    if not offers:
        raise PlacementError("no node offers to serve layers; start one with: flowspec node")
    plans: list[StagePlan] = []
    left = list(blocks)
    for position, offer in enumerate(offers):
        share = -(-len(left) // (len(offers) - position))  # rounded up
        while share and stage_memory_bytes(left[:share]) > offer.free_memory_bytes:
            share -= 1
        if share:
            mine, left = left[:share], left[share:]
            plans.append(StagePlan(offer.node, mine[0].start, mine[-1].stop, stage_memory_bytes(mine)))
    if left:
        raise PlacementError(
            f"the model needs {_mib(stage_memory_bytes(blocks))} and runtime room of {_mib(RUNTIME_BYTES)} per node; "
            f"the {len(offers)} nodes found have {', '.join(f'{o.node} {_mib(o.free_memory_bytes)}' for o in offers)} free, "
            f"so layers [{left[0].start}, {left[-1].stop}) have no place: add a node (flowspec node) or use a smaller precision"
        )
    return plans


def stage_memory_bytes(blocks: Sequence[BlockEntry]) -> int:
    """What a stage of these blocks needs on its node."""
    return int(sum(block.memory_bytes for block in blocks) * WEIGHT_FACTOR) + RUNTIME_BYTES


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
