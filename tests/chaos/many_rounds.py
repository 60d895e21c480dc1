"""Round after round of chaos, a new cluster now and then."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.rounds import Round, Undisturbed, cluster_of, play_round, summary

ROUNDS_PER_CLUSTER = 10
SHORT_SHARE = 0.3
"""Of the clusters, those whose nodes have no room for all layers."""

Tell = Callable[[int, str], None]
"""Hears how many rounds are done, and what came of the latest."""


def try_rounds(num_rounds: int, seed: int, tell: Tell, fault: str | None = None) -> dict[str, Any]:
    """The figures of so many rounds over rings of 3 to 5 nodes; of one fault alone, where it is named."""
    return summary(asyncio.run(_play(num_rounds, seed, tell, fault)), seed)


async def _play(num_rounds: int, seed: int, tell: Tell, fault: str | None) -> list[Round]:
    rng = random.Random(seed)
    undisturbed = Undisturbed(rng)
    rounds: list[Round] = []
    while len(rounds) < num_rounds:
        num_nodes, is_memory_short = rng.choice((3, 4, 5)), rng.random() < SHORT_SHARE
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            key = secrets.token_bytes(20)
            async with cluster_of(num_nodes, Path(folder), key, is_memory_short=is_memory_short) as cluster:
                for _ in range(min(ROUNDS_PER_CLUSTER, num_rounds - len(rounds))):
                    rounds.append(await play_round(cluster, rng, undisturbed, fault))
                    tell(len(rounds), json.dumps(dataclasses.asdict(rounds[-1])))
    return rounds
