"""What waits is written in its order, in pieces, and only while the transport takes it."""

import asyncio
from collections.abc import Sequence

from flowspec_edge.net.frames import FrameReader, Opcode
from flowspec_edge.net.outbox import FRAGMENT_BYTES, Outbox

TAIL = bytes(range(256)) * 512  # 128 KB


class Transport(asyncio.Transport):
    """Takes pieces, and has the outbox pause after some of them."""

    def __init__(self, pauses_after: int | None = None) -> None:
        super().__init__()
        self.outbox = Outbox(self, is_client=False)
        self.pieces: list[bytes] = []
        self.pauses_after = pauses_after
        self.is_closed = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == FRAGMENT_BYTES

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.pieces.append(bytes(data))
        self.outbox.is_paused = len(self.pieces) == self.pauses_after


def frames_of(pieces: Sequence[bytes]) -> list[tuple[Opcode, bytes]]:
    reader, found = FrameReader(), []
    for piece in pieces:
        reader.room()[: len(piece)] = piece
        reader.fill(len(piece))
        while (frame := reader.take()) is not None:
            found.append((frame[0], bytes(frame[1])))
    return found


HEADER, FIRST, SECOND = (
    (Opcode.BINARY, payload) for payload in (b"header", TAIL[:FRAGMENT_BYTES], TAIL[FRAGMENT_BYTES:])
)


def test_a_header_leaves_with_the_first_fragment_of_its_tail() -> None:
    transport = Transport()
    transport.outbox.put(Opcode.BINARY, b"header", memoryview(TAIL))
    assert [frames_of([piece]) for piece in transport.pieces] == [[HEADER, FIRST], [SECOND]]


def test_a_heartbeat_passes_between_two_fragments_and_a_goodbye_comes_last() -> None:
    transport = Transport(pauses_after=1)
    outbox = transport.outbox
    outbox.put(Opcode.BINARY, b"header", memoryview(TAIL))
    outbox.put(Opcode.BINARY, b"next")
    outbox.put_last(Opcode.CLOSE, b"")
    assert len(outbox) == 1, "the one that is being written waits no more"
    outbox.put_now(Opcode.PING, b"")
    outbox.is_paused = False
    outbox.flush()
    said = [HEADER, FIRST, (Opcode.PING, b""), SECOND, (Opcode.BINARY, b"next"), (Opcode.CLOSE, b"")]
    assert frames_of(transport.pieces) == said


def test_nothing_is_written_to_a_transport_that_has_ended() -> None:
    transport = Transport()
    transport.is_closed = True
    transport.outbox.put(Opcode.BINARY, b"header", memoryview(TAIL))
    transport.outbox.put_now(Opcode.PONG, b"")
    transport.outbox.clear()
    assert not transport.pieces and not len(transport.outbox)
