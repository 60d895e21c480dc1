"""Plans a ring of a testbed's boards, and makes the testbed in which the layers are dealt as planned."""

from __future__ import annotations

from dataclasses import replace

from flowspec_edge.bench.testbed import StageCost, Testbed
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.placement import Device, Hop, Links, ModelNeeds, Plan
from flowspec_edge.core.planning.planner import plan_ring
from flowspec_edge.core.planning.standby import with_standbys
from flowspec_edge.core.planning.throughput import TYPICAL_DRAFTS, AcceptanceCurve, Throughput

ORIGIN = "origin"
PRECISION = "as described"
ENOUGH_BYTES = 2**50
"""The memory assumed of a board for which the testbed gives none."""


def plan_testbed(
    testbed: Testbed,
    schedule: str,
    *,
    acceptance: AcceptanceCurve = TYPICAL_DRAFTS,
    block_layers: int = 1,
    has_standbys: bool = False,
) -> Plan:
    """The plan for the testbed's boards and all of its layers, in blocks of ``block_layers``.

    Raises:
        PlacementError: the boards' memory is too small.
        RequestError: there is no such schedule.
    """
    known = known_of(testbed, schedule, acceptance=acceptance, block_layers=block_layers)
    plan = plan_ring(*known)
    return with_standbys(plan, *known) if has_standbys else plan


def known_of(
    testbed: Testbed, schedule: str, *, acceptance: AcceptanceCurve = TYPICAL_DRAFTS, block_layers: int = 1
) -> tuple[list[Device], Links, ModelNeeds, Throughput]:
    """What the planner needs to know, as a testbed describes it."""
    num_layers = testbed.num_layers
    blocks = tuple((start, min(start + block_layers, num_layers)) for start in range(0, num_layers, block_layers))
    model = ModelNeeds(
        blocks=blocks,
        block_bytes={PRECISION: testbed.layer_bytes * block_layers},
        kv_bytes=0,
        row_bytes=testbed.hidden_bytes,
        head_ms=testbed.head_ms,
    )
    links = Links(origin=ORIGIN, usual=Hop.from_rate(testbed.hop_ms, testbed.rate_mbit_per_s))
    return devices_of(testbed), links, model, Throughput(schedule, acceptance, testbed.draft_pass_ms)


def devices_of(testbed: Testbed) -> list[Device]:
    """A device for each stage of the testbed, named by its number and board."""
    return [
        Device(
            node=f"{number}: {stage.device or 'board'}",
            free_memory_bytes=stage.memory_bytes or ENOUGH_BYTES,
            layer={PRECISION: Line(stage.fixed_ms, stage.row_ms).scaled(1 / stage.num_layers)},
        )
        for number, stage in enumerate(testbed.stages, 1)
    ]


def replanned(testbed: Testbed, plan: Plan) -> Testbed:
    """The testbed with its layers dealt as planned. It lacks the boards that the plan leaves out."""
    boards = dict(zip((device.node for device in devices_of(testbed)), testbed.stages, strict=True))
    stages = []
    for stage in plan.stages:
        board, num_layers = boards[stage.node], stage.stop - stage.start
        share = num_layers / board.num_layers
        cost = StageCost(
            fixed_ms=board.fixed_ms * share,
            row_ms=board.row_ms * share,
            num_layers=num_layers,
            device=board.device,
            memory_bytes=board.memory_bytes,
        )
        stages.append(cost)
    return replace(testbed, name=f"{testbed.name}-planned", stages=tuple(stages))
