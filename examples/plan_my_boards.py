"""Describes boards that need not be there, and asks the planner who should serve which layers.

    python examples/plan_my_boards.py

`flowspec bench --calibrate` measures the lines of a board that you have.
"""

from flowspec_edge.bench.planned import plan_testbed
from flowspec_edge.bench.testbed import StageCost, Testbed

# A forward of n rows takes fixed_ms + n * row_ms for num_layers layers. The model has the layers of all boards in sum.
PI_5 = StageCost(device="Pi 5", num_layers=8, fixed_ms=32.0, row_ms=10.0, memory_bytes=6 * 2**30)
MINI_PC = StageCost(device="mini-PC", num_layers=8, fixed_ms=20.0, row_ms=2.5, memory_bytes=12 * 2**30)
PI_4 = StageCost(device="Pi 4", num_layers=8, fixed_ms=110.0, row_ms=38.0, memory_bytes=3 * 2**30)

MY_BOARDS = Testbed(
    name="mine",
    stages=(MINI_PC, PI_5, PI_5, PI_4),
    hop_ms=1.0,  # latency of one message
    rate_mbit_per_s=1000.0,
    hidden_bytes=3072 * 2,  # of one row on the wire: hidden size times bytes per value
    head_ms=5.0,  # the head, at the machine that asks
    draft_pass_ms=20.0,
    draft_row_ms=2.0,
    layer_bytes=60 * 2**20,
)


def main() -> None:
    for schedule in ("flowspec", "autoregressive"):
        plan = plan_testbed(MY_BOARDS, schedule)
        print(f"{schedule}: {plan.tokens_per_s:.2f} tokens/s, {plan.trip_ms:.0f} ms for a trip")
        for stage in plan.stages:
            print(f"  {stage.node:12} layers [{stage.start}, {stage.stop})")
        for out in plan.left_out:
            print(f"  {out.node:12} left out: {out.reason}")
        if plan.one_more is not None:
            print(f"  one more board like {plan.one_more.node}: {plan.one_more.tokens_per_s:.2f} tokens/s")


if __name__ == "__main__":
    main()
