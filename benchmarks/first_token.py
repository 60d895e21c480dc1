"""How long a prompt takes to its first token on described boards, beside what the best sizes of its chunks would bring.

    python -m benchmarks.first_token                        2,000 tokens on every testbed
    python -m benchmarks.first_token --tokens 100 --testbed pi5x4-3b-int4 --json

On the virtual clock, where what is read is of no concern: the text is a row of numbers, and the drafter proposes
nothing that comes. Two yardsticks, each the least over all sizes of chunks. ``work`` is the time of all forwards,
divided by the number of stages as if each took its share, and one trip. ``slowest`` is the time of all chunks but one
at the slowest stage or wire, and one trip: no chunks of one size are through sooner. Where stages take the same time,
the two differ by the trip's own part of the work; where they do not, the first cannot be reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass

import numpy as np

from flowspec_edge.bench.known_testbeds import known_testbeds
from flowspec_edge.bench.report import format_table
from flowspec_edge.bench.simulated_ring import Watcher
from flowspec_edge.bench.tape import Tape
from flowspec_edge.bench.testbed import Testbed, load_testbed
from flowspec_edge.bench.virtual_clock import VirtualRing
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core.limits import MAX_CHUNK_ROWS
from flowspec_edge.core.speculation.generation import TargetLimits

NUM_TOKENS = 2000
VOCAB = 1000
HEADER = ["testbed", "rows", "first token, s", "over work", "over slowest", "second token, s", "trip, s"]


@dataclass(frozen=True, slots=True)
class FirstToken:
    """What a prompt took: ``rows`` of its first chunk, seconds to the first token and from there to the second, and the
    first one's time over each yardstick. ``trip_s`` is a single row's.
    """

    testbed: str
    rows: int
    first_s: float
    over_work: float
    over_slowest: float
    second_s: float
    trip_s: float

    @property
    def cells(self) -> list[str]:
        """Below HEADER."""
        figures = f"{self.first_s:.2f}", f"{self.over_work:.3f}", f"{self.over_slowest:.3f}"
        return [f"`{self.testbed}`", str(self.rows), *figures, f"{self.second_s:.3f}", f"{self.trip_s:.3f}"]


class WrongDrafter:
    """Proposes a token that never comes."""

    def open(self, session: int, capacity: int) -> None: ...

    def close(self, session: int) -> None: ...

    def run(self, job: ev.RunDraft) -> ev.DraftFinished:
        num_rows = len(job.rows) - max(len(job.hidden) - 1, 0)
        return ev.DraftFinished(np.zeros((num_rows, 1), np.int64), np.zeros((num_rows, 1), np.float32))


class FirstChunk(Watcher):
    """Notes how many rows the first chunk has."""

    num_rows = 0

    def see_action(self, action: ev.OriginAction, now_s: float) -> None:
        if isinstance(action, ev.SendChunk):
            self.num_rows = self.num_rows or len(action.chunk.rows)


def measure(testbed: Testbed, num_prompt: int) -> FirstToken:
    """On a ring that was idle before and that knows no more of itself than a plan says."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, num_prompt + 2)  # none is 0, which the drafter proposes
    logits = np.zeros((len(tokens), VOCAB), np.float32)
    logits[np.arange(len(tokens) - 1), tokens[1:]] = 1
    tape = Tape(num_prompt, tuple(tokens.tolist()), np.zeros((len(tokens), 1), np.float32), logits)
    limits, chunk = TargetLimits(len(tokens) + 1, VOCAB, frozenset()), FirstChunk()
    ring = VirtualRing(testbed, tape, WrongDrafter(), limits, observer=chunk)
    answer = ring.generate(GenerateOptions(max_new_tokens=2))
    work_ms, slowest_ms = yardsticks_ms(testbed, num_prompt)
    first_s, second_s = answer.token_times_s
    over = 1000 * first_s / work_ms, 1000 * first_s / slowest_ms
    return FirstToken(testbed.name, chunk.num_rows, first_s, *over, second_s - first_s, testbed.trip_ms(1) / 1000)


def yardsticks_ms(testbed: Testbed, num_prompt: int) -> tuple[float, float]:
    """``work`` and ``slowest``."""
    work_ms, slowest_ms = [], []
    for size in range(1, MAX_CHUNK_ROWS + 1):
        stages_ms = [stage.forward_ms(size) for stage in testbed.stages]
        wire_ms = testbed.transfer_ms(size * testbed.hidden_bytes)
        num_chunks, trip_ms = num_prompt / size, testbed.trip_ms(size)
        work_ms.append(num_chunks * sum(stages_ms) / len(stages_ms) + trip_ms)
        slowest_ms.append((num_chunks - 1) * max(*stages_ms, wire_ms) + trip_ms)
    return min(work_ms), min(slowest_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, metavar="N", help="default: %(default)s")
    parser.add_argument("--testbed", default="all", metavar="NAME[,NAME]", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args()
    names = known_testbeds() if arguments.testbed == "all" else arguments.testbed.split(",")
    rows = [measure(load_testbed(name), arguments.tokens) for name in names]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows]))
    else:
        print(format_table(HEADER, [row.cells for row in rows]))


if __name__ == "__main__":
    main()
