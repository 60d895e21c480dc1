"""In 16 bits each value of a hidden row is the nearest that there is, whatever rows are beside it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from flowspec_edge.config import ROW_KINDS, RowKind
from flowspec_edge.core import codec, wire
from flowspec_edge.core.row_kinds import kind_of, narrow, value_bytes, widen
from flowspec_edge.core.rows import NO_PARENT, Chunk, Floats, Row
from flowspec_edge.errors import RowsTooLargeError
from tests.narrowing import instance, present

VALUES = st.floats(-60000, 60000, width=32)
ROWS = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=VALUES)
EXACT = np.array([[0.0, -1.5, 0.15625, 1024.0], [-0.0078125, 2.0**-14, 255.0, 3.0]], np.float32)
ROUNDED: dict[RowKind, dict[float, float]] = {
    "float16": {1 + 2**-11: 1.0, 1 + 3 * 2**-11: 1 + 2**-9, 65519.0: 65504.0},
    "bfloat16": {1 + 2**-8: 1.0, 1 + 3 * 2**-8: 1 + 2**-6, 3.0e38: 226 * 2.0**120},
}
"""Halfway between two values the one whose last bit is 0."""


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_what_16_bits_can_tell_is_told_exactly(kind: RowKind) -> None:
    np.testing.assert_array_equal(widen(narrow(EXACT, kind)), EXACT)


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_they_cannot_becomes_the_nearest_value(kind: RowKind) -> None:
    values = np.array([list(ROUNDED[kind])], np.float32)
    np.testing.assert_allclose(widen(narrow(values, kind)), [list(ROUNDED[kind].values())], rtol=1e-5)


@given(ROWS, st.sampled_from(ROW_KINDS))
def test_a_row_is_rounded_by_itself_and_once(rows: Floats, kind: RowKind) -> None:
    together = widen(narrow(rows, kind))
    for at in range(len(rows)):
        np.testing.assert_array_equal(widen(narrow(rows[at : at + 1], kind)), together[at : at + 1])
    np.testing.assert_array_equal(widen(narrow(together, kind)), together)


def test_a_value_beyond_float16_is_not_sent_as_something_else() -> None:
    rows = np.array([[1.0, -70000.0]], np.float32)
    with pytest.raises(RowsTooLargeError, match=r"has a value of 70000, which is beyond float16 \(65504\)"):
        narrow(rows, "float16")
    np.testing.assert_allclose(widen(narrow(rows, "bfloat16")), rows, rtol=2**-8)


@pytest.mark.parametrize("kind", ROW_KINDS)
def test_a_chunk_travels_in_its_kind(kind: RowKind) -> None:
    rows = (Row(0, NO_PARENT, 5), Row(1, 0, 6), Row(2, 1, 7))
    hidden = narrow(np.concatenate([EXACT, EXACT[:1]]), kind)[[0, 2]]
    header, tail = codec.encode(wire.ChunkMessage(0, Chunk(1, rows[:2], 2, hidden)))
    assert len(present(tail)) == hidden.size * value_bytes(kind)
    back = present(instance(codec.decode(header, bytes(present(tail))), wire.ChunkMessage).chunk.hidden)
    assert kind_of(back) == kind
    np.testing.assert_array_equal(widen(back), EXACT[[0, 0]])
