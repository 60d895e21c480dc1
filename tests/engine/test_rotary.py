"""Rotary tables are right to the last bit but one, as long as asked for, and made once."""

import numpy as np
import pytest

from flowspec_edge.engine.rotary import BLOCK_SLOTS, KEPT_SLOTS, RotaryTables
from flowspec_edge.errors import StageFailedError
from flowspec_edge.manifest import ROTARY_COS, ROTARY_SIN, of_sliding_layers

FREQUENCIES = [float(np.float32(10000.0 ** -(i / 16))) for i in range(16)]


def test_the_tables_are_cosines_and_sines_of_float32_angles() -> None:
    tables = RotaryTables([FREQUENCIES]).reach(5000)
    for position in (0, 1023, 1024, 4999):
        tables.fill(np.array([position, 0]))
    angles = np.outer(np.arange(5000, dtype=np.float32), np.array(FREQUENCIES, np.float32))
    assert angles.dtype == np.float32
    for name, function in ((ROTARY_COS, np.cos), (ROTARY_SIN, np.sin)):
        found = tables.inputs[name].numpy()
        assert found.dtype == np.float32 and found.shape == (5000, 16)
        np.testing.assert_array_equal(found, function(angles.astype(np.float64)).astype(np.float32))


def test_layers_with_a_window_may_have_tables_of_their_own() -> None:
    others = [2 * frequency for frequency in FREQUENCIES]
    sliding = [of_sliding_layers(name) for name in (ROTARY_COS, ROTARY_SIN)]
    assert list(RotaryTables([FREQUENCIES]).reach(100).inputs) == [ROTARY_COS, ROTARY_SIN]
    for rope in (others, FREQUENCIES):
        tables = RotaryTables([FREQUENCIES, rope]).reach(100)
        tables.fill(np.array([99]))
        for names, frequencies in (((ROTARY_COS, ROTARY_SIN), FREQUENCIES), (sliding, rope)):
            alone = RotaryTables([frequencies]).reach(100)
            alone.fill(np.array([99]))
            for name, expected in zip(names, alone.inputs.values(), strict=True):
                np.testing.assert_array_equal(tables.inputs[name].numpy(), expected.numpy())


def test_they_grow_when_a_longer_session_comes_and_stay_when_a_shorter_one_does() -> None:
    tables = RotaryTables([FREQUENCIES])
    first = tables.reach(100)
    assert tables.reach(50) is first
    longer = tables.reach(200)
    assert longer.inputs[ROTARY_COS].shape() == [200, 16]
    for found in (first, longer):
        found.fill(np.array([99]))
    np.testing.assert_array_equal(longer.inputs[ROTARY_COS].numpy()[:100], first.inputs[ROTARY_COS].numpy())


def test_they_are_computed_as_far_as_texts_have_come_and_given_back_when_no_session_is_open() -> None:
    tables = RotaryTables([FREQUENCIES])
    found = tables.reach(2**20)
    cosines = found.inputs[ROTARY_COS].numpy()

    def num_computed() -> int:
        return int(np.count_nonzero(cosines[:: BLOCK_SLOTS // 2, -1])) * (BLOCK_SLOTS // 2)

    assert num_computed() == 0
    found.fill(np.array([5, 3]))
    assert num_computed() == BLOCK_SLOTS
    found.fill(np.array([2 * KEPT_SLOTS - 1]))
    assert num_computed() == 2 * KEPT_SLOTS
    before = cosines[: 2 * KEPT_SLOTS].copy()
    tables.shrink()
    assert num_computed() == KEPT_SLOTS
    found.fill(np.array([2 * KEPT_SLOTS - 1]))
    np.testing.assert_array_equal(cosines[: 2 * KEPT_SLOTS], before)


def test_too_little_memory_is_a_failed_stage() -> None:
    with pytest.raises(StageFailedError, match="no memory for rotary tables of 100000000000000 slots"):
        RotaryTables([FREQUENCIES]).reach(10**14)
