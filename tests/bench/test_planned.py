"""What the planner's rings bring on the virtual clock, which is exact."""

import dataclasses
from collections.abc import Callable

import pytest

from flowspec_edge.bench.compare import Bench, Task
from flowspec_edge.bench.planned import known_of, plan_testbed, replanned
from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bench.testbed import StageCost, Testbed, describe_testbed, load_testbed, parse_testbed
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.planning.choices import Choices
from tests.core.planning.rings import every_ring
from tests.narrowing import present

NUM_TOKENS = 48
SETS = ("classes", "tables", "edits")


@pytest.fixture(scope="module")
def virtual_rate(bench: Bench) -> Callable[..., list[float]]:
    """Tokens/s of a text of each set on a testbed."""
    option = GenerateOptions(max_new_tokens=NUM_TOKENS)

    def rate(*testbeds: Testbed) -> list[float]:
        sums = [[0, 0.0] for _ in testbeds]
        for name in SETS:
            task = Task(prompt_set=name, seed=0, temperature=0, text=load_prompts()[name][0])
            tape = bench.record(task, option)
            for total, testbed in zip(sums, testbeds, strict=True):
                answer = bench.play(testbed, tape, option)
                total[0] += answer.num_decoded
                total[1] += answer.decode_s
        return [num_tokens / seconds for num_tokens, seconds in sums]

    return rate


def test_the_plan_of_unequal_boards_beats_the_equal_split(virtual_rate: Callable[..., list[float]]) -> None:
    testbed = load_testbed("unequal")
    assert [stage.forward_ms(0) for stage in testbed.stages] == [40.0, 40.0, 80.0, 80.0]
    plan = plan_testbed(testbed, "flowspec")
    equal, planned = virtual_rate(testbed, replanned(testbed, plan))
    assert planned >= 1.15 * equal
    assert plan.tokens_per_s == pytest.approx(planned, rel=0.35), "of another text than the curve was counted on"


@pytest.mark.parametrize("schedule", ["flowspec", "autoregressive"])
def test_the_plan_of_unequal_boards_is_the_best_of_all_rings(schedule: str) -> None:
    testbed = load_testbed("unequal")
    plan = plan_testbed(testbed, schedule, block_layers=4)
    problem = Choices(*known_of(testbed, schedule, block_layers=4)).problem()
    best = max(ring.tokens_per_s for ring in every_ring(problem))
    assert plan.tokens_per_s == pytest.approx(best, rel=1e-9)


def test_boards_that_cannot_hold_it_alone_share_by_their_speed(virtual_rate: Callable[..., list[float]]) -> None:
    testbed = load_testbed("unequal")
    held = tuple(dataclasses.replace(stage, memory_bytes=2700 * 2**20) for stage in testbed.stages)
    tight = dataclasses.replace(testbed, stages=held, layer_bytes=200 * 2**20)
    plan = plan_testbed(tight, "flowspec")
    served = [stage.stop - stage.start for stage in plan.stages]
    assert len(served) == 4 and max(served) == 12
    equal, planned = virtual_rate(tight, replanned(tight, plan))
    assert planned >= 1.1 * equal, (
        "1.13 to 1.22 times on six texts; rounding, and so these three, differ between processors"
    )


def test_a_board_twice_as_fast_alone_as_the_ring_works_alone(virtual_rate: Callable[..., list[float]]) -> None:
    slow = StageCost(fixed_ms=100, row_ms=1.0, num_layers=8, device="slow")
    base = dataclasses.replace(load_testbed("unequal"), stages=(slow,) * 4)
    fast = StageCost(fixed_ms=16, row_ms=0.16, num_layers=8, device="fast")
    testbed = dataclasses.replace(base, stages=(*base.stages, fast))
    plan = plan_testbed(testbed, "flowspec")
    assert [stage.node for stage in plan.stages] == ["5: fast"]
    assert present(plan.alone).node == "5: fast" and present(plan.alone).tokens_per_s == plan.tokens_per_s
    ring, alone = virtual_rate(base, replanned(testbed, plan))
    assert alone > 2 * ring


def test_a_planned_testbed_can_be_written_and_read(two_stages: Testbed) -> None:
    again = parse_testbed(describe_testbed(two_stages, "for a test"), two_stages.name, "here")
    assert dataclasses.replace(again, summary="") == dataclasses.replace(
        two_stages, stages=tuple(dataclasses.replace(stage, device="a board") for stage in two_stages.stages)
    )
