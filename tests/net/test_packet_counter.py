"""Links are counted, and those that lose packets are probed: how many probes is the core's affair (``Probing``)."""

import asyncio

import pytest

from flowspec_edge.core import wire
from flowspec_edge.core.planning.probing import Probing
from flowspec_edge.net import packet_counter
from flowspec_edge.net.packet_counter import PacketCounter
from flowspec_edge.net.sent_packets import Packets
from tests.fake_links import LIMIT_S, fake_pair


async def test_every_link_is_counted_and_the_one_that_loses_packets_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packet_counter, "PROBE_EVERY_S", 0.0)
    sound, bad = (fake_pair("attic", peer, wire.DATA)[0] for peer in ("hall", "cellar"))
    sound.packets, bad.packets = Packets(30, 0), Packets(20, 1)
    counter = PacketCounter(sound, bad)
    async with asyncio.timeout(LIMIT_S):
        assert await counter.count() == [Packets(30, 0), Packets(20, 1)]
        assert await counter.count() == [Packets(0, 0), Packets(0, 0)]
    assert 0 < bad.num_probes <= Probing().count(20, 1, 0.0) and sound.num_probes == 0


async def test_probes_leave_one_after_another_and_no_longer_than_until_the_next_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packet_counter, "COUNT_S", 0.0)
    link, _ = fake_pair("attic", "hall", wire.DATA)
    link.packets = Packets(20, 10)
    counter = PacketCounter(link)
    async with asyncio.timeout(LIMIT_S):
        await counter.count()
        await counter.count()
    assert link.num_probes == 1
