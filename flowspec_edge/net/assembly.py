"""Puts messages together from the frames that they came in: a header, then the fragments of its tail."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowspec_edge.core import codec, wire
from flowspec_edge.errors import ProtocolError

TAIL_ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector load of today's CPUs."""
_NOTHING = np.empty(0, np.uint8)


class Assembly:
    """The messages of one link, one after the other. The chunks of a data link are numbered from 0."""

    def __init__(self, purpose: str) -> None:
        self._purpose = purpose
        self._next_number = 0
        self._header: codec.Header | None = None  # of the message that has begun
        self._num_bytes = 0  # of that message
        self._tail, self._filled = _NOTHING, 0

    def take(self, frame: memoryview) -> tuple[wire.Message, int] | None:
        """The message that this frame ends, and the bytes that it has.

        Raises:
            ProtocolError: the frame is not what comes next, or the message breaks a rule.
        """
        if self._header is None:
            self._header, self._num_bytes, self._filled = codec.read_header(frame), len(frame), 0
            self._tail = _aligned_buffer(codec.num_tail_bytes(self._header))
        elif not frame or self._filled + len(frame) > len(self._tail):
            raise ProtocolError(
                f"a fragment of {len(frame)} bytes came where at most {len(self._tail) - self._filled} were expected"
            )
        else:
            self._tail[self._filled : self._filled + len(frame)] = np.frombuffer(frame, np.uint8)
            self._filled += len(frame)
        if self._filled < len(self._tail):
            return None
        header, tail, self._header, self._tail = self._header, self._tail, None, _NOTHING
        message = codec.complete(header, tail.data if len(tail) else None)
        if isinstance(message, wire.ChunkMessage):
            self._check_number(message.number)
        return message, self._num_bytes + len(tail)

    def _check_number(self, number: int) -> None:
        if self._purpose != wire.DATA:
            raise ProtocolError("a chunk on a control link")
        if number != self._next_number:
            raise ProtocolError(f"chunk {number} came where {self._next_number} was expected")
        self._next_number += 1


def _aligned_buffer(num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An uninitialised buffer whose first byte lies on a multiple of TAIL_ALIGNMENT_BYTES."""
    if not num_bytes:
        return _NOTHING
    room = np.empty(num_bytes + TAIL_ALIGNMENT_BYTES, np.uint8)  # [bytes]
    offset = -room.ctypes.data % TAIL_ALIGNMENT_BYTES
    return room[offset : offset + num_bytes]
