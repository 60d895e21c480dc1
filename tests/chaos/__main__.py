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

from tests.chaos.rounds import Round, Undisturbed, cluster_of, play_round, summary
from tests.lan import why_not

ROUNDS_PER_CLUSTER = 10


async def run(num_rounds: int, seed: int, *, is_json: bool) -> list[Round]:
    rng = random.Random(seed)
    undisturbed = Undisturbed()
    rounds: list[Round] = []
    while len(rounds) < num_rounds:
        num_nodes = rng.choice((3, 4, 5))
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            async with cluster_of(num_nodes, Path(folder), secrets.token_bytes(20)) as (lan, boards):
                for _ in range(min(ROUNDS_PER_CLUSTER, num_rounds - len(rounds))):
                    rounds.append(await play_round(lan, boards, num_nodes, rng, undisturbed))
                    told = json.dumps(dataclasses.asdict(rounds[-1]))
                    print(f"{len(rounds):4} {told}", file=sys.stderr if is_json else sys.stdout, flush=True)
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="faults, one after another (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run (default: a random one, which is printed)")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    options = parser.parse_args()
    if reason := why_not():
        print(f"chaos: {reason}", file=sys.stderr)
        return 1
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"chaos: {options.rounds} rounds, --seed {seed}, pid {os.getpid()}", file=sys.stderr, flush=True)
    figures = summary(asyncio.run(run(options.rounds, seed, is_json=options.json)), seed)
    print(json.dumps(figures, indent=None if options.json else 2))
    return 0 if figures["equal"] == figures["texts"] else 1


if __name__ == "__main__":
    sys.exit(main())
