"""How much a ring keeps of ended sessions."""

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.core.planning.kept_room import SHARE, KeptRoom, Spare
from flowspec_edge.core.planning.working_memory import kv_cache_bytes
from flowspec_edge.manifest import load_manifest

GEOMETRY = load_manifest(DEMO_BUNDLE).geometry
PER_LAYER = kv_cache_bytes(GEOMETRY, 1, 1)
STAGES = [Spare(2, 400 * 2 * PER_LAYER), Spare(6, 100 * 6 * PER_LAYER)]


def test_a_limit_is_of_all_boards_together() -> None:
    assert KeptRoom.on(GEOMETRY, STAGES, 100 * 8 * PER_LAYER + 1) == KeptRoom(100, 8 * PER_LAYER)
    assert KeptRoom.on(GEOMETRY, STAGES, 0).num_slots == 0


def test_without_a_limit_the_board_with_the_least_says_how_much() -> None:
    assert KeptRoom.on(GEOMETRY, STAGES, None) == KeptRoom(int(100 * SHARE), 8 * PER_LAYER)


@pytest.mark.parametrize("spare", [0, -5])
def test_a_board_that_is_full_keeps_nothing(spare: int) -> None:
    full = [STAGES[0], Spare(6, spare)]
    assert KeptRoom.on(GEOMETRY, full, None).num_slots == 0
    assert KeptRoom.on(GEOMETRY, full, 8 * PER_LAYER).num_slots == 1, "who says how much, has it"
