"""Bytes in, messages out; everything a peer may send wrong is a ProtocolError."""

import math
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core import codec, limits, wire
from flowspec_edge.core.rows import Chunk, Passage, Row
from flowspec_edge.errors import ProtocolError
from tests.narrowing import instance, present

U32 = st.integers(0, 2**32 - 1)


def encoded(message: wire.Message) -> tuple[bytes, memoryview]:
    """Header and tail of a message that has a tail."""
    header, tail = codec.encode(message)
    return header, present(tail)


SECONDS = st.floats(0, limits.MAX_PASSAGE_S)
PASSAGES = st.lists(st.builds(Passage, st.integers(1, limits.MAX_CHUNK_ROWS), SECONDS, SECONDS), max_size=9).map(tuple)


@given(st.lists(st.tuples(U32, U32, U32), min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 2**40), PASSAGES)
def test_chunks_come_back_equal(
    rows: Sequence[tuple[int, ...]], width: int, turn: int, passages: tuple[Passage, ...]
) -> None:
    hidden = np.arange(len(rows) * width, dtype=np.float32).reshape(len(rows), width)
    sent = Chunk(7, tuple(Row(*row) for row in rows), 1, hidden, turn, passages)
    header, tail = encoded(wire.ChunkMessage(5, sent))
    assert codec.num_tail_bytes(codec.read_header(header)) == len(tail) == hidden.nbytes
    message = instance(codec.decode(header, bytes(tail)), wire.ChunkMessage)
    got = message.chunk
    assert (message.number, got.session, got.rows, got.num_wanted) == (5, 7, sent.rows, 1)
    assert (got.turn, got.passages) == (turn, passages)
    assert all(type(passage) is Passage for passage in got.passages)
    np.testing.assert_array_equal(present(got.hidden), hidden)


@given(st.lists(U32, min_size=1, max_size=40), st.integers(1, 8), st.integers(0, 2**31))
def test_tapped_rows_come_back_equal(ids: Sequence[int], width: int, layer: int) -> None:
    hidden = np.arange(len(ids) * width, dtype=np.float32).reshape(len(ids), width)
    header, tail = encoded(wire.TappedRows(7, layer, tuple(ids), hidden))
    assert codec.num_tail_bytes(codec.read_header(header)) == len(tail) == hidden.nbytes
    got = instance(codec.decode(header, bytes(tail)), wire.TappedRows)
    assert (got.session, got.layer, got.ids) == (7, layer, tuple(ids))
    np.testing.assert_array_equal(got.hidden, hidden)


@pytest.mark.parametrize(
    "values",
    [
        ["Tapped", 7, 2, b"", 4],
        ["Tapped", 7, 2, b"12345", 4],
        ["Tapped", 7, 2, bytes(4 * (limits.MAX_CHUNK_ROWS + 1)), 4],
        ["Tapped", 7, 2, bytes(4), 0],
        ["Tapped", 7, -1, bytes(4), 4],
        ["Tapped", 7, 2, bytes(4), codec.MAX_TAIL_BYTES],
        ["Tapped", 7, 2, "ids", 4],
        ["Tapped", 7, 2, bytes(4)],
    ],
)
def test_tapped_rows_that_break_a_rule_are_refused(values: Sequence[bytes | int | str]) -> None:
    with pytest.raises(ProtocolError):
        codec.num_tail_bytes(codec.read_header(msgpack.packb(values)))


def test_tapped_rows_without_their_tail_are_refused() -> None:
    header, tail = encoded(wire.TappedRows(7, 2, (1,), np.ones((1, 4), np.float32)))
    for wrong in (None, bytes(tail)[:-4]):
        with pytest.raises(ProtocolError, match="1 rows of 4 floats with a tail of"):
            codec.decode(header, wrong)


def test_a_view_with_gaps_is_sent_whole() -> None:
    hidden = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::2]
    header, tail = encoded(wire.ChunkMessage(0, Chunk(1, (Row(0, 1, 2), Row(1, 0, 2)), 2, hidden)))
    message = instance(codec.decode(header, bytes(tail)), wire.ChunkMessage)
    np.testing.assert_array_equal(present(message.chunk.hidden), hidden)


def test_the_largest_chunk_has_a_header_within_the_limit() -> None:
    rows = tuple(Row(2**32 - 1, 2**32 - 1, 2**32 - 1) for _ in range(limits.MAX_CHUNK_ROWS))
    passages = (Passage(limits.MAX_CHUNK_ROWS, 0.1, 0.1),) * limits.MAX_PASSAGES
    header, _ = codec.encode(
        wire.ChunkMessage(limits.MAX_COUNT, Chunk(limits.MAX_COUNT, rows, 1, None, limits.MAX_COUNT, passages))
    )
    assert instance(codec.decode(header), wire.ChunkMessage).chunk.passages == passages


CHUNK = ["Chunk", 0, 1, 1, np.zeros(3, "<u4").tobytes(), 4, 0, []]


def chunk(turn: int = 0, passages: Any = ()) -> bytes:
    header: bytes = msgpack.packb([*CHUNK[:6], turn, passages])
    return header


@pytest.mark.parametrize(
    ("header", "tail", "text"),
    [
        (b"\xc1", None, "not a message: MessagePack data is malformed"),
        (msgpack.packb({"a": 1}), None, "Expected `array`, got `object`"),
        (msgpack.packb(["Frobnicate"]), None, "Invalid value 'Frobnicate'.* another version"),
        (msgpack.packb(["Credit"]), None, "at least length 2, got 1"),
        (msgpack.packb(["Credit", "two"]), None, "Credit: Expected `int`, got `str`"),
        (msgpack.packb(["Credit", -1]), None, "Expected `int` >= 0"),
        (msgpack.packb(["Hello", "x" * 5000, "1", 1, "data", ""]), None, "length <= 4096"),
        (msgpack.packb(CHUNK), bytes(15), "tail of 15 bytes"),
        (msgpack.packb(CHUNK[:6]), bytes(16), "at least length 8, got 6"),
        (msgpack.packb([*CHUNK[:4], b"", *CHUNK[5:]]), None, "length >= 12"),
        (msgpack.packb([*CHUNK[:3], 9, *CHUNK[4:]]), bytes(16), "of which 9 are wanted back"),
        (msgpack.packb([*CHUNK[:5], -4, *CHUNK[6:]]), bytes(16), "Expected `int` >= 0"),
        (msgpack.packb(["BeginTurn", 1, -1]), None, "Expected `int` >= 0"),
        (chunk(turn=-1), bytes(16), "Expected `int` >= 0"),
        (chunk(turn=True), bytes(16), "got `bool`"),
        (chunk(turn=2**63), bytes(16), "<= 9223372036854775807"),
        (chunk(passages=7), bytes(16), "Expected `array`, got `int`"),
        (chunk(passages=[[1, 0.0, 0.0]] * 257), bytes(16), "length <= 256"),
        (chunk(passages=["abc"]), bytes(16), "got `str`"),
        (chunk(passages=[[1, 0.0]]), bytes(16), "at least length 3, got 2"),
        (chunk(passages=[[1.5, 0.0, 0.0]]), bytes(16), "got `float`"),
        (chunk(passages=[[0, 0.0, 0.0]]), bytes(16), ">= 1"),
        (chunk(passages=[[513, 0.0, 0.0]]), bytes(16), "<= 512"),
        (chunk(passages=[[1, -1.0, 0.0]]), bytes(16), ">= 0"),
        (chunk(passages=[[1, 0.0, math.nan]]), bytes(16), ">= 0"),
        (chunk(passages=[[1, math.inf, 0.0]]), bytes(16), "<= 3600"),
        (chunk(passages=[[1, 0.0, 1e9]]), bytes(16), "<= 3600"),
        (chunk(passages=[[1, 0.0, "soon"]]), bytes(16), "got `str`"),
        (b"\x91" * 60000, None, "not a message"),
        (b"\x92\xa6Credit" + b"\x91" * 60000, None, "not a message"),
        (bytes(70000), None, "exceeds the 65536-byte limit"),
    ],
)
def test_what_a_peer_may_send_wrong(header: bytes, tail: bytes | None, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        codec.decode(header, tail)


def test_an_oversized_tail_is_refused_before_it_comes() -> None:
    rows = np.zeros((limits.MAX_CHUNK_ROWS, 3), "<u4").tobytes()
    with pytest.raises(ProtocolError, match="MAX_TAIL_BYTES"):
        codec.num_tail_bytes(codec.read_header(msgpack.packb([*CHUNK[:4], rows, 2**20, *CHUNK[6:]])))


@given(st.binary(max_size=200), st.binary(max_size=64))
def test_noise_never_raises_anything_else(header: bytes, tail: bytes) -> None:
    try:
        codec.num_tail_bytes(codec.read_header(header))
        codec.decode(header, tail)
    except ProtocolError:
        pass
