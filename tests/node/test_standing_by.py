"""How layers come to stand by on a node, and what becomes of them: messages in, messages out. No sockets, no ONNX."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.planning.placement import standby_memory_bytes
from flowspec_edge.errors import FetchError, ProtocolError
from flowspec_edge.node import layer_loading, standing_by
from flowspec_edge.node.standing_by import FETCH_BYTES_PER_S, stand_by
from flowspec_edge.weights.supply import OnFetch
from tests.fake_links import LIMIT_S, FakeLink, fake_pair, settle
from tests.node.test_stage_opening import GIB, FakeRunner, Opened


@pytest.fixture
async def node(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    opened = Opened(bundle, monkeypatch)
    yield opened
    await opened.kept.close()


class Asked:
    """An origin's end of a link on which a node stands by."""

    def __init__(self, node: Opened) -> None:
        self.node = node
        self.origin, self.control = fake_pair("origin", "hall", ring="")

    def request(self, start: int, stop: int) -> wire.PrepareLayers:
        return wire.PrepareLayers(self.node.bundle.digest, start, stop)

    async def prepare(self, start: int, stop: int) -> wire.Message:
        self.origin.send(self.request(start, stop))
        return await self.origin.receive()


@contextlib.asynccontextmanager
async def asking(node: Opened) -> AsyncIterator[Asked]:
    asked = Asked(node)

    async def serve() -> None:
        request = await asked.control.receive()
        assert isinstance(request, wire.PrepareLayers)
        await stand_by(node.opener, asked.control, request)

    async with asyncio.timeout(LIMIT_S):
        serving = asyncio.create_task(serve())
        try:
            yield asked
        finally:
            await asked.origin.close()
            await serving


def num_bytes(node: Opened, start: int, stop: int) -> int:
    return standby_memory_bytes(node.bundle.manifest.blocks_of(start, stop))


async def test_layers_are_fetched_slowly_and_loaded_and_count_as_free(node: Opened) -> None:
    async with asking(node) as asked:
        answer = await asked.prepare(4, 6)
        assert isinstance(answer, wire.LayersPrepared)
        assert (answer.start, answer.stop, answer.memory_bytes) == (4, 6, num_bytes(node, 4, 6))
        assert isinstance(await asked.prepare(6, 7), wire.LayersPrepared)
        assert FakeRunner.loaded == [(4, 5), (5, 6), (6, 7)]
        assert node.supply.wanted[0].max_bytes_per_s == FETCH_BYTES_PER_S
        assert node.supply.files_closed == 2, "they are in no stage's way on the disk"
        assert node.memory.free_bytes == GIB and node.kept.standby_bytes == num_bytes(node, 4, 7)
    assert node.kept.standby_bytes == 0 and len(node.kept._kept) == 2, "for a while"


async def test_a_stage_over_them_loads_nothing(node: Opened) -> None:
    async with asking(node) as asked:
        await asked.prepare(4, 5)
        await asked.prepare(2, 3)
        await asked.prepare(3, 4)
        FakeRunner.loaded.clear()
        async with node.ask(node.request(2, 4)) as origin:
            assert isinstance(await origin.receive(), wire.StageOpened)
            assert node.kept.standby_bytes == num_bytes(node, 4, 5), "that one still stands by"
        assert FakeRunner.loaded == []
        given_back = [await asked.origin.receive(), await asked.origin.receive()]
        assert given_back == [wire.LayersGivenBack(2, 3), wire.LayersGivenBack(3, 4)]


async def test_what_the_stage_of_another_ring_has_need_not_be_loaded_twice(node: Opened) -> None:
    async with node.ask(node.request(2, 4)) as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
    async with asking(node) as asked:
        assert isinstance(await asked.prepare(3, 4), wire.LayersPrepared)
    assert FakeRunner.loaded == [(2, 3), (3, 4)]


async def test_without_room_it_refuses_by_name(node: Opened) -> None:
    node.memory.offered_bytes = num_bytes(node, 0, 2) + num_bytes(node, 2, 3) // 2
    async with asking(node) as asked:
        assert isinstance(await asked.prepare(0, 2), wire.LayersPrepared)
        refusal = await asked.prepare(2, 3)
        assert isinstance(refusal, wire.StageFailure)
        assert refusal.reason == "layers [2, 3) cannot stand by: node hall has 2 MiB free, and they need 3 MiB"
    assert FakeRunner.loaded == [(0, 1), (1, 2)]


async def test_it_is_given_back_where_a_stage_needs_the_memory(node: Opened) -> None:
    async with asking(node) as asked:
        await asked.prepare(0, 1)
        await asked.prepare(1, 2)
        needed = node.bundle.manifest.blocks_of(4, 8)
        node.memory.offered_bytes = standby_memory_bytes(needed) + num_bytes(node, 0, 1) + 60 * 2**20
        async with node.ask(node.request(4, 8)) as origin:
            assert isinstance(await origin.receive(), wire.StageOpened)
            assert await asked.origin.receive() == wire.LayersGivenBack(1, 2)
            assert node.kept.standby_bytes == num_bytes(node, 0, 1)


async def test_what_is_kept_gives_way(node: Opened) -> None:
    async with node.ask(node.request(2, 4)) as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
    node.memory.offered_bytes = node.kept.kept_bytes + num_bytes(node, 3, 4)
    async with asking(node) as asked:
        await asked.prepare(3, 4)
        assert node.kept._kept, "there is room for both"
        assert isinstance(await asked.prepare(2, 3), wire.LayersPrepared)
        assert not node.kept._kept
    assert FakeRunner.loaded == [(2, 3), (3, 4)], "what is wanted of it is taken before it goes"


async def test_nothing_is_loaded_while_a_ring_computes(node: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing_by, "QUIET_S", 0.0)
    async with asking(node) as asked:
        with node.activity.busy():
            asked.origin.send(asked.request(0, 1))
            await settle()
            assert len(node.supply.wanted) == 1 and not FakeRunner.loaded
        assert isinstance(await asked.origin.receive(), wire.LayersPrepared)


async def test_a_fetch_that_is_cancelled_ends_at_once_and_may_be_asked_for_again(node: Opened) -> None:
    ended = asyncio.Event()

    async def fetch_for_ever(on_fetch: OnFetch) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    node.supply.before = fetch_for_ever
    async with asking(node) as asked:
        asked.origin.send(asked.request(0, 1))
        await settle()
        asked.origin.send(wire.CancelPreparing())
        answer = await asked.origin.receive()
        assert answer == wire.StageFailure("the layers are not prepared: that was cancelled")
        assert ended.is_set() and not FakeRunner.loaded
        node.supply.before = None
        asked.origin.send(wire.CancelPreparing())  # it came too late, and means nothing
        assert isinstance(await asked.prepare(0, 1), wire.LayersPrepared)


async def test_what_is_cancelled_before_it_has_begun_is_answered_too(node: Opened) -> None:
    async with asking(node) as asked:
        await asked.prepare(0, 1)
        asked.origin.send(asked.request(1, 2))
        asked.origin.send(wire.CancelPreparing())
        assert await asked.origin.receive() == wire.StageFailure("the layers are not prepared: that was cancelled")
        assert isinstance(await asked.prepare(1, 2), wire.LayersPrepared)


async def test_what_is_being_loaded_when_it_is_cancelled_stands_by_afterwards(
    node: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def load_slowly(*arguments: Any) -> Any:
        begun.set()
        assert may_end.wait(LIMIT_S)
        return layer_loading.load_runner(*arguments)

    monkeypatch.setattr(standing_by, "load_runner", load_slowly)
    async with asking(node) as asked:
        asked.origin.send(asked.request(0, 1))
        await asyncio.to_thread(begun.wait, LIMIT_S)
        asked.origin.send(wire.CancelPreparing())
        await settle()
        may_end.set()
        assert isinstance(await asked.origin.receive(), wire.LayersPrepared)
    assert FakeRunner.loaded == [(0, 1)]


async def test_a_stage_that_begins_meanwhile_goes_before(node: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: Any) -> Any:
        node.memory.offered_bytes = 0
        return layer_loading.load_runner(*arguments)

    monkeypatch.setattr(standing_by, "load_runner", load)
    async with asking(node) as asked:
        refusal = await asked.prepare(0, 1)
        assert isinstance(refusal, wire.StageFailure) and "has 0 MiB free" in refusal.reason
        assert node.kept.standby_bytes == 0


async def test_weights_that_cannot_be_had_are_told_and_the_next_are_tried(node: Opened) -> None:
    async def fail(on_fetch: OnFetch) -> None:
        raise FetchError("no source has layers-000-001.onnx")

    node.supply.before = fail
    async with asking(node) as asked:
        refusal = await asked.prepare(0, 1)
        assert refusal == wire.StageFailure("layers [0, 1) cannot stand by: no source has layers-000-001.onnx")
        node.supply.before = None
        assert isinstance(await asked.prepare(1, 2), wire.LayersPrepared)


@pytest.mark.parametrize("is_early", [False, True])
async def test_what_does_not_belong_on_such_a_link_breaks_the_rules(node: Opened, is_early: bool) -> None:
    asked = Asked(node)

    async def fetch_for_ever(on_fetch: OnFetch) -> None:
        await asyncio.Event().wait()

    node.supply.before = fetch_for_ever
    asked.origin.send(asked.request(1, 2) if is_early else wire.Credit(1))
    with pytest.raises(ProtocolError, match="PrepareLayers came before" if is_early else "Credit came where layers"):
        async with asyncio.timeout(LIMIT_S):
            await stand_by(node.opener, asked.control, asked.request(0, 1))
    assert not FakeRunner.loaded


async def test_a_lost_origin_ends_what_is_done_for_it(node: Opened) -> None:
    link: FakeLink
    async with asking(node) as asked:
        await asked.prepare(0, 1)
        link = asked.control
    assert not link.is_open and node.kept.standby_bytes == 0
