"""Counts the packets that a node sends over its links, and sends the probes that they call for (``Probing``)."""

from __future__ import annotations

import asyncio
import time

from flowspec_edge.core.planning.packet_loss import COUNT_S
from flowspec_edge.core.planning.probing import PROBE_EVERY_S, Probing
from flowspec_edge.net.connection import Link
from flowspec_edge.net.sent_packets import Packets


class PacketCounter:
    """Of the near ends of some links."""

    def __init__(self, *links: Link) -> None:
        self._links = links
        self._probings = [Probing() for _ in links]
        self._num_probes = [0] * len(links)

    async def count(self) -> list[Packets]:
        """Take COUNT_S, and probe meanwhile; then tell what each link has sent since the last time."""
        await self._probe()
        counts, now = [link.take_packets() for link in self._links], time.monotonic()
        self._num_probes = [
            probing.count(*packets, now) for probing, packets in zip(self._probings, counts, strict=True)
        ]
        return counts

    async def _probe(self) -> None:
        """Where this process is busy, there is time for fewer probes."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + COUNT_S
        for number in range(max(self._num_probes)):
            for link, num_probes in zip(self._links, self._num_probes, strict=True):
                if number < num_probes:
                    link.probe()
            await asyncio.sleep(PROBE_EVERY_S)
            if loop.time() >= ends_at:
                break
        await asyncio.sleep(ends_at - loop.time())
