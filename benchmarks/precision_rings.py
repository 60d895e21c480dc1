"""Which precision a ring is quickest in: tokens/s of each over 1 to 4 machines alike, on the virtual clock.

    python -m benchmarks.precisions --bundle DIR --json > rows.json
    python -m benchmarks.precision_rings rows.json                     a model's layers as they were measured here
    python -m benchmarks.precision_rings rows.json --layers 28 --hidden-size 3072 --head-ms 5 --draft-ms 25 --json

The file has a line for each precision, with its milliseconds for all layers by the rows of a chunk (``cpu_ms``). A
line is fitted to these, and each machine takes its part of it. Head, draft head and network
are the same in all precisions: 1 Gbit/s, and 1 ms a hop. Texts and drafts are those of the demo model, two prompts of
each set, without outputs that repeat themselves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.bench.compare import YARDSTICK, Bench, Plan
from flowspec_edge.bench.report import build_report, format_table
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.testbed import StageCost, Testbed
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core.line import fit_line

SCHEDULES = ("autoregressive", YARDSTICK, "flowspec")
MAX_NEW_TOKENS = 96


def ring_of(
    row: Mapping[str, Any], number: int, *, num_layers: int, hidden_size: int, head_ms: float, draft_ms: float
) -> Testbed:
    """``number`` machines, each of which runs its part of all layers in a row's precision."""
    times = row["cpu_ms"]
    part = fit_line([float(size) for size in times], list(times.values())).scaled(1 / number)
    return Testbed(
        name=f"{row['precision']}, {number} machines",
        stages=(StageCost(fixed_ms=part.fixed, row_ms=part.per_row, num_layers=num_layers // number),) * number,
        hop_ms=1.0,
        rate_mbit_per_s=1000,
        hidden_bytes=4 * hidden_size,
        head_ms=head_ms,
        draft_pass_ms=draft_ms,
        draft_row_ms=draft_ms / 10,
    )


def measure(request: Request, rings: Sequence[Testbed]) -> list[dict[str, float]]:
    """Tokens/s on each ring by schedule."""
    plan = Plan(testbeds=tuple(rings), schedules=SCHEDULES, max_new_tokens=MAX_NEW_TOKENS)
    bench = Bench(Bundle.load(DEMO_BUNDLE))
    outcomes = [outcome for task in request.tasks(plan, num_quick=2) if (outcome := bench.run(plan, task))]
    found = []
    for ring in rings:
        mean = build_report(ring, outcomes, SCHEDULES, MAX_NEW_TOKENS)["mean"]
        found.append({name: mean[name][request.temperatures]["tokens_per_s"] for name in SCHEDULES})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, metavar="FILE")
    parser.add_argument("--machines", default="1,2,4", metavar="N[,N]", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=30, metavar="N", help="SmolLM2's by default")
    parser.add_argument("--hidden-size", type=int, default=576, metavar="N", help="SmolLM2's by default")
    parser.add_argument("--head-ms", type=float, default=5.0, metavar="MS", help="default: %(default)s")
    parser.add_argument("--draft-ms", type=float, default=5.0, metavar="MS", help="a pass; default: %(default)s")
    parser.add_argument("--num-prompts", type=int, metavar="N", help="the first N prompts of each set (default: 2)")
    parser.add_argument("--temperature", default="0.6", metavar="T", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print a line for each precision as JSON")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.rows.read_text().splitlines()]
    numbers = [int(number) for number in arguments.machines.split(",")]
    costs: dict[str, Any] = {
        "num_layers": arguments.layers,
        "hidden_size": arguments.hidden_size,
        "head_ms": arguments.head_ms,
        "draft_ms": arguments.draft_ms,
    }
    rings = [ring_of(row, number, **costs) for row in rows for number in numbers]
    rates = measure(Request("", ",".join(SCHEDULES), "quick", arguments.temperature, arguments.num_prompts), rings)
    table = []
    for place, row in enumerate(rows):
        of_row = rates[place * len(numbers) : (place + 1) * len(numbers)]
        if arguments.json:
            print(json.dumps({"precision": row["precision"], **dict(zip(numbers, of_row, strict=True))}))
        table.append(
            [f"`{row['precision']}`", *(f"{rate['autoregressive']:.1f}, {rate['flowspec']:.1f}" for rate in of_row)]
        )
    if not arguments.json:
        print(format_table(["plain and `flowspec`, tokens/s", *(f"{number} machines" for number in numbers)], table))


if __name__ == "__main__":
    main()
