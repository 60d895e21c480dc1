"""A cache that grows: what is in it stays, and little more is taken than it needs."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy.typing import NDArray

from flowspec_edge.bundle import Bundle
from flowspec_edge.engine import kv_cache
from flowspec_edge.engine.kv_cache import KvCache
from flowspec_edge.engine.stage_runner import StageRunner
from tests.engine.conftest import Session, make_chain

NUM_LAYERS, NUM_HEADS, HEAD_DIM = 4, 2, 16
SLOT_BYTES = NUM_HEADS * (2 * HEAD_DIM + 1) * 4  # of one layer


@pytest.fixture
def peak_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """The most bytes that caches had at once since the fixture was made."""
    living: dict[int, int] = {}
    most = [0]
    make = kv_cache.zeros_on_small_pages

    def counted(shape: tuple[int, ...], kind: npt.DTypeLike = np.float32) -> NDArray[np.floating]:
        array = make(shape, kind)
        key = len(most)
        living[key] = array.nbytes
        weakref.finalize(array, living.pop, key)
        most.append(sum(living.values()))
        return array

    monkeypatch.setattr(kv_cache, "zeros_on_small_pages", counted)
    return lambda: max(most)


@pytest.mark.parametrize("is_half", [False, True])
def test_one_array_after_the_other_grows_and_keeps_what_is_in_it(peak_bytes: Any, is_half: bool) -> None:
    cache = KvCache(NUM_LAYERS, NUM_HEADS, HEAD_DIM, is_half=is_half)
    cache.reach(100)
    assert cache.has(128) and not cache.has(129)
    for number, array in enumerate(cache._kept):
        array[:] = number
    cache.reach(129)
    assert cache.num_slots == 256 and cache.num_bytes == NUM_LAYERS * 256 * SLOT_BYTES // (2 if is_half else 1)
    for number, array in enumerate(cache._kept):
        assert (array[:, :, :128] == number).all() and not array[:, :, 128:].any()
    one, seen = 128 * SLOT_BYTES, 256 * SLOT_BYTES if is_half else 0
    assert peak_bytes() <= cache.num_bytes + one + seen, "all layers but one are there once"


def test_a_stage_does_not_hold_on_to_what_its_cache_outgrew(peak_bytes: Any, bundle: Bundle) -> None:
    stage = StageRunner(bundle.directory, bundle.manifest, 0, NUM_LAYERS)
    session, tokens = Session(stage), [7] * 140
    session.run(make_chain(tokens[:120]))
    session.run(make_chain(tokens)[120:])
    (cache,) = (session.cache for session in stage._sessions.values())
    assert cache.num_slots == 256
    assert peak_bytes() <= cache.num_bytes + cache._kept[1].nbytes // 2


def test_where_there_is_no_room_it_stays_and_can_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(NUM_LAYERS, NUM_HEADS, HEAD_DIM)
    needed = 128 * (NUM_LAYERS * SLOT_BYTES + NUM_HEADS * (HEAD_DIM + 1) * 4)
    monkeypatch.setattr(kv_cache, "memory_left", lambda: needed - 1)
    with pytest.raises(MemoryError, match=f"{needed} bytes are needed, {needed - 1} are left"):
        cache.reach(1)
    assert cache.num_slots == 0 == cache.num_bytes
    monkeypatch.setattr(kv_cache, "memory_left", lambda: needed)
    cache.reach(1)
    cache.rest()
    monkeypatch.setattr(kv_cache, "memory_left", lambda: 0)
    cache.reach(128)
    assert cache.has(128), "what does not grow needs no room"


def test_what_was_left_half_grown_grows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KvCache(NUM_LAYERS, NUM_HEADS, HEAD_DIM)
    cache.reach(1)
    left, make = [3], kv_cache.zeros_on_small_pages

    def refused(shape: tuple[int, ...], kind: npt.DTypeLike = np.float32) -> NDArray[np.floating]:
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("no mapping")
        return make(shape, kind)

    monkeypatch.setattr(kv_cache, "zeros_on_small_pages", refused)
    with pytest.raises(MemoryError, match="no mapping"):
        cache.reach(200)
    left[0] = 100
    assert not cache.has(1), "the arrays are others than those that were bound"
    cache.reach(1)
    assert {value.shape()[2] for value in cache.seen(0, NUM_LAYERS)} == {256} == {cache.num_slots}
