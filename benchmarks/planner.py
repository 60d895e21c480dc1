"""How long it takes to plan a ring of sixteen devices and to compare it with others, from easy to hard kinds of
networks.

Run from a checkout:

    python -m benchmarks.planner
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.choices import Choices
from flowspec_edge.core.planning.placement import Device, Hop, Links, ModelNeeds
from flowspec_edge.core.planning.planner import plan_ring
from flowspec_edge.core.planning.ring_search import RingSearch
from flowspec_edge.core.planning.throughput import TYPICAL_DRAFTS, Throughput

NUM_DEVICES = 16
NUM_LAYERS = 32
GIB = 2**30
MODEL = ModelNeeds(
    blocks=tuple((layer, layer + 1) for layer in range(NUM_LAYERS)),
    block_bytes={"int8": 210 * 2**20},
    kv_bytes=32 * 2**20,
    row_bytes=8192,
    head_ms=5.0,
)
BOARDS: dict[str, Callable[[random.Random], float]] = {
    "equal boards": lambda rng: 5.0,
    "three kinds": lambda rng: rng.choice([5.0, 10.0, 20.0]),
    "all different": lambda rng: rng.uniform(3.0, 20.0),
}
NETWORKS: dict[str, Callable[[random.Random], Hop]] = {
    "one switch": lambda rng: Hop.from_rate(1.0, 1000),
    "measured latencies": lambda rng: Hop.from_rate(round(rng.uniform(0.3, 1.5), 2), 1000),
    "mixed wires and latencies": lambda rng: Hop.from_rate(
        round(rng.uniform(0.3, 3.0), 2), rng.choice([1000, 100, 50])
    ),
}


def main() -> None:
    throughput = Throughput("flowspec", TYPICAL_DRAFTS)
    print("processor seconds of the search, and of the plan with all it says of other choices")
    print(f"{'boards':16}{'network':28}{'search':>10}{'plan':>8}  tokens/s  stages")
    for (boards, layer_ms), (network, hop) in itertools.product(BOARDS.items(), NETWORKS.items()):
        rng = random.Random(7)
        names = [f"pi-{number:02}" for number in range(NUM_DEVICES)]
        devices = [
            Device(
                node=name,
                free_memory_bytes=rng.choice([2, 4, 8]) * GIB,
                layer={"int8": Line(ms := layer_ms(rng), ms / 50)},
                stage_ms=1.0,
            )
            for name in names
        ]
        measured = {pair: hop(rng) for pair in itertools.combinations([*names, "origin"], 2)}
        links = Links(origin="origin", usual=Hop.from_rate(1.0, 1000), measured=measured)
        began = time.process_time()
        ring = RingSearch(Choices(devices, links, MODEL, throughput).problem()).best()
        search_s = time.process_time() - began
        assert ring is not None
        plan = plan_ring(devices, links, MODEL, throughput)
        plan_s = time.process_time() - began - search_s
        print(f"{boards:16}{network:28}{search_s:10.2f}{plan_s:8.2f}{plan.tokens_per_s:10.2f}{len(plan.stages):8}")


if __name__ == "__main__":
    main()
