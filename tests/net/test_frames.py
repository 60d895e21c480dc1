"""Frames come out of bytes as they were put in, however the system has cut these; what no link sends is refused."""

import contextlib
import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.errors import ProtocolError
from flowspec_edge.net.frames import MAX_FRAME_BYTES, FrameReader, Opcode, head_of

KINDS = st.sampled_from([Opcode.BINARY, Opcode.TEXT, Opcode.PING, Opcode.PONG, Opcode.CLOSE])
PAYLOADS = st.one_of(st.binary(max_size=125), st.integers(126, MAX_FRAME_BYTES).map(lambda size: b"\x5a" * size))
SENT = st.lists(st.tuples(KINDS, PAYLOADS).filter(lambda frame: frame[0] < 8 or len(frame[1]) < 126), max_size=5)


def put(reader: FrameReader, data: bytes) -> bytes:
    """What the reader has no room for."""
    room = reader.room()
    taken = data[: len(room)]
    room[: len(taken)] = taken
    reader.fill(len(taken))
    return data[len(taken) :]


def frames_of(data: bytes, sizes: Sequence[int] = ()) -> list[tuple[Opcode, bytes]]:
    """The frames in bytes that come in pieces of these sizes, and the rest at once."""
    reader, found = FrameReader(), []
    for size in (*sizes, len(data)):
        piece, data = data[:size], data[size:]
        while piece:
            piece = put(reader, piece)
            while (frame := reader.take()) is not None:
                found.append((frame[0], bytes(frame[1])))
    return found


@given(SENT, st.booleans(), st.lists(st.integers(1, 70_000), max_size=8))
def test_frames_come_back_equal_however_they_are_cut(
    sent: list[tuple[Opcode, bytes]], is_client: bool, sizes: list[int]
) -> None:
    data = b"".join(head_of(kind, len(payload), is_client=is_client) + payload for kind, payload in sent)
    assert frames_of(data, sizes) == sent


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_what_other_clients_have_masked_is_unmasked(payload: bytes, key: bytes) -> None:
    masked = bytes(byte ^ key[place % 4] for place, byte in enumerate(payload))
    head = head_of(Opcode.BINARY, len(payload), is_client=True)[:-4] + key
    assert frames_of(head + masked) == [(Opcode.BINARY, payload)]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x83\x00", "kind 3, which WebSockets do not have"),
        (b"\x02\x00", "in several frames"),
        (b"\x80\x00", "in several frames"),
        (b"\xc2\x00", "with an extension"),
        (b"\x89\x7e\x00\x7e", "a PING frame of more than 125 bytes"),
        (b"\x82\x7f" + struct.pack(">Q", MAX_FRAME_BYTES + 1), "a frame of 66561 bytes exceeds the 66560-byte limit"),
        (b"\x82\x7f" + bytes([0xFF]) * 8, "exceeds the 66560-byte limit"),
    ],
)
def test_what_no_link_sends_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        frames_of(data)


@given(st.binary(max_size=400))
def test_any_bytes_are_frames_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        frames_of(data)
