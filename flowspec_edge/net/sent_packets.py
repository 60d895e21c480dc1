"""What the system counts of the packets that it sends over a TCP connection. Systems other than Linux tell nothing."""

from __future__ import annotations

import socket
import struct
import sys
from typing import NamedTuple, Protocol

_COUNTS = struct.Struct("=100x I 52x I 56x I")
"""Of the kernel's ``struct tcp_info`` (linux/tcp.h, append-only, Linux 4.20 or newer): tcpi_total_retrans,
tcpi_data_segs_out, and tcpi_dsack_dups, the packets that the peer had already when they came again."""


class Packets(NamedTuple):
    """Packets with data that were sent, and how many of these were lost."""

    num_sent: int
    num_lost: int


class Connection(Protocol):
    """A socket, or asyncio's view of one."""

    def getsockopt(self, level: int, option: int, num_bytes: int, /) -> bytes: ...


class SentPackets:
    """Counts the packets of one connection.

    One that was sent again without need, since its acknowledgement was late, is not lost; the peer tells a round trip
    later. Losses are counted once they are more than ever before, so that what was taken back is never told twice.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._num_sent = self._num_lost = 0

    def take(self) -> Packets:
        """Those since the last call; none where the system does not tell, or the connection has ended."""
        if sys.platform != "linux":
            return Packets(0, 0)
        try:
            told = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _COUNTS.size)
        except OSError:
            return Packets(0, 0)
        if len(told) < _COUNTS.size:
            return Packets(0, 0)
        num_repeated, num_sent, num_needless = _COUNTS.unpack(told)
        num_lost = max(num_repeated - num_needless, self._num_lost)
        taken = Packets(num_sent - self._num_sent, num_lost - self._num_lost)
        self._num_sent, self._num_lost = num_sent, num_lost
        return taken
