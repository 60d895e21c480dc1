"""One round for each fault, of which ``make chaos`` plays two hundred: not a token is another one."""

import asyncio
import random
import secrets
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.rounds import Round, Undisturbed, cluster_of, play_round

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lan_is_possible")]
SEED = 11


async def test_texts_are_the_undisturbed_ones_whatever_befalls_a_node(tmp_path: Path) -> None:
    """On two LANs in turns: while the nodes of one come back, those of the other are struck."""
    undisturbed, turn = Undisturbed(random.Random(SEED)), asyncio.Lock()

    async def play(number: int) -> list[Round]:
        rng, folder = random.Random(SEED + number), tmp_path / str(number)
        folder.mkdir()
        async with cluster_of(3, folder, secrets.token_bytes(20)) as cluster:
            return [await play_round(cluster, rng, undisturbed, fault, turn) for fault in [*FAULTS][number::2]]

    rounds = [round_ for played in await asyncio.gather(play(0), play(1)) for round_ in played]
    assert {round_.fault for round_ in rounds} == {*FAULTS}
    texts = [text for round_ in rounds for text in (*round_.texts, round_.again)]
    assert [text for text in texts if not text.is_equal or text.error] == []
