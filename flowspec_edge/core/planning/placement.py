"""Which node serves which layers: what a planner knows of devices, links and model, and the plan that it makes.

Plans are made in core/planning/planner.py. ``spread_layers`` is the equal split, for users who want it and for cases in
which nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowspec_edge.config import RowKind
from flowspec_edge.core.limits import SLOTS_PER_STEP
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.losses import Way, way_between
from flowspec_edge.core.planning.throughput import NO_DRAFTS, AcceptanceCurve
from flowspec_edge.core.planning.working_memory import kv_cache_bytes, origin_work_bytes, stage_work_bytes
from flowspec_edge.core.row_kinds import value_bytes
from flowspec_edge.core.speculation.prefill import RingTimes
from flowspec_edge.errors import PlacementError
from flowspec_edge.manifest import BlockEntry, Manifest

LAYER_BYTES = 450_000
"""What a session keeps of a layer beside its matrices and what these need more than plain products: of itself, and of
each operator (x86, onnxruntime 1.32).
"""
WEIGHT_FACTOR = 1.05
"""What a stage takes of what its blocks do: the last one is in memory twice while it is packed (x86, onnxruntime
1.32). ``python -m benchmarks.precisions`` shows what layers take beside what is planned.
"""
RUNTIME_BYTES = 60 * 2**20
"""The memory that ONNX Runtime and Python take besides the weights (x86, onnxruntime 1.32)."""


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """A node that could serve layers, and the bytes of memory that it may use for them."""

    node: str
    free_memory_bytes: int


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers ``[start, stop)`` on a node, where they need about ``memory_bytes``.

    Where ``precision`` is empty, the node chooses it.
    """

    node: str
    start: int
    stop: int
    memory_bytes: int
    precision: str = ""


@dataclass(frozen=True, slots=True)
class LoadedLayers:
    """Layers ``[start, stop)`` that a node has in memory."""

    start: int
    stop: int
    precision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A node, and what was measured of it.

    Attributes:
        node: its name.
        free_memory_bytes: memory for layers; layers that are ``loaded`` count as free.
        layer: the time of a forward through one layer, by precision.
        last: the time that the last stage takes beyond its layers.
        stage_ms: what any stage on it takes per chunk besides computing.
        beside_ms: other work of its processor in each interval: where the origin runs, the head and a pass of the
            drafter.
        beside_bytes: what it needs beside any stage: on the origin, for the head and the drafter.
        slowdown: how many times as long as measured a hot board takes.
        loaded: layers that it has in memory.
        has_half_cache: whether it keeps keys and values in float16.
        machine: the same for all nodes that share the cores of one machine; empty where it has its own.
        core_share: the share of these cores that a stage on it keeps busy while it runs.
    """

    node: str
    free_memory_bytes: int
    layer: Mapping[str, Line]
    last: Line = Line()
    stage_ms: float = 0.0
    beside_ms: float = 0.0
    beside_bytes: int = 0
    slowdown: float = 1.0
    loaded: LoadedLayers | None = None
    has_half_cache: bool = False
    machine: str = ""
    core_share: float = 1.0

    def stage(self, precision: str, num_layers: int, *, is_last: bool = False) -> Line:
        """The time of a stage of ``num_layers`` on this device."""
        line = self.layer[precision].scaled(num_layers) + (self.last if is_last else Line())
        return line.scaled(self.slowdown) + Line(self.stage_ms)


@dataclass(frozen=True, slots=True)
class Hop:
    """A link as it was measured: the latency of one way, and how long a byte occupies the link."""

    latency_ms: float
    ms_per_byte: float = 0.0

    def time(self, row_bytes: int) -> Line:
        """The time of a chunk in ms, by its rows of so many bytes."""
        return Line(self.latency_ms, row_bytes * self.ms_per_byte)

    @classmethod
    def from_rate(cls, latency_ms: float, mbit_per_s: float) -> Hop:
        return cls(latency_ms, 8 / (mbit_per_s * 1000))


CUT = Hop(1e6)
"""What the way between two nodes counts as that cannot reach each other: no ring is better with it than without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """The links between nodes, by the names of their two ends. A pair that was not measured counts as ``usual``.

    ``origin`` is the name of the node that asks for the plan. It may serve layers as well. No plan uses the ways that
    are ``cut``.
    """

    origin: str
    usual: Hop
    measured: Mapping[tuple[str, str], Hop] = field(default_factory=dict)
    cut: frozenset[Way] = frozenset()

    def between(self, start: str, end: str) -> Hop:
        if start == end:
            return Hop(0.0)
        if way_between(start, end) in self.cut:
            return CUT
        return self.measured.get((start, end)) or self.measured.get((end, start)) or self.usual


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNeeds:
    """What a model needs: consecutive ``blocks`` of layers, and their sizes.

    ``block_bytes`` is the memory of the largest loaded block, by precision. ``kv_bytes`` is the size of a
    block's caches for sessions of the length limit, and ``row_bytes`` that of one hidden row on the wire. ``head_ms``
    is the time of the head at the origin. ``work_bytes`` are taken while a stage computes, by precision, and
    ``origin_bytes`` by head and drafter.
    """

    blocks: tuple[tuple[int, int], ...]
    block_bytes: Mapping[str, int]
    kv_bytes: int
    row_bytes: int
    head_ms: float
    work_bytes: Mapping[str, int] = field(default_factory=dict)
    origin_bytes: int = 0

    @classmethod
    def from_manifest(
        cls, manifest: Manifest, *, num_tokens: int, head_ms: float, row_kind: RowKind = "float32"
    ) -> ModelNeeds:
        """The needs of a bundle's model for sessions of up to ``num_tokens``, whose rows travel as ``row_kind``."""
        blocks = manifest.blocks
        widest = max(block.stop - block.start for block in blocks)
        geometry, num_slots = manifest.geometry, -(-num_tokens // SLOTS_PER_STEP) * SLOTS_PER_STEP
        return cls(
            blocks=tuple((block.start, block.stop) for block in blocks),
            block_bytes={
                precision: max(loaded_bytes(block) for block in manifest.blocks_of(0, blocks[-1].stop, precision))
                for precision in manifest.precisions
            },
            kv_bytes=kv_cache_bytes(geometry, widest, num_slots),
            row_bytes=geometry.hidden_size * value_bytes(row_kind),
            head_ms=head_ms,
            work_bytes={
                precision: stage_work_bytes(geometry, precision, num_slots) for precision in manifest.precisions
            },
            origin_bytes=origin_memory_bytes(manifest) + origin_work_bytes(manifest, num_slots),
        )

    @property
    def layers_per_block(self) -> int:
        return max(stop - start for start, stop in self.blocks)

    def memory_bytes_on(self, device: Device, precision: str, num_blocks: int) -> int:
        """The memory that ``device`` needs with a stage of ``num_blocks``, and beside it."""
        needed = self.memory_bytes(precision, num_blocks, has_half_cache=device.has_half_cache)
        return needed + device.beside_bytes

    def memory_bytes(self, precision: str, num_blocks: int, *, has_half_cache: bool = False) -> int:
        """The memory that a stage of ``num_blocks`` needs on its node.

        A node with caches in float16 turns those of one layer at a time into float32.
        """
        kv_bytes = num_blocks * self.kv_bytes
        if has_half_cache:
            kv_bytes = kv_bytes // 2 + self.kv_bytes // self.layers_per_block
        work_bytes = self.work_bytes.get(precision, 0)
        return self.standby_bytes(precision, num_blocks) + kv_bytes + work_bytes + RUNTIME_BYTES

    def standby_bytes(self, precision: str, num_blocks: int) -> int:
        """The memory that ``num_blocks`` take beside a stage, while nothing runs through them."""
        return int(num_blocks * self.block_bytes[precision] * WEIGHT_FACTOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStage:
    """A stage of a plan: layers ``[start, stop)`` on a node.

    The stage needs ``memory_bytes``, and leaves ``left_bytes`` to its node. ``time`` is what a chunk should take, in
    ms by rows: ``slowdown`` times what was measured of the node.
    """

    node: str
    start: int
    stop: int
    memory_bytes: int
    precision: str
    left_bytes: int
    time: Line
    slowdown: float = 1.0

    @property
    def stage_plan(self) -> StagePlan:
        return StagePlan(self.node, self.start, self.stop, self.memory_bytes)


@dataclass(frozen=True, slots=True)
class PlannedHop:
    """A hop of a plan from ``start`` to ``end``: its link as measured, and the bytes of a row on it."""

    start: str
    end: str
    link: Hop
    row_bytes: int

    def ms(self, num_rows: float, link: Hop | None = None) -> float:
        """The time of a chunk on this hop in ms, over its link as measured for the plan, or over ``link``."""
        return (link or self.link).time(self.row_bytes).at(num_rows)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A node that the plan does not use, and why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Instead:
    """The tokens/s of another choice: ``node`` alone, or one more device like ``node``."""

    node: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class StandbyLayers:
    """Layers ``[start, stop)`` that ``node`` has loaded beside its own, in ``memory_bytes``."""

    node: str
    start: int
    stop: int
    precision: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Standby:
    """What is prepared for the loss of ``node``, which serves layers ``[start, stop)``.

    The others then make the ring ``plan``, for which ``layers`` stand by. There is no plan where they have no room.
    """

    node: str
    start: int
    stop: int
    layers: tuple[StandbyLayers, ...] = ()
    plan: Plan | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A ring, and what it should bring with chunks of ``num_rows``.

    core/planning/throughput.py explains trip and interval. ``head_ms`` is the part of the trip that the origin itself
    takes, and ``hops`` are the hops of a trip in their order.
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
    standbys: tuple[Standby, ...] = ()
    """One for each stage, in their order, where standbys were asked for."""
    sharing: tuple[tuple[str, ...], ...] = ()
    """The nodes of stages that share the cores of one machine, for each machine that has several."""
    schedule: str = "flowspec"
    acceptance: AcceptanceCurve = NO_DRAFTS
    """What drafts are expected to bring."""
    is_kept: bool = False
    """Whether the plan keeps what is already loaded, because no other ring is clearly better."""

    @property
    def times(self) -> RingTimes:
        """What chunks should take of the ring."""
        return RingTimes(
            tuple(stage.time.scaled(1e-3) for stage in self.stages),
            tuple(hop.link.time(hop.row_bytes).scaled(1e-3) for hop in self.hops[1:]),
        )


def spread_layers(blocks: Sequence[BlockEntry], offers: Sequence[NodeOffer]) -> list[StagePlan]:
    """Give each node an equal share of consecutive blocks, in the order of ``offers``.

    A node without enough memory takes fewer blocks. With more nodes than blocks, the last nodes get none.

    Raises:
        PlacementError: there is no node, or the model does not fit into the memory of all nodes together.
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
            f"the {len(offers)} nodes found have {', '.join(f'{o.node} {mib(o.free_memory_bytes)}' for o in offers)} "
            f"free, so layers [{left[0].start}, {left[-1].stop}) have no place: add a node (flowspec node) or use a "
            "smaller precision"
        )
    return plans


def stage_memory_bytes(blocks: Sequence[BlockEntry]) -> int:
    """The memory that a stage of these blocks needs on its node."""
    return standby_memory_bytes(blocks) + RUNTIME_BYTES


def standby_memory_bytes(blocks: Sequence[BlockEntry]) -> int:
    """The memory that these blocks take on a node where they are loaded and nothing runs through them."""
    return sum(int(loaded_bytes(block) * WEIGHT_FACTOR) for block in blocks)


def loaded_bytes(block: BlockEntry) -> int:
    """The memory that a block takes once it is loaded."""
    return block.memory_bytes + (block.stop - block.start) * LAYER_BYTES


def origin_memory_bytes(manifest: Manifest) -> int:
    """The memory that head and drafter take at the origin; as much as their files where a bundle does not tell."""
    return sum(entry.memory_bytes or sum(file.num_bytes for file in entry.files()) for entry in manifest.origin_entries)


def mib(num_bytes: int) -> str:
    """A size as users read it."""
    return f"{num_bytes / 2**20:.0f} MiB"
