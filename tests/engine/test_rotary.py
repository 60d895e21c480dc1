"""Rotary tables are right to the last bit but one, as long as asked for, and made once."""

import numpy as np
import pytest

from flowspec_edge.engine.rotary import RotaryTables
from flowspec_edge.errors import StageFailedError
from flowspec_edge.manifest import ROTARY_COS, ROTARY_SIN

FREQUENCIES = [float(np.float32(10000.0 ** -(i / 16))) for i in range(16)]


def test_the_tables_are_cosines_and_sines_of_float32_angles() -> None:
    tables = RotaryTables(FREQUENCIES).reach(5000)
    angles = np.outer(np.arange(5000, dtype=np.float32), np.array(FREQUENCIES, np.float32))
    assert angles.dtype == np.float32
    for name, function in ((ROTARY_COS, np.cos), (ROTARY_SIN, np.sin)):
        found = tables[name].numpy()
        assert found.dtype == np.float32 and found.shape == (5000, 16)
        np.testing.assert_array_equal(found, function(angles.astype(np.float64)).astype(np.float32))


def test_they_grow_when_a_longer_session_comes_and_stay_when_a_shorter_one_does() -> None:
    tables = RotaryTables(FREQUENCIES)
    first = tables.reach(100)
    assert tables.reach(50) is first
    longer = tables.reach(200)
    assert longer[ROTARY_COS].shape() == [200, 16]
    np.testing.assert_array_equal(longer[ROTARY_COS].numpy()[:100], first[ROTARY_COS].numpy())


def test_too_little_memory_is_a_failed_stage() -> None:
    with pytest.raises(StageFailedError, match="no memory for rotary tables of 100000000000000 slots"):
        RotaryTables(FREQUENCIES).reach(10**14)
