"""``python -m tests.chaos``: random faults over rings of 3 to 5 real processes in namespaces, which need root."""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import secrets
import sys
import tempfile
from pathlib import Path

from tests.chaos.faults import FAULTS
from tests.chaos.rounds import Round, Undisturbed, as_markdown, cluster_of, play_round, summary
from tests.lan import why_not

ROUNDS_PER_CLUSTER = 10
SHORT_SHARE = 0.3
"""Of the clusters, those whose nodes have no room for all layers."""


async def run(num_rounds: int, seed: int, fault: str | None) -> list[Round]:
    rng = random.Random(seed)
    undisturbed = Undisturbed()
    rounds: list[Round] = []
    while len(rounds) < num_rounds:
        num_nodes, is_memory_short = rng.choice((3, 4, 5)), rng.random() < SHORT_SHARE
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            key = secrets.token_bytes(20)
            async with cluster_of(num_nodes, Path(folder), key, is_memory_short=is_memory_short) as cluster:
                for _ in range(min(ROUNDS_PER_CLUSTER, num_rounds - len(rounds))):
                    rounds.append(await play_round(cluster, rng, undisturbed, fault))
                    print(f"{len(rounds):4} {json.dumps(dataclasses.asdict(rounds[-1]))}", file=sys.stderr, flush=True)
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="faults, one after another (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run (default: a random one, which is printed)")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="this fault alone (default: a random one each time)")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/reliability.md, not JSON")
    options = parser.parse_args()
    if reason := why_not():
        print(f"chaos: {reason}", file=sys.stderr)
        return 1
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"chaos: {options.rounds} rounds, --seed {seed}, pid {os.getpid()}", file=sys.stderr, flush=True)
    figures = summary(asyncio.run(run(options.rounds, seed, options.fault)), seed)
    print(as_markdown(figures) if options.markdown else json.dumps(figures, indent=2))
    is_right = figures["equal"] == figures["texts"] and figures["asked_again_equal"] == figures["asked_again"]
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
