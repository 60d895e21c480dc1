"""Encodes and decodes messages. Nothing here opens a socket.

A message is a header, the msgpack of ``[type, field, ...]``. A message with hidden rows also has a tail: the rows as
raw little-endian numbers, sent behind the header in pieces (see ``net/connection.py``).
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from flowspec_edge.config import RowKind
from flowspec_edge.core.limits import MAX_CHUNK_ROWS, MAX_PASSAGES
from flowspec_edge.core.row_kinds import WIRE_TYPES, kind_of
from flowspec_edge.core.rows import Chunk, Count, Floats, Hidden, Passage, Row
from flowspec_edge.core.wire import (
    ROW_BYTES,
    ChunkMessage,
    Message,
    Plain,
    PlainMessage,
    StageFailure,
    TappedRows,
)
from flowspec_edge.errors import ProtocolError, plain_text

MAX_HEADER_BYTES = 65536
"""A chunk of 512 rows has a header of about 8 KB; nothing else comes near."""
MAX_TAIL_BYTES = 16 * 2**20
"""512 rows of 8192 float32: the largest chunk of the widest model we know."""
MAX_QUOTED = 200
"""Characters of an error that quotes a message."""
_U32 = struct.Struct("<I")


class _ChunkHeader(PlainMessage, frozen=True, tag="Chunk"):
    """The header of a chunk, whose hidden rows are the tail. Each has ``width`` values; 0 where there is no tail.

    ``table`` has the draft ids of all rows, then their parents, then their tokens, all as u32. ``row_kind`` says in
    which numbers the hidden rows are.
    """

    number: Count
    session: Count
    num_wanted: Count
    table: Annotated[bytes, Meta(min_length=ROW_BYTES, max_length=ROW_BYTES * MAX_CHUNK_ROWS)]
    width: Count
    turn: Count
    passages: Annotated[tuple[Passage, ...], Meta(max_length=MAX_PASSAGES)]
    row_kind: RowKind = "float32"

    @property
    def num_rows(self) -> int:
        return _num_rows(self.table, ROW_BYTES)

    def complete(self, hidden: Hidden | None) -> ChunkMessage:
        if self.num_wanted > self.num_rows:
            raise ProtocolError(f"a chunk of {self.num_rows} rows, of which {self.num_wanted} are wanted back")
        values, num_rows = _values_of(self.table), self.num_rows
        columns = (values[start : start + num_rows] for start in range(0, len(values), num_rows))
        rows = tuple(map(Row._make, zip(*columns, strict=True)))
        return ChunkMessage(self.number, Chunk(self.session, rows, self.num_wanted, hidden, self.turn, self.passages))


class _TappedHeader(PlainMessage, frozen=True, tag="Tapped"):
    """The header of tapped rows, whose values are the tail, in float32. ``table`` has their draft ids as u32."""

    session: Count
    layer: Count
    table: Annotated[bytes, Meta(min_length=_U32.size, max_length=_U32.size * MAX_CHUNK_ROWS)]
    width: Annotated[int, Meta(ge=1)]

    @property
    def row_kind(self) -> RowKind:
        return "float32"

    @property
    def num_rows(self) -> int:
        return _num_rows(self.table, _U32.size)

    def complete(self, hidden: Floats | None) -> TappedRows:
        assert hidden is not None, "their width is at least 1"
        return TappedRows(self.session, self.layer, _values_of(self.table), hidden)


def _num_rows(table: bytes, row_bytes: int) -> int:
    num_rows, remainder = divmod(len(table), row_bytes)
    if remainder:
        raise ProtocolError(f"a table of {len(table)} bytes, which is no whole number of rows of {row_bytes} bytes")
    return num_rows


Header = Plain | _ChunkHeader | _TappedHeader
"""What stands before a tail, or is the whole message."""
Tail = bytes | bytearray | memoryview
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Header] = msgspec.msgpack.Decoder(Header)


def encode(message: Message) -> tuple[bytes, memoryview | None]:
    """The header's bytes, and the tail as a flat view of bytes where the message has one."""
    match message:
        case ChunkMessage(number, chunk):
            table = _table_of(*zip(*chunk.rows, strict=True))
            stated = number, chunk.session, chunk.num_wanted, table
            if (hidden := chunk.hidden) is None:
                return _encoder.encode(_ChunkHeader(*stated, 0, chunk.turn, chunk.passages)), None
            kind = kind_of(hidden)
            chunk_header = _ChunkHeader(*stated, hidden.shape[1], chunk.turn, chunk.passages, kind)
            return _encoder.encode(chunk_header), _tail_of(hidden, kind)
        case TappedRows(session, layer, ids, hidden):
            tapped_header = _TappedHeader(session, layer, _table_of(ids), hidden.shape[1])
            return _encoder.encode(tapped_header), _tail_of(hidden, "float32")
        case StageFailure():
            return _encoder.encode(message.plain), None
    return _encoder.encode(message), None


def _table_of(*columns: Sequence[int]) -> bytes:
    """Columns of u32, one behind the other."""
    values = [value for column in columns for value in column]
    return struct.pack(f"<{len(values)}I", *values)


def _values_of(table: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(table) // _U32.size}I", table)


def _tail_of(hidden: Hidden, kind: RowKind) -> memoryview:
    wanted = WIRE_TYPES[kind]
    if sys.byteorder == "big" or hidden.dtype != wanted or not hidden.flags.c_contiguous:
        hidden = np.ascontiguousarray(hidden, wanted)
    return hidden.data.cast("B") if kind == "float32" else hidden.view(np.uint8).data.cast("B")


def decode(data: bytes, tail: Tail | None = None) -> Message:
    """A checked message from its header and tail.

    Raises:
        ProtocolError: not msgpack, an unknown type, a field of the wrong kind, or a tail of the wrong length.
    """
    return complete(read_header(data), tail)


def complete(header: Header, tail: Tail | None = None) -> Message:
    """The message of a header with its tail. Raises ProtocolError where the two do not belong together."""
    if not isinstance(header, _ChunkHeader | _TappedHeader):
        return header.plain if isinstance(header, StageFailure) else header
    found = 0 if tail is None else len(tail)
    if found != num_tail_bytes(header):
        raise ProtocolError(f"{header.num_rows} rows of {header.width} floats with a tail of {found} bytes")
    if tail is None or not header.width:
        return header.complete(None)
    return header.complete(np.frombuffer(tail, WIRE_TYPES[header.row_kind]).reshape(header.num_rows, header.width))


def read_header(data: bytes | memoryview) -> Header:
    """A checked header, which is the message where it has no tail. Raises ProtocolError where it breaks a rule."""
    if len(data) > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"a header of {len(data)} bytes exceeds the {MAX_HEADER_BYTES}-byte limit (MAX_HEADER_BYTES)"
        )
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as cause:
        said = plain_text(str(cause)[:MAX_QUOTED])  # it quotes what the peer has sent
        raise ProtocolError(f"{_name_of(data)}: {said}; does the peer run another version?") from cause


def _name_of(data: bytes | memoryview) -> str:
    """The type that an unreadable message claims to have, for the text of an error."""
    try:
        name = msgspec.msgpack.decode(data)[0]
    except (msgspec.DecodeError, RecursionError, LookupError, TypeError):
        return "not a message"
    return name if isinstance(name, str) and len(name) < 40 and name.isidentifier() else "not a message"


def num_tail_bytes(header: Header) -> int:
    """The size of the tail that belongs to a header. Raises ProtocolError where it is larger than any may be."""
    if not isinstance(header, _ChunkHeader | _TappedHeader):
        return 0
    num_bytes = header.num_rows * header.width * WIRE_TYPES[header.row_kind].itemsize
    if num_bytes > MAX_TAIL_BYTES:
        raise ProtocolError(f"a chunk of {num_bytes} bytes exceeds the {MAX_TAIL_BYTES}-byte limit (MAX_TAIL_BYTES)")
    return num_bytes
