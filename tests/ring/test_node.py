"""What a node does with links that are not as they should be, and with forwards that nobody needs any more."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.rows import NO_PARENT, Chunk, Passage, Row, SessionSpec
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import LinkLostError, PlacementError, StageFailedError
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import open_link
from flowspec_edge.node import layer_loading
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from tests.narrowing import instance
from tests.ring.conftest import GIB

WAIT_S = 30.0
"""A bound on waiting in another thread; nothing takes this long unless it has failed."""


@pytest.fixture
async def node(int8_bundle: Bundle) -> AsyncIterator[Node]:
    settings = NodeSettings(
        name="pi-hall", cluster="test", bundles=(int8_bundle,), memory_bytes=GIB, is_announced=False
    )
    node = await Node.start(settings)
    yield node
    await node.close()


def hello(purpose: str = wire.CONTROL, ring: str = "ring-1") -> wire.Hello:
    return wire.Hello("pi-attic", "0.1.0", wire.PROTOCOL_VERSION, purpose, ring)


async def asked(node: Node, served: Bundle, **changes: Any) -> tuple[Link, wire.Message]:
    """A control link on which a stage was asked for, and the node's answer."""
    request: dict[str, Any] = {
        **{"ring": "ring-1", "hop": 0, "bundle": served.digest, "start": 0, "stop": 8},
        **{"next_node": "pi-hall", "next_host": "127.0.0.1", "next_port": node.port},
        **changes,
    }
    link, _ = await open_link("127.0.0.1", node.port, hello())
    link.send(wire.OpenStage(**request))
    return link, await link.receive()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bundle": "0" * 64}, "has no bundle 000000000000; start it with --bundle"),
        ({"start": 2, "stop": 99}, r"layers \[2, 99\) cannot be cut"),
        ({"next_node": "pi-cellar"}, "answers pi-hall instead"),
        ({"next_port": 1}, "cannot be reached"),
    ],
)
async def test_a_stage_that_cannot_be_opened_says_why(
    node: Node, int8_bundle: Bundle, changes: dict[str, Any], text: str
) -> None:
    link, answer = await asked(node, int8_bundle, **changes)
    assert isinstance(answer, wire.StageFailure)
    with pytest.raises(StageFailedError, match=text):
        raise StageFailedError(instance(answer, wire.StageFailure).reason)
    await link.close()


async def test_a_precision_set_by_hand_goes_before_a_planned_one(node: Node, int8_bundle: Bundle) -> None:
    link, answer = await asked(node, int8_bundle, precision="w8a8")
    assert "has no precision 'w8a8'" in instance(answer, wire.StageFailure).reason
    await link.close()
    node.precisions.by_hand = "int8"
    link, answer = await asked(node, int8_bundle, precision="w8a8")
    assert isinstance(answer, wire.StageOpened)
    await link.close()


async def test_a_session_larger_than_the_model_can_use_is_refused(node: Node, int8_bundle: Bundle) -> None:
    link, answer = await asked(node, int8_bundle)
    assert isinstance(answer, wire.StageOpened)
    data, _ = await open_link("127.0.0.1", node.port, hello(wire.DATA, "ring-1/0"))
    link.send(wire.OpenSession(SessionSpec(1, 2**40)))
    failure = await link.receive()
    assert "a session of 1099511627776 rows exceeds" in instance(failure, wire.StageFailure).reason
    await data.close()
    await link.close()


async def test_a_chunk_without_credit_ends_the_stage(node: Node, int8_bundle: Bundle) -> None:
    link, _ = await asked(node, int8_bundle)
    data, _ = await open_link("127.0.0.1", node.port, hello(wire.DATA, "ring-1/0"))
    link.send(wire.OpenSession(SessionSpec(1, 100)))
    assert await link.receive() == wire.SessionOpened(1)
    for number in range(9):
        data.send(wire.ChunkMessage(number, Chunk(1, (Row(number, number - 1 if number else NO_PARENT, 5),), 1)))
    failure = await link.receive()
    assert "a chunk without credit" in instance(failure, wire.StageFailure).reason
    await data.close()
    await link.close()


async def test_a_cancel_ends_the_forward_it_was_meant_for_and_not_the_next(
    node: Node, int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = threading.Event()
    seen: list[tuple[int, bool]] = []

    class Runner(StageRunner):
        def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool] = lambda: False) -> ev.ForwardFinished:
            if forward.session == 1:
                began.set()
                deadline = time.monotonic() + WAIT_S
                while not is_cancelled() and time.monotonic() < deadline:
                    time.sleep(0.001)
            seen.append((forward.session, is_cancelled()))
            return ev.ForwardFinished(np.zeros((len(forward.rows), 8), np.float32))

    monkeypatch.setattr(layer_loading, "StageRunner", Runner)
    link, _ = await asked(node, int8_bundle)
    data, _ = await open_link("127.0.0.1", node.port, hello(wire.DATA, "ring-1/0"))
    async with node.arrivals.data_link("ring-1/1") as returned:
        for session in (1, 2):
            link.send(wire.OpenSession(SessionSpec(session, 100)))
            assert await link.receive() == wire.SessionOpened(session)
            data.send(wire.ChunkMessage(session - 1, Chunk(session, (Row(0, NO_PARENT, 5),), 1)))
        assert await asyncio.to_thread(began.wait, WAIT_S)
        link.send(wire.CloseSession(1))
        chunk = instance(await returned.receive(), wire.ChunkMessage).chunk
    assert (chunk.session, seen) == (2, [(1, True), (2, False)])
    await data.close()
    await link.close()


async def test_a_chunk_runs_in_its_turn_and_tells_of_its_passage(node: Node, int8_bundle: Bundle) -> None:
    link, _ = await asked(node, int8_bundle)
    data, _ = await open_link("127.0.0.1", node.port, hello(wire.DATA, "ring-1/0"))
    async with node.arrivals.data_link("ring-1/1") as returned:
        link.send(wire.OpenSession(SessionSpec(1, 100)))
        assert await link.receive() == wire.SessionOpened(1)
        earlier = Passage(4, 0.5, 0.25)
        data.send(wire.ChunkMessage(0, Chunk(1, (Row(0, NO_PARENT, 5),), 1, turn=2, passages=(earlier,))))
        link.send(wire.BeginTurn(1, 2))
        assert await data.receive() == wire.Credit(1)
        chunk = instance(await returned.receive(), wire.ChunkMessage).chunk
    assert chunk.turn == 3
    assert chunk.passages[0] == earlier
    assert (chunk.passages[1].num_rows, len(chunk.passages)) == (1, 2)
    await data.close()
    await link.close()


async def test_a_nodes_memory_is_taken_and_given_back(node: Node, int8_bundle: Bundle) -> None:
    link, _ = await asked(node, int8_bundle)
    other, welcome = await open_link("127.0.0.1", node.port, hello())
    assert welcome.free_memory_bytes < GIB
    await other.close()
    await link.close()
    while node.memory.free_bytes < GIB:
        other, _ = await open_link("127.0.0.1", node.port, hello())
        await other.close()


async def test_a_data_link_that_nobody_expects_is_closed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.arrivals, "limit_s", 0.05)
    link, _ = await open_link("127.0.0.1", node.port, hello(wire.DATA, "no-ring/0"))
    with pytest.raises(LinkLostError, match="nobody here expected the data link no-ring/0"):
        await link.receive()
    await link.close()


async def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(node: Node, int8_bundle: Bundle) -> None:
    small = await Node.start(
        NodeSettings(name="pi-zero", cluster="test", bundles=(int8_bundle,), memory_bytes=GIB // 16, is_announced=False)
    )
    with pytest.raises(PlacementError, match="add a node"):
        async with open_ring(node, int8_bundle, [small.announcement]):
            pass
    await small.close()
