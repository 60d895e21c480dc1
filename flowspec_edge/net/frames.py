"""Frames of a WebSocket after its handshake (RFC 6455, section 5), of which links use the plain part: each message is
one frame, and nothing is compressed. Nothing here opens a socket.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np

from flowspec_edge.errors import ProtocolError

READ_BYTES = 131072
"""Room for what one call of the system brings: a chunk of 64 KB with its header comes in one piece."""
MAX_FRAME_BYTES = 66560
"""What is let in: a fragment of 64 KB or a header, and 1 KB beyond."""
MAX_CONTROL_BYTES = 125
_IS_FINAL, _IS_MASKED, _RESERVED = 0x80, 0x80, 0x70
_SHORT, _LONG = 126, 127
"""What a length says where it stands in the two or the eight bytes behind it."""
_NO_MASK = bytes(4)
"""The key of frames from the side that connected, which leaves their bytes as they are. Keys are to be unpredictable
so that no script in a browser can choose what an intermediary reads (10.3); no script chooses what a node sends, and
to mask 64 KB would cost both ends a pass over them."""


class Opcode(IntEnum):
    """Kinds of frames."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


def head_of(opcode: Opcode, num_bytes: int, *, is_client: bool) -> bytes:
    """What stands before a payload of so many bytes."""
    masked = _IS_MASKED if is_client else 0
    if num_bytes < _SHORT:
        head = struct.pack(">BB", _IS_FINAL | opcode, masked | num_bytes)
    elif num_bytes < 2**16:
        head = struct.pack(">BBH", _IS_FINAL | opcode, masked | _SHORT, num_bytes)
    else:
        head = struct.pack(">BBQ", _IS_FINAL | opcode, masked | _LONG, num_bytes)
    return head + _NO_MASK if is_client else head


class FrameReader:
    """Takes bytes into one buffer and hands out the frames in it."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._start = self._stop = 0  # of what has come and was not taken

    def room(self) -> memoryview:
        """Where the next bytes are to be written. What was handed out before is gone then."""
        num_left = self._stop - self._start
        if self._start:
            self._buffer[:num_left] = self._buffer[self._start : self._stop]
        self._start, self._stop = 0, num_left
        return self._buffer[num_left:]

    def fill(self, num_bytes: int) -> None:
        """So many have been written there."""
        self._stop += num_bytes

    def take(self) -> tuple[Opcode, memoryview] | None:
        """The next frame, whose payload is a view into the buffer; None where it is not all there.

        Raises:
            ProtocolError: it is too large, or of a kind that links do not use.
        """
        came = self._buffer[self._start : self._stop]
        if len(came) < 2:
            return None
        first, length = came[0], came[1] & ~_IS_MASKED
        opcode = _checked(first, length)
        form = {_SHORT: ">H", _LONG: ">Q"}.get(length, "")
        start = 2 + struct.calcsize(form)
        if len(came) < start:
            return None
        if form:
            (length,) = struct.unpack_from(form, came, 2)
        if length > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {length} bytes exceeds the {MAX_FRAME_BYTES}-byte limit (MAX_FRAME_BYTES)")
        key = b""
        if came[1] & _IS_MASKED:
            key, start = bytes(came[start : start + 4]), start + 4
        if len(came) < start + length:
            return None
        self._start += start + length
        payload = came[start : start + length]
        if key and key != _NO_MASK:
            _unmask(payload, key)
        return opcode, payload


def _checked(first: int, length: int) -> Opcode:
    try:
        opcode = Opcode(first & 0x0F)
    except ValueError:
        raise ProtocolError(f"a frame of kind {first & 0x0F}, which WebSockets do not have") from None
    if not first & _IS_FINAL or opcode is Opcode.CONTINUATION:
        raise ProtocolError("a message in several frames; links use one for each")
    if first & _RESERVED:
        raise ProtocolError("a frame with an extension, and none was agreed on")
    if opcode >= Opcode.CLOSE and length > MAX_CONTROL_BYTES:
        raise ProtocolError(f"a {opcode.name} frame of more than {MAX_CONTROL_BYTES} bytes")
    return opcode


def _unmask(payload: memoryview, key: bytes) -> None:
    values = np.frombuffer(payload, np.uint8)
    values ^= np.resize(np.frombuffer(key, np.uint8), len(values))
