"""One round for each fault, of which ``make chaos`` plays two hundred: not a token is another one."""

import random
import secrets
from pathlib import Path

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.rounds import Undisturbed, cluster_of, play_round

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lan_is_possible")]
SEED = 11


async def test_texts_are_the_undisturbed_ones_whatever_befalls_a_node(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    undisturbed = Undisturbed(rng)
    async with cluster_of(3, tmp_path, secrets.token_bytes(20)) as cluster:
        rounds = [await play_round(cluster, rng, undisturbed, fault) for fault in FAULTS]
    texts = [text for round_ in rounds for text in (*round_.texts, round_.again)]
    assert [text for text in texts if not text.is_equal or text.error] == []
