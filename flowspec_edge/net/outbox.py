"""What a link has to write: frames in their order, each handed to the transport as soon as that takes anything."""

from __future__ import annotations

import asyncio
from collections import deque

from flowspec_edge.net.frames import Opcode, head_of

FRAGMENT_BYTES = 65536
"""Largest piece of a tail. 600 KB in one message took 1066 us on loopback, in pieces of 64-128 KB 280 us (x86, 2
cores)."""


class Outbox:
    """Frames for one transport. ``is_client`` is the side that has connected."""

    def __init__(self, transport: asyncio.Transport, *, is_client: bool) -> None:
        self._transport, self._is_client = transport, is_client
        self._waiting: deque[tuple[bytes, memoryview | None]] = deque()  # frames, each with the tail that follows
        self._tail: memoryview | None = None  # what is left of the one that is being written
        self._goodbye: bytes | None = None
        self.is_paused = False
        transport.set_write_buffer_limits(high=FRAGMENT_BYTES)

    def __len__(self) -> int:
        """How many frames with their tails wait."""
        return len(self._waiting)

    def put(self, opcode: Opcode, payload: bytes, tail: memoryview | None = None) -> None:
        """Write a frame, and its tail in further ones, behind those that wait."""
        self._waiting.append((self._frame(opcode, payload), tail))
        self.flush()

    def put_now(self, opcode: Opcode, payload: bytes) -> None:
        """Write a short frame in front of those that wait; two pieces of a tail may be around it."""
        if not self._transport.is_closing():
            self._transport.write(self._frame(opcode, payload))

    def put_last(self, opcode: Opcode, payload: bytes) -> None:
        """Write a frame behind all others."""
        self._goodbye = self._frame(opcode, payload)
        self.flush()

    def flush(self) -> None:
        """Hand to the transport what waits, as long as it takes it."""
        while not (self.is_paused or self._transport.is_closing()) and (piece := self._next_piece()):
            self._transport.write(piece)

    def clear(self) -> None:
        """Let go of what will not be written any more."""
        self._waiting.clear()
        self._tail = self._goodbye = None

    def _frame(self, opcode: Opcode, payload: bytes) -> bytes:
        return head_of(opcode, len(payload), is_client=self._is_client) + payload

    def _next_piece(self) -> bytes | None:
        """A frame, with the first fragment of its tail, or one of the further ones."""
        frame = b""
        if self._tail is None:
            if not self._waiting:
                goodbye, self._goodbye = self._goodbye, None
                return goodbye
            frame, self._tail = self._waiting.popleft()
            if self._tail is None:
                return frame
        fragment, left = self._tail[:FRAGMENT_BYTES], self._tail[FRAGMENT_BYTES:]
        self._tail = left if len(left) else None
        return b"".join((frame, head_of(Opcode.BINARY, len(fragment), is_client=self._is_client), fragment))
