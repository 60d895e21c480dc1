"""The same 7B model over 4 to 32 boards: what drafts bring over plain decoding, and by what that is bounded.

    python -m benchmarks.many_boards                          on the virtual clock, temperature 0.6, two prompts a set
    python -m benchmarks.many_boards --boards 4,32 --temperature 0 --num-prompts 4 --json

All boards together compute as much as those of ``jetson4-7b-fp16-1gbit``, each its share, and each adds a hop of 1 ms.
Means over the prompt sets, without outputs that repeat themselves. docs/performance.md says what the bound is; it is
that of the rows that were under way.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

from flowspec_edge.bench.compare import YARDSTICK, Bench, Plan
from flowspec_edge.bench.report import build_report, format_table
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.testbed import StageCost, Testbed, load_testbed
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle

WHOLE = "jetson4-7b-fp16-1gbit"
SCHEDULES = ("autoregressive", YARDSTICK, "flowspec")
MAX_NEW_TOKENS = 96
HEADER = ["boards", "plain, tokens/s", "flowspec", "over plain", "of bound", "rows under way", "rows a chunk"]


def over_boards(whole: Testbed, number: int) -> Testbed:
    """The testbed's layers in as many equal shares, which may be parts of a layer."""
    board = StageCost(
        fixed_ms=sum(stage.fixed_ms for stage in whole.stages) / number,
        row_ms=sum(stage.row_ms for stage in whole.stages) / number,
        num_layers=max(whole.num_layers // number, 1),
    )
    return replace(whole, name=f"{number} boards", stages=(board,) * number)


def measure(request: Request, numbers: list[int]) -> list[dict[str, Any]]:
    """A row for each number of boards."""
    whole = load_testbed(request.testbeds)
    testbeds = tuple(over_boards(whole, number) for number in numbers)
    plan = Plan(testbeds=testbeds, schedules=SCHEDULES, max_new_tokens=MAX_NEW_TOKENS)
    bench = Bench(Bundle.load(DEMO_BUNDLE))
    outcomes = [bench.run(plan, task) for task in request.tasks(plan, num_quick=2)]
    found = []
    for number, testbed in zip(numbers, testbeds, strict=True):
        report = build_report(testbed, [outcome for outcome in outcomes if outcome], SCHEDULES, MAX_NEW_TOKENS)
        plain, ours = (report["mean"][name][request.temperatures] for name in ("autoregressive", "flowspec"))
        sets = [row for row in report["rows"] if row["schedule"] == "flowspec" and row["prompt_set"] != "looping"]
        found.append(
            {
                "boards": number,
                "plain_tokens_per_s": plain["tokens_per_s"],
                "tokens_per_s": ours["tokens_per_s"],
                "over_plain": ours["tokens_per_s"] / plain["tokens_per_s"],
                "share_of_bound": ours["share_of_bound"],
                "rows_in_flight": sum(row["rows_in_flight"] for row in sets) / len(sets),
                "rows_per_forward": sum(row["rows_per_forward"] for row in sets) / len(sets),
            }
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", default="4,8,16,32", metavar="N[,N]", help="default: %(default)s")
    parser.add_argument("--temperature", default="0.6", metavar="T", help="default: %(default)s")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="the first N prompts of each set (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    request = Request(WHOLE, ",".join(SCHEDULES), "quick", arguments.temperature, arguments.num_prompts)
    rows = measure(request, [int(number) for number in arguments.boards.split(",")])
    if arguments.json:
        print(json.dumps(rows))
        return
    cells = [
        [
            str(row["boards"]),
            f"{row['plain_tokens_per_s']:.2f}",
            f"{row['tokens_per_s']:.2f}",
            f"{row['over_plain']:.2f}",
            f"{row['share_of_bound']:.0%}",
            f"{row['rows_in_flight']:.0f}",
            f"{row['rows_per_forward']:.1f}",
        ]
        for row in rows
    ]
    print(format_table(HEADER, cells))


if __name__ == "__main__":
    main()
