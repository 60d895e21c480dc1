"""A schedule of one's own against the built-in ones on the virtual clock: real model, real drafts, simulated boards.

python examples/own_schedule.py                  # the paper's boards
python examples/own_schedule.py pi5x4-3b-int4    # another testbed (flowspec bench --help names them), or my.toml
"""

import sys
from dataclasses import replace
from itertools import islice

from flowspec_edge.bench.compare import Bench, Task
from flowspec_edge.bench.testbed import load_testbed
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.speculation.schedules import register_schedule
from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule

CHUNK_ROWS, TREE_ROWS = 8, 120
MIN_SCORE = -5.0  # log of the chance that the target takes the whole path to a row


class Eager(Schedule):
    """The eight likeliest rows leave whenever the ring takes a chunk. Nothing is measured, nothing is waited for."""

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        if view.root not in view.sent:
            return [view.root]  # the one row that is surely part of the text
        if view.num_living_sent >= TREE_ROWS:
            return []
        return [id for id, _ in islice(view.unsent(MIN_SCORE), CHUNK_ROWS)]

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        drafting = view.drafting
        if len(drafting.scores) >= TREE_ROWS:
            return [] if view.num_unextended else None
        rows = drafting.next_pass(drafting.shape.width, view.max_depth, MIN_SCORE)
        return rows if rows or view.num_unextended else None  # None: the drafter has nothing to do


def main() -> None:
    register_schedule("eager", Eager)
    testbed = load_testbed(sys.argv[1] if len(sys.argv) > 1 else "jetson4-7b-fp16-1gbit")
    bench = Bench(Bundle.load(DEMO_BUNDLE))
    options = GenerateOptions(max_new_tokens=48)
    text = "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    tape = bench.record(Task(prompt_set="mine", seed=0, temperature=0.0, text=text), options)
    print(f"{testbed.summary}\n")
    for name in ("autoregressive", "chunked", "eager", "flowspec"):
        answer = bench.play(testbed, tape, replace(options, schedule=name))  # raises if the text is not the target's
        print(f"{name:16} {answer.tokens_per_s:6.2f} tokens/s, {answer.statistics.num_rows_sent:4} rows sent")


if __name__ == "__main__":
    main()
