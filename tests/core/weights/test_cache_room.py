"""What stays in a weight cache and what goes."""

import pytest

from flowspec_edge.core.weights.cache_room import RESERVE_BYTES, CachedFile, Disk, choose_evictions, room_bytes
from flowspec_edge.errors import CacheError

GIB = 2**30
OLD, MIDDLE, NEW = (CachedFile(name * 64, 100, last_used) for name, last_used in (("a", 1.0), ("b", 2.0), ("c", 3.0)))


def test_nothing_goes_while_there_is_room() -> None:
    assert choose_evictions([NEW, OLD], 100, 300) == []


def test_the_longest_unused_go_first_and_no_more_than_needed() -> None:
    assert choose_evictions([NEW, OLD, MIDDLE], 100, 300) == [OLD]
    assert choose_evictions([NEW, OLD, MIDDLE], 101, 300) == [OLD, MIDDLE]


def test_what_an_open_stage_uses_stays() -> None:
    used = CachedFile("d" * 64, 100, 0.0, is_in_use=True)
    assert choose_evictions([used, OLD, NEW], 100, 300) == [OLD]
    with pytest.raises(
        CacheError, match="201 bytes .* may hold 300 bytes .its limit., and 100 of them are in use.* 1 are missing"
    ):
        choose_evictions([used, OLD, NEW], 201, 300)


def test_a_cache_that_is_over_its_limit_shrinks() -> None:
    assert choose_evictions([OLD, MIDDLE, NEW], 0, 100) == [OLD, MIDDLE]


def test_the_limit_asked_for_holds_as_far_as_the_disk_does() -> None:
    disk = Disk(total_bytes=32 * GIB, free_bytes=2 * GIB)
    assert room_bytes(disk, cached_bytes=GIB, limit_bytes=2 * GIB) == 2 * GIB
    assert room_bytes(disk, cached_bytes=GIB, limit_bytes=8 * GIB) == 3 * GIB


def test_without_a_limit_a_tenth_of_the_disk_stays_free() -> None:
    disk = Disk(total_bytes=100 * GIB, free_bytes=30 * GIB)
    assert room_bytes(disk, cached_bytes=5 * GIB, limit_bytes=None) == 25 * GIB
    small = Disk(total_bytes=GIB, free_bytes=RESERVE_BYTES + 7)
    assert room_bytes(small, cached_bytes=0, limit_bytes=None) == 7
    assert room_bytes(Disk(GIB, 0), cached_bytes=0, limit_bytes=None) == 0
