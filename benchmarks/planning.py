"""What the origin's own planning costs: its core alone, run again on events that were recorded on the virtual clock.

    python -m benchmarks.planning                        three texts on jetson4-7b-int4-1gbit
    python -m benchmarks.planning --temperature 0 --testbed jetson4-7b-fp16-1gbit --json

Each text is written once on the virtual clock, with the origin's journal kept. Then its core alone is told the same
events NUM_REPLAYS times, and answers the same. An event costs what it took at the least, in processor time of this
thread: what else the machine does can only add to it. The prompt's part, up to the first token, is left out.

Two events plan: a pass of the drafter that has finished, and the head. After them rows are scored, and what leaves next
and what is drafted next is chosen anew.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowspec_edge.bench.compare import Bench
from flowspec_edge.bench.replay import read_journal, replay
from flowspec_edge.bench.report import format_table
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.virtual_clock import SESSION
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core.speculation.origin import Origin

NUM_REPLAYS = 5
PLANNING = (ev.DraftFinished, ev.HeadFinished)
SIZES = (100, 200, 300, 400)
"""Where sizes of the tree are cut, in draft rows."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one event after the prompt cost: its kind, the draft rows before it, and the tokens that it brought."""

    kind: type[Any]
    num_rows: int
    num_tokens: int
    seconds: float


def record_texts(bench: Bench, request: Request, schedule: str) -> list[bytes]:
    """The origin's journal of each text."""
    plan = request.plan([schedule], usual_tokens=96)
    journals = []
    for task in request.tasks(plan, num_quick=1):
        options = replace(task.options(plan), schedule=schedule)
        tape = bench.record(task, options)
        for testbed in plan.testbeds:
            parts: list[bytes] = []
            bench.play(testbed, tape, options, write=parts.append)
            journals.append(b"".join(parts))
    return journals


def measure(journal: bytes) -> list[Cost]:
    """The costs of a journal's events. Raises AssertionError where the core answers otherwise than it did."""
    assert all(step.is_same for step in replay(read_journal(journal)))
    recorded = read_journal(journal)
    entries = list(recorded.entries)
    assert not recorded.is_full, "the journal has not the whole text"
    gc.collect()
    gc.freeze()  # what was loaded before is not the core's, and the collector need not look through it
    least = [float("inf")] * len(entries)
    for _ in range(NUM_REPLAYS):
        origin = Origin(**recorded.arguments)
        found: list[Cost] = []
        has_begun = False
        for place, entry in enumerate(entries):
            num_rows = origin.num_drafted(SESSION)
            began = time.thread_time()
            actions = origin.handle(entry.event, entry.now)
            origin.next_deadline()
            least[place] = min(least[place], time.thread_time() - began)
            num_tokens = sum(len(action.tokens) for action in actions if isinstance(action, ev.EmitTokens))
            if has_begun:
                found.append(Cost(type(entry.event), num_rows, num_tokens, least[place]))
            has_begun = has_begun or num_tokens > 0
    return found


def summarise(costs: Sequence[Cost]) -> dict[str, Any]:
    """Microseconds: of the events that plan, of all events per token, by kind of event and by size of the tree."""
    planning = [cost for cost in costs if cost.kind in PLANNING]
    num_tokens = sum(cost.num_tokens for cost in costs)
    bounds = [0, *SIZES, 10**9]
    return {
        "tokens": num_tokens,
        "planning": _spread(planning),
        "us_per_token": 1e6 * sum(cost.seconds for cost in costs) / num_tokens,
        "by_kind": {
            name: _spread([cost for cost in costs if cost.kind.__name__ == name])
            for name in sorted({cost.kind.__name__ for cost in costs})
        },
        "by_rows": {
            f"{first} to {last - 1}" if last < bounds[-1] else f"{first} or more": _spread(found)
            for first, last in itertools.pairwise(bounds)
            if (found := [cost for cost in planning if first <= cost.num_rows < last])
        },
    }


def format_summary(summary: dict[str, Any]) -> str:
    found = {"events that plan": summary["planning"]}
    found |= {f"- with {size} draft rows": spread for size, spread in summary["by_rows"].items()}
    found |= summary["by_kind"]
    table = format_table(
        ["", "events", "p50, us", "p90, us"],
        [
            [name, f"{spread['events']}", f"{spread['p50_us']:.0f}", f"{spread['p90_us']:.0f}"]
            for name, spread in found.items()
        ],
    )
    return f"{table}\n\n{summary['us_per_token']:.0f} us per token ({summary['tokens']} tokens)"


def _spread(costs: Sequence[Cost]) -> dict[str, float]:
    times = sorted(1e6 * cost.seconds for cost in costs)
    return {"events": len(times), "p50_us": statistics.median(times), "p90_us": times[int(0.9 * len(times))]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--testbed", default="jetson4-7b-int4-1gbit")
    parser.add_argument("--schedule", default="flowspec")
    parser.add_argument("--prompts", default="functions,tables,edits")
    parser.add_argument("--num-prompts", type=int, default=1, help="of each set")
    parser.add_argument("--temperature", default="0.6")
    parser.add_argument("--bundle", type=Path, help="instead of the demo model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    request = Request(options.testbed, options.schedule, options.prompts, options.temperature, options.num_prompts)
    bench = Bench(Bundle.load(options.bundle or DEMO_BUNDLE))
    journals = record_texts(bench, request, options.schedule)
    summary = summarise([cost for journal in journals for cost in measure(journal)])
    print(json.dumps(summary) if options.json else format_summary(summary))


if __name__ == "__main__":
    main()
