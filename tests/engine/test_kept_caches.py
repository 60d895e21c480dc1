"""Caches of ended sessions give way, the oldest first."""

import pytest

from flowspec_edge.engine import kept_caches
from flowspec_edge.engine.kept_caches import KeptCaches
from flowspec_edge.engine.kv_cache import KvCache


def cache_of(num_slots: int) -> KvCache:
    cache = KvCache(1, 1, 4)
    cache.reach(num_slots)
    return cache


@pytest.fixture
def kept() -> KeptCaches:
    kept = KeptCaches()
    for session in (1, 2, 3):
        kept.keep("attic", session, cache_of(100))
    return kept


def test_it_counts_what_it_has(kept: KeptCaches) -> None:
    one = cache_of(100).num_bytes
    assert kept.num_bytes == 3 * one == 3 * 128 * (4 + 5) * 4
    assert kept.take("attic", 2) is not None and kept.take("attic", 2) is None
    assert kept.take("cellar", 1) is None, "another stage has the same numbers"
    assert kept.num_bytes == 2 * one


def test_the_end_of_a_stage_frees_its_own(kept: KeptCaches) -> None:
    kept.keep("cellar", 1, cache_of(100))
    kept.free_all("attic")
    assert kept.take("attic", 1) is None and kept.take("cellar", 1) is not None


def test_the_oldest_make_room_until_there_is_enough(kept: KeptCaches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_caches, "memory_left", lambda: 10**6 - kept.num_bytes)
    kept.make_room(10**6 - 2 * cache_of(100).num_bytes)
    assert [kept.take("attic", session) is not None for session in (1, 2, 3)] == [False, True, True]
    kept.make_room(10**9)
    assert not kept.drop_oldest()
