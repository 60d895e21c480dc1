"""Ten rounds of what ``make chaos`` plays two hundred of: a node is struck, and not a token is another one."""

import random
import secrets
from pathlib import Path

import pytest

from tests.chaos.rounds import Undisturbed, cluster_of, play_round, summary

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lan_is_possible")]
SEED = 11
NUM_ROUNDS = 10


async def test_texts_are_the_undisturbed_ones_whatever_befalls_a_node(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    undisturbed = Undisturbed()
    async with cluster_of(3, tmp_path, secrets.token_bytes(20)) as (lan, boards):
        rounds = [await play_round(lan, boards, 3, rng, undisturbed) for _ in range(NUM_ROUNDS)]
    assert [text for round_ in rounds for text in round_.texts if not text.is_equal or text.error] == []
    assert summary(rounds, SEED)["equal"] == NUM_ROUNDS * 3
