"""What all links hold together is bounded: the one that stands still the longest gives way."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from flowspec_edge.core import codec, wire
from flowspec_edge.core.rows import Chunk, Row
from flowspec_edge.errors import LinkLostError, ProtocolError
from flowspec_edge.net import connection
from flowspec_edge.net.held_bytes import HeldBytes
from tests.narrowing import present
from tests.net.conftest import linked, send_raw


class Holder:
    def __init__(self) -> None:
        self.gave_way: list[tuple[int, int]] = []

    def give_way(self, num_bytes: int, limit_bytes: int) -> None:
        self.gave_way.append((num_bytes, limit_bytes))


def test_the_one_that_brought_nothing_for_the_longest_time_gives_way() -> None:
    held, idle, slow, quick = HeldBytes(100), Holder(), Holder(), Holder()
    held.add(slow, 5)
    held.add(idle, 40)
    held.add(quick, 50)
    held.add(slow, 5)
    assert held.num_bytes == 100
    held.add(quick, 1)
    assert (idle.gave_way, slow.gave_way, quick.gave_way) == ([(40, 100)], [], [])
    assert held.num_bytes == 61
    held.release(quick, 51)
    held.release(idle, 40)  # taken after it gave way
    assert held.num_bytes == 10 and held.drop(slow) == 10 and held.num_bytes == 0


def test_one_alone_that_holds_too_much_gives_way_itself() -> None:
    held, greedy = HeldBytes(100), Holder()
    held.add(greedy, 101)
    assert greedy.gave_way == [(101, 100)] and held.num_bytes == 0


async def test_an_unfinished_tail_gives_way_and_a_link_that_goes_on_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    account = HeldBytes(100_000)
    monkeypatch.setattr(connection, "ALL_LINKS", account)
    header, tail = codec.encode(wire.ChunkMessage(0, Chunk(1, (Row(0, 1, 2),), 1, np.zeros((1, 20_000), np.float32))))
    async with linked(wire.DATA) as stalled, linked(wire.DATA) as honest:
        send_raw(stalled.near, header)
        send_raw(stalled.near, bytes(present(tail)[:60_000]))
        while account.num_bytes < 60_000:
            await asyncio.sleep(0.001)
        for number in range(3):
            message = wire.ChunkMessage(number, Chunk(1, (Row(0, 1, 2),), 1, np.zeros((1, 16_000), np.float32)))
            honest.near.send(message)
            assert isinstance(await honest.far.receive(), wire.ChunkMessage)
        with pytest.raises(ProtocolError, match=r"peer pi-hall: .* stood here unfinished .*MAX_HELD_BYTES"):
            await stalled.far.receive()
        with pytest.raises(LinkLostError, match="closed the link: .*unfinished"):
            await stalled.near.receive()
    assert account.num_bytes == 0


async def test_a_link_that_nobody_takes_from_stops_reading_at_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "RECEIVE_QUEUE_BYTES", 100_000)
    async with linked(wire.DATA) as pair:  # without a heartbeat, which nobody answers who does not read
        for _ in range(40):
            pair.near.send(wire.Probe(bytes(wire.MAX_PROBE_BYTES), False))
        while len(pair.far._incoming) < 4:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert len(pair.far._incoming) == 4, "131 KB, the first beyond the limit included"
        for _ in range(40):
            await pair.far.receive()


@pytest.mark.parametrize("error", [KeyError("x\x1b"), RecursionError("deep"), MemoryError()])
async def test_whatever_a_reader_trips_over_ends_its_link_at_both_ends(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async with linked() as pair, linked() as other:

        def fail(header: codec.Header, tail: object) -> wire.Message:
            raise error

        monkeypatch.setattr(codec, "complete", fail)
        pair.near.send(wire.CloseSession(1))
        with pytest.raises(ProtocolError, match=f"peer pi-hall: its message cannot be read .{type(error).__name__}"):
            await pair.far.receive()
        with pytest.raises(LinkLostError, match="closed the link: .*cannot be read") as told:
            await pair.near.receive()
        assert "\x1b" not in str(told.value)
        monkeypatch.undo()
        other.near.send(wire.CloseSession(2))
        assert await other.far.receive() == wire.CloseSession(2)


async def test_whatever_a_writer_trips_over_ends_its_link(monkeypatch: pytest.MonkeyPatch) -> None:
    async with linked() as pair:

        def fail(data: bytes) -> None:
            raise KeyError("x")

        monkeypatch.setattr(pair.near._transport, "write", fail)
        pair.near.send(wire.CloseSession(1))
        with pytest.raises(LinkLostError, match="broke .KeyError"):
            await pair.near.receive()
