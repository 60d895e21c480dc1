"""Round after round of chaos, a new cluster now and then.

There are two LANs at a time, which play in turns: while the nodes of one come back after a round, which is half of the
time and takes no processor, those of the other are struck.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.rounds import Round, Undisturbed, cluster_of, play_round, summary

NUM_LANS = 2
ROUNDS_PER_CLUSTER = 10
SHORT_SHARE = 0.3
"""Of the clusters, those whose nodes have no room for all layers."""

Tell = Callable[[int, str], None]
"""Hears how many rounds are done, and what came of the latest."""


def try_rounds(num_rounds: int, seed: int, tell: Tell, fault: str | None = None) -> dict[str, Any]:
    """The figures of so many rounds over rings of 3 to 5 nodes; of one fault alone, where it is named."""
    return summary(asyncio.run(_play(num_rounds, seed, tell, fault)), seed)


async def _play(num_rounds: int, seed: int, tell: Tell, fault: str | None) -> list[Round]:
    rounds: list[Round] = []
    undisturbed, turn = Undisturbed(random.Random(seed)), asyncio.Lock()

    def note(played: Round) -> None:
        rounds.append(played)
        tell(len(rounds), json.dumps(dataclasses.asdict(played)))

    async with asyncio.TaskGroup() as group:
        for number in range(NUM_LANS):
            share = len(range(number, num_rounds, NUM_LANS))
            rng = random.Random(f"{seed}/{number}")
            group.create_task(_play_in_turn(share, rng, undisturbed, turn, note, fault))
    return rounds


async def _play_in_turn(
    num_rounds: int,
    rng: random.Random,
    undisturbed: Undisturbed,
    turn: asyncio.Lock,
    note: Callable[[Round], None],
    fault: str | None,
) -> None:
    """The rounds of one LAN. ``rng`` decides on all of them, whatever happens on the others."""
    for first in range(0, num_rounds, ROUNDS_PER_CLUSTER):
        num_nodes, is_memory_short = rng.choice((3, 4, 5)), rng.random() < SHORT_SHARE
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            async with contextlib.AsyncExitStack() as closing:
                async with turn:
                    opening = cluster_of(
                        num_nodes, Path(folder), secrets.token_bytes(20), is_memory_short=is_memory_short
                    )
                    cluster = await closing.enter_async_context(opening)
                for _ in range(first, min(first + ROUNDS_PER_CLUSTER, num_rounds)):
                    note(await play_round(cluster, rng, undisturbed, fault, turn))
