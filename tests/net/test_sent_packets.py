"""What the system tells of the packets it sent: read from a real connection, and from what it may say."""

import asyncio
import socket
import struct
import sys

import pytest

from flowspec_edge.core import wire
from flowspec_edge.net.sent_packets import Packets, SentPackets
from tests.net.conftest import linked

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing")


class Told:
    """A connection of which the system tells this."""

    def __init__(self) -> None:
        self.num_repeated = self.num_sent = self.num_needless = 0
        self.length = 280
        self.has_ended = False

    def getsockopt(self, level: int, option: int, num_bytes: int, /) -> bytes:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        if self.has_ended:
            raise OSError(9, "Bad file descriptor")
        info = bytearray(self.length)
        for offset, value in ((100, self.num_repeated), (156, self.num_sent), (216, self.num_needless)):
            if offset + 4 <= self.length:
                struct.pack_into("=I", info, offset, value)
        return bytes(info[:num_bytes])


@linux_only
def test_packets_are_told_once_and_needless_repetitions_are_not_lost() -> None:
    told = Told()
    packets = SentPackets(told)
    told.num_sent, told.num_repeated = 100, 3
    assert packets.take() == Packets(100, 3) and packets.take() == Packets(0, 0)
    told.num_needless = 2  # of these three
    assert packets.take() == Packets(0, 0), "what was told is not taken back"
    told.num_sent, told.num_repeated = 150, 5
    assert packets.take() == Packets(50, 0), "two were told too many before"
    told.num_sent, told.num_repeated = 160, 6
    assert packets.take() == Packets(10, 1)


@linux_only
def test_a_kernel_that_tells_less_and_a_connection_that_has_ended_tell_nothing() -> None:
    told = Told()
    told.num_sent = 100
    packets = SentPackets(told)
    told.length = 192  # Linux 4.9
    assert packets.take() == Packets(0, 0)
    told.length, told.has_ended = 220, True
    assert packets.take() == Packets(0, 0)
    told.has_ended = False
    assert packets.take() == Packets(100, 0)


def test_other_systems_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    told = Told()
    told.num_sent = 100
    assert SentPackets(told).take() == Packets(0, 0)


@linux_only
async def test_both_ends_of_a_link_count_what_they_send_and_nothing_is_lost_on_loopback() -> None:
    async with linked(wire.DATA) as pair:
        before = pair.near.take_packets()
        assert before.num_sent > 0, "Hello at least"
        for number in range(5):
            pair.near.send(wire.Credit(number))
            async with asyncio.timeout(5):
                await pair.far.receive()
        assert pair.near.take_packets() == Packets(5, 0)
        assert pair.far.take_packets().num_lost == 0
    assert pair.near.take_packets() == Packets(0, 0), "it has ended"
