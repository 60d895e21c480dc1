"""Which node serves which layers: what is known of devices, links and model, and the plan that follows from it.

The plan itself is made in core/planner.py. ``spread_layers`` is the equal split, for who wants it and where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowspec_edge.errors import PlacementError
from flowspec_edge.manifest import BlockEntry, Geometry, Manifest

WEIGHT_FACTOR = 1.2
"""Loading takes this much of the weights' size: ONNX Runtime packs them anew (x86, onnxruntime 1.32)."""
RUNTIME_BYTES = 60 * 2**20
"""What ONNX Runtime and Python take beside the weights (x86, onnxruntime 1.32)."""
KV_VALUE_BYTES = 4
"""Caches hold float32."""


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """A node that could serve layers, and the memory it may use for that, in bytes."""

    node: str
    free_memory_bytes: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers ``[start, stop)`` on a node, which need about ``memory_bytes`` there; where ``precision`` is empty, in the one that the
    node chooses.
    """

    node: str
    start: int
    stop: int
    memory_bytes: int
    precision: str = ""


@dataclass(frozen=True, slots=True)
class TimeLine:
    """Milliseconds for ``n`` rows: ``fixed_ms + n * row_ms``."""

    fixed_ms: float = 0.0
    row_ms: float = 0.0

    def at(self, num_rows: float) -> float:
        return self.fixed_ms + num_rows * self.row_ms

    def scaled(self, factor: float) -> TimeLine:
        return TimeLine(self.fixed_ms * factor, self.row_ms * factor)

    def __add__(self, other: TimeLine) -> TimeLine:
        return TimeLine(self.fixed_ms + other.fixed_ms, self.row_ms + other.row_ms)


@dataclass(frozen=True, slots=True)
class LoadedLayers:
    """Layers ``[start, stop)`` that a node has in memory."""

    start: int
    stop: int
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A node with what was measured of it.

    ``layer`` is a forward through one layer, by precision; ``last`` is what the last stage does beyond its layers, and
    ``stage_ms`` what any stage takes per chunk beside computing. ``beside_ms`` of other work falls to its processor in each
    interval: the head and a draft pass, where it is the origin. ``slowdown`` is how many times its curve a hot board takes.
    ``free_memory_bytes`` counts layers that are ``loaded`` as free.
    """

    node: str
    free_memory_bytes: int
    layer: Mapping[str, TimeLine]
    last: TimeLine = TimeLine()
    stage_ms: float = 0.0
    beside_ms: float = 0.0
    slowdown: float = 1.0
    loaded: LoadedLayers | None = None

    def stage(self, precision: str, num_layers: int, *, is_last: bool = False) -> TimeLine:
        """A stage of so many layers here."""
        line = self.layer[precision].scaled(num_layers) + (self.last if is_last else TimeLine())
        return line.scaled(self.slowdown) + TimeLine(self.stage_ms)


@dataclass(frozen=True, slots=True)
class Hop:
    """A link as measured: one way's latency, and how long a byte occupies it."""

    latency_ms: float
    ms_per_byte: float = 0.0

    @classmethod
    def from_rate(cls, latency_ms: float, mbit_per_s: float) -> Hop:
        return cls(latency_ms, 8 / (mbit_per_s * 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Hops by the names of their two ends; ``origin`` is the name of the node that asks, which may serve layers as well.

    A pair that was not measured is ``usual``.
    """

    origin: str
    usual: Hop
    measured: Mapping[tuple[str, str], Hop] = field(default_factory=dict)

    def between(self, start: str, end: str) -> Hop:
        if start == end:
            return Hop(0.0)
        return self.measured.get((start, end)) or self.measured.get((end, start)) or self.usual


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNeeds:
    """What a model asks of devices: consecutive ``blocks`` of layers, and bytes.

    ``block_bytes`` is a block's weights once loaded, by precision, of the largest block; ``kv_bytes`` a block's caches for the
    length limit; ``row_bytes`` one hidden row on the wire. ``head_ms`` is the head at the origin.
    """

    blocks: tuple[tuple[int, int], ...]
    block_bytes: Mapping[str, int]
    kv_bytes: int
    row_bytes: int
    head_ms: float

    @classmethod
    def from_manifest(cls, manifest: Manifest, *, num_tokens: int, head_ms: float) -> ModelNeeds:
        """For sessions of up to ``num_tokens``."""
        blocks = manifest.blocks
        widest = max(block.stop - block.start for block in blocks)
        return cls(
            blocks=tuple((block.start, block.stop) for block in blocks),
            block_bytes={
                precision: max(block.memory_bytes for block in manifest.blocks_of(0, blocks[-1].stop, precision))
                for precision in manifest.precisions
            },
            kv_bytes=kv_cache_bytes(manifest.geometry, widest, num_tokens),
            row_bytes=manifest.geometry.hidden_size * 4,
            head_ms=head_ms,
        )

    @property
    def layers_per_block(self) -> int:
        return max(stop - start for start, stop in self.blocks)

    def memory_bytes(self, precision: str, num_blocks: int) -> int:
        """What a stage of so many blocks needs on its node."""
        return (
            int(num_blocks * self.block_bytes[precision] * WEIGHT_FACTOR) + num_blocks * self.kv_bytes + RUNTIME_BYTES
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage of a plan: what it needs, what its node has left then, and what a chunk is expected to take, which is ``slowdown``
    times what its node's curve says.
    """

    node: str
    start: int
    stop: int
    memory_bytes: int
    precision: str
    left_bytes: int
    time: TimeLine
    slowdown: float = 1.0

    @property
    def stage_plan(self) -> StagePlan:
        return StagePlan(self.node, self.start, self.stop, self.memory_bytes)


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """A hop of a plan, from node to node or from or to the origin: its link as measured, and the bytes of a row on it."""

    start: str
    end: str
    link: Hop
    row_bytes: int

    def ms(self, num_rows: float, link: Hop | None = None) -> float:
        """For a chunk, over the link as it was measured, or as it is now."""
        over = link or self.link
        return over.latency_ms + num_rows * self.row_bytes * over.ms_per_byte


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A node that the plan does not use, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Instead:
    """What another choice would bring: ``node`` alone, or one more like it."""

    node: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A ring and what it is expected to bring with chunks of ``num_rows``; see core/throughput.py for trip and interval.

    ``head_ms`` is the part of the trip that the origin itself takes; ``hops`` are those of a trip in order.
    """

    stages: tuple[PlannedStage, ...]
    num_rows: int
    trip_ms: float
    interval_ms: float
    tokens_per_s: float
    head_ms: float = 0.0
    hops: tuple[PlannedHop, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    alone: Instead | None = None
    one_more: Instead | None = None
    is_kept: bool = False
    """Whether it is what is loaded already, because nothing else is clearly better."""


def kv_cache_bytes(geometry: Geometry, num_layers: int, num_tokens: int) -> int:
    """Keys and values of one session."""
    return 2 * num_layers * num_tokens * geometry.num_kv_heads * geometry.head_dim * KV_VALUE_BYTES


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
            f"the model needs {mib(stage_memory_bytes(blocks))} and runtime room of {mib(RUNTIME_BYTES)} per node; "
            f"the {len(offers)} nodes found have {', '.join(f'{o.node} {mib(o.free_memory_bytes)}' for o in offers)} free, "
            f"so layers [{left[0].start}, {left[-1].stop}) have no place: add a node (flowspec node) or use a smaller precision"
        )
    return plans


def stage_memory_bytes(blocks: Sequence[BlockEntry]) -> int:
    """What a stage of these blocks needs on its node."""
    return int(sum(block.memory_bytes for block in blocks) * WEIGHT_FACTOR) + RUNTIME_BYTES


def mib(num_bytes: int) -> str:
    """A size as users read it."""
    return f"{num_bytes / 2**20:.0f} MiB"
