"""An origin that has nodes stand by: what it asks them, what it makes of their answers, which ring it opens then."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.planning import preparing
from flowspec_edge.core.planning.placement import LeftOut, StagePlan
from flowspec_edge.errors import FlowspecError, RingLostError
from flowspec_edge.origin import dialogue
from flowspec_edge.origin import standby as module
from flowspec_edge.origin.measured_links import Peer
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.ring import Ring, RingStage
from flowspec_edge.origin.standby import Standbys
from tests.fake_links import LIMIT_S, FakeLink
from tests.narrowing import present
from tests.origin.fake_nodes import GIB, FakeNetwork, FakeNode

ALL = {"attic": (0, 3), "cellar": (3, 6), "hall": (6, 8)}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "QUIET_S", 0.0)


@pytest.fixture
def network(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeNetwork:
    network = FakeNetwork(bundle, *ALL)
    monkeypatch.setattr(dialogue, "open_link", network.open_link)
    monkeypatch.setattr(module, "open_link", network.open_link)
    for node in network.nodes.values():
        node.answer = prepare
    return network


async def prepare(node: FakeNode, message: wire.Message) -> list[wire.Message]:
    match message:
        case wire.PrepareLayers(_, start, stop):
            return [wire.LayersPrepared(start, stop, 1000, 5)]
    return []


def ring_of(network: FakeNetwork, **layers: tuple[int, int]) -> Ring:
    found = {board.node: board for board in network.found}
    stages = [RingStage(StagePlan(node, *part, 0), found[node], 0) for node, part in layers.items()]
    return cast(Ring, SimpleNamespace(stages=stages, loss=None))


@contextlib.asynccontextmanager
async def standbys_of(network: FakeNetwork, plan_options: PlanOptions | None = None) -> AsyncIterator[Standbys]:
    standbys = Standbys(network, network.bundle, plan_options)
    async with network.at_work(), asyncio.timeout(LIMIT_S):
        try:
            yield standbys
        finally:
            await standbys.close()
        standbys._core.check()


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def asked(network: FakeNetwork) -> list[tuple[str, int, int]]:
    return [
        (node.announcement.node, message.start, message.stop)
        for node in network.nodes.values()
        for message in node.asked
        if isinstance(message, wire.PrepareLayers)
    ]


async def test_each_block_is_asked_for_with_all_others_as_sources(network: FakeNetwork) -> None:
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: len(standbys.ready) == 3)
        assert asked(network) == [
            ("attic", 3, 4),
            ("cellar", 0, 1),
            ("cellar", 1, 2),
            ("cellar", 2, 3),
            ("cellar", 6, 7),
            ("cellar", 7, 8),
            ("hall", 4, 5),
            ("hall", 5, 6),
        ]
        (first, *_) = (message for message in network.nodes["hall"].asked if isinstance(message, wire.PrepareLayers))
        assert first.bundle == network.bundle.digest and first.precision == ""
        assert [text.rpartition("/")[2] for text in first.sources] == ["origin", "attic", "cellar"]
    assert not any(link.is_open for node in network.nodes.values() for link in node.controls)


async def test_the_ring_without_a_lost_node_is_told_once(network: FakeNetwork) -> None:
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: len(standbys.ready) == 3)
        assert standbys.take_over(ALL) is None, "nobody is lost"
        assert standbys.take_over({"attic"}) is None, "that are two"
        standbys.pause()
        plan = present(standbys.take_over({"attic", "hall"}))
        assert [(stage.node, stage.start, stage.stop) for stage in plan.stages] == [("attic", 0, 4), ("hall", 4, 8)]
        assert standbys.take_over({"attic", "hall"}) is None, "if it cannot be opened, another one is planned"


async def test_a_node_that_was_started_anew_has_nothing_loaded(network: FakeNetwork) -> None:
    async with standbys_of(network) as standbys:
        ring = ring_of(network, **ALL)
        standbys.follow(ring, network.found)
        await until(lambda: len(standbys.ready) == 3)
        cast(SimpleNamespace, ring).loss = RingLostError("cellar is lost", lost=("cellar",))
        assert [stage.node for stage in present(standbys.take_over(ALL)).stages] == ["attic", "hall"]


async def test_a_ring_over_a_way_that_is_cut_is_not_opened(network: FakeNetwork) -> None:
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: len(standbys.ready) == 3)
        for way in (("attic", "hall"), ("hall", "origin")):
            assert standbys.take_over({"attic", "hall"}, {way}) is None
        assert standbys.take_over({"attic", "hall"}, {("attic", "cellar")}) is not None


async def test_a_text_stops_what_is_being_prepared(network: FakeNetwork) -> None:
    may_answer = asyncio.Event()

    async def prepare_slowly(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        match message:
            case wire.PrepareLayers() if not may_answer.is_set():
                return []
            case wire.CancelPreparing():
                return [wire.StageFailure("that was cancelled")]
        return await prepare(node, message)

    for node in network.nodes.values():
        node.answer = prepare_slowly
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: len(asked(network)) == 1)
        ((name, *_),) = asked(network)
        standbys.begin_text()
        await until(lambda: network.nodes[name].asked[-1] == wire.CancelPreparing())
        await asyncio.sleep(0.01)
        assert len(asked(network)) == 1
        may_answer.set()
        standbys.end_text()
        await until(lambda: len(standbys.ready) == 3)


async def test_what_is_given_up_before_it_has_begun_is_done_later(network: FakeNetwork) -> None:
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        assert standbys._core._work is not None
        standbys.begin_text()
        await until(lambda: standbys._core._work is None)
        assert not network.hellos
        standbys.end_text()
        await until(lambda: len(standbys.ready) == 3)


async def test_planning_is_given_up_when_a_text_begins(network: FakeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    welcomed, begun = dialogue.welcome_nodes, asyncio.Event()

    async def welcome_later(*arguments: object) -> object:
        if not begun.is_set():
            begun.set()
            await asyncio.Event().wait()
        return await welcomed(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "welcome_nodes", welcome_later)
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await begun.wait()
        standbys.begin_text()
        await until(lambda: standbys._core._work is None)
        standbys.end_text()
        await until(lambda: len(standbys.ready) == 3)


async def test_a_node_lets_go_of_what_is_not_wanted_any_more_before_it_is_asked_for_the_rest(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_close, close = asyncio.Event(), FakeLink.close

    async def close_slowly(link: FakeLink, error: FlowspecError | None = None) -> None:
        await may_close.wait()
        await close(link, error)

    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, attic=(0, 2), cellar=(2, 5), hall=(5, 8)), network.found)
        await until(lambda: len(standbys.ready) == 3)
        before = asked(network)
        planned = list(network.hellos)
        monkeypatch.setattr(FakeLink, "close", close_slowly)
        monkeypatch.setattr(module, "welcome_nodes", welcomed_at_once(network))
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: standbys._ending)
        await asyncio.sleep(0.01)
        new = [one for one in asked(network) if one not in before]
        assert not {name for name, *_ in new} & set(standbys._ending) and len(network.hellos) == len(planned)
        may_close.set()
        await until(lambda: len(standbys.ready) == 3)
        assert len(network.hellos) > len(planned)


def welcomed_at_once(network: FakeNetwork) -> Callable[..., Any]:
    """In place of ``welcome_nodes``; no link is opened for it."""

    async def welcome(*arguments: object) -> tuple[dict[str, Peer], list[LeftOut]]:
        return {board.node: Peer(FakeLink(board.node), board, GIB) for board in network.found}, []

    return welcome


async def test_who_refuses_is_not_counted_on(network: FakeNetwork) -> None:
    async def refuse(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        return [wire.StageFailure("layers [3, 4) cannot stand by: node attic has 0 MiB free")]

    network.nodes["attic"].answer = refuse
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: len(asked(network)) == 8 and len(standbys.ready) == 1)  # the others are asked all the same
        assert standbys.take_over({"attic", "hall"}) is None


async def test_what_was_given_back_or_is_on_a_lost_node_is_not_counted_on(network: FakeNetwork) -> None:
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: len(standbys.ready) == 3)
        network.nodes["attic"].controls[-1].send(wire.LayersGivenBack(3, 4))
        await until(lambda: set(standbys.ready) == {"attic"})
        network.nodes["cellar"].controls[-1].cut()
        await until(lambda: not standbys.ready)


async def test_a_node_that_cannot_be_reached_holds_up_nobody(network: FakeNetwork) -> None:
    async with standbys_of(network) as standbys:
        ring = ring_of(network, attic=(0, 4), cellar=(4, 8))
        standbys.follow(ring, network.found)
        await until(lambda: len(standbys.ready) == 2)
        assert {stage.node for plan in standbys.ready.values() for stage in plan.stages} == {"attic", "cellar", "hall"}
        network.nodes["hall"].is_gone = True
        network.nodes["hall"].controls[-1].cut()
        await until(lambda: not standbys.ready)
        standbys.follow(ring, network.found)
        await until(lambda: len(standbys.ready) == 2)
        assert {stage.node for plan in standbys.ready.values() for stage in plan.stages} == {"attic", "cellar"}


async def test_a_node_that_breaks_the_rules_is_told(network: FakeNetwork) -> None:
    async def babble(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        return [wire.Credit(1)]

    network.nodes["attic"].answer = babble
    async with standbys_of(network) as standbys:
        standbys.follow(ring_of(network, **ALL), network.found)
        await until(lambda: set(standbys.ready) == {"attic"})
        await until(lambda: "Credit came where layers stand by" in str(network.nodes["attic"].controls[-1].closed_by))


async def test_where_none_are_wanted_nobody_is_asked(network: FakeNetwork) -> None:
    standbys = Standbys(network, network.bundle, None, is_wanted=False)
    standbys.follow(ring_of(network, **ALL), network.found)
    standbys.begin_text()
    standbys.end_text()
    await asyncio.sleep(0.01)
    assert not asked(network) and not network.hellos and standbys.take_over({"attic"}) is None
    await standbys.close()
