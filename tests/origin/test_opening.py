"""Rings are opened over nodes that were found: who is asked for what, and what becomes of each refusal.

No sockets, no ONNX.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, ClassVar

import msgspec
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.placement import Hop, LeftOut, Plan, StagePlan
from flowspec_edge.core.planning.prediction import Outcome
from flowspec_edge.core.speculation.prefill import RingTimes
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    NotMeasuredError,
    PlacementError,
    ProtocolError,
    RingLostError,
    StageFailedError,
)
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.origin import blame, dialogue, opening, planning
from flowspec_edge.origin.opening import explain_outcome, open_ring, plan_layers
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.remembered import load_placement
from tests.fake_links import LIMIT_S, settle
from tests.narrowing import present
from tests.origin.fake_nodes import FakeNetwork, FakeNode, open_stage


class NoEngine:
    """Computes nothing. ``made`` has those that were made, in order."""

    made: ClassVar[list[NoEngine]] = []
    drafter = None

    def __init__(self, bundle: Bundle, num_threads: int, shape: Any) -> None:
        self.num_closed = 0
        self.made.append(self)

    def close(self) -> None:
        self.num_closed += 1


no_engine: Any = NoEngine


@pytest.fixture
async def network(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[FakeNetwork]:
    network = FakeNetwork(bundle, "attic", "cellar", "hall")
    NoEngine.made.clear()
    for module in (dialogue, opening):
        monkeypatch.setattr(module, "open_link", network.open_link)
    async with asyncio.timeout(LIMIT_S), network.at_work():
        yield network
        await settle()
        links = [link for node in network.nodes.values() for link in [*node.controls, *node.data]]
        assert not any(link.is_open for link in links), "whoever leaves closes its links"
        assert [engine.num_closed for engine in NoEngine.made] == [1] * len(NoEngine.made), "and its engine, once"


def open_on(network: FakeNetwork, **options: Any) -> Any:
    return open_ring(network, network.bundle, network.found, no_engine, **options)


async def test_each_node_is_asked_for_its_layers_and_told_whom_to_connect_to(network: FakeNetwork) -> None:
    async with open_on(network) as ring:
        assert ring.is_open and ring.plan is None
        assert [(stage.plan.node, stage.plan.start, stage.plan.stop) for stage in ring.stages] == [
            ("attic", 0, 3),
            ("cellar", 3, 6),
            ("hall", 6, 8),
        ]
        assert [(stage.load_ms, stage.held_bytes, stage.fetched_bytes) for stage in ring.stages] == [
            (20, 1000 + hop, hop) for hop in range(3)
        ]
    requests = [node.request for node in network.nodes.values()]
    assert len({request.ring for request in requests}) == 1 and requests[0].ring.startswith("origin-")
    assert [(request.hop, request.start, request.stop, request.precision) for request in requests] == [
        (0, 0, 3, ""),
        (1, 3, 6, ""),
        (2, 6, 8, ""),
    ]
    assert all(request.bundle == network.bundle.digest for request in requests)
    assert [(request.next_node, request.next_host, request.next_port) for request in requests] == [
        ("cellar", "192.0.2.11", 7361),
        ("hall", "192.0.2.12", 7361),
        ("origin", "192.0.2.1", 7000),
    ]


async def test_equal_shares_go_around_a_way_that_is_cut(network: FakeNetwork) -> None:
    async with open_on(network, cut=frozenset({("attic", "cellar")})) as ring:
        assert [stage.plan.node for stage in ring.stages] in (["attic", "hall", "cellar"], ["cellar", "hall", "attic"])
    with pytest.raises(PlacementError, match="no data link can be opened between the origin and any of attic, cellar"):
        async with open_on(network, cut=frozenset((node, "origin") for node in network.nodes)):
            pass


async def test_who_gets_no_layers_is_no_neighbour(network: FakeNetwork) -> None:
    network.nodes["cellar"].welcome = wire.Welcome("cellar", "0.1.0", 1, [network.bundle.digest])
    async with open_on(network, cut=frozenset({("attic", "hall")})) as ring:
        assert len(ring.stages) == 1


async def test_who_hesitates_is_left_out_where_texts_wait_unless_all_do(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialogue, "ANSWER_S", 0.01)
    lost: list[str] = []
    slow = {"cellar"}

    async def open_late(host: str, port: int, hello: wire.Hello, *, node: str = "", **options: Any) -> Any:
        if node in slow:
            await asyncio.sleep(0.1)
        return await network.open_link(host, port, hello, node=node, **options)

    monkeypatch.setattr(dialogue, "open_link", open_late)
    async with open_on(network, is_urgent=True, on_lost=lambda board: lost.append(board.node)) as ring:
        assert [stage.plan.node for stage in ring.stages] == ["attic", "hall"] and lost == ["cellar"]
    async with open_on(network) as ring:
        assert len(ring.stages) == 3
    slow |= set(network.nodes)
    async with open_on(network, is_urgent=True) as ring:
        assert len(ring.stages) == 3


@pytest.mark.parametrize("is_urgent", [False, True])
async def test_a_plan_knows_the_cut_ways_and_measures_no_link_where_texts_wait(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch, is_urgent: bool
) -> None:
    wishes: list[dict[str, Any]] = []

    async def make(*arguments: Any, **options: Any) -> Plan:
        wishes.append(options)
        return PLAN

    monkeypatch.setattr(planning, "make_plan", make)
    cut = frozenset({("attic", "cellar")})
    async with open_on(network, plan_options=PlanOptions(), cut=cut, is_urgent=is_urgent):
        pass
    assert wishes == [{"cut": cut, "measures_links": not is_urgent}]


@pytest.mark.parametrize("is_there", [False, True])
async def test_a_stage_that_cannot_reach_the_next_names_a_cut_way_where_both_answer(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.setattr(blame, "ANSWER_S", 0.01)
    lost: list[str] = []

    async def refuse(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        if not is_there:
            near = next(near for near in network.near if near.peer == "hall" and near.purpose == wire.CONTROL)
            near.is_silent = True
        return [wire.StageFailure("peer hall cannot be reached", "hall")]

    network.nodes["cellar"].answer = refuse
    with pytest.raises(RingLostError, match="peer hall cannot be reached") as raised:
        async with open_on(network, on_lost=lambda board: lost.append(board.node)):
            pass
    loss = raised.value
    assert (loss.lost, loss.failed, loss.cut) == (
        ((), None, ("cellar", "hall")) if is_there else (("hall",), None, None)
    )
    assert lost == ([] if is_there else ["hall"])


async def test_a_node_that_falls_silent_while_it_opens_is_missed_when_a_text_begins_to_wait(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "ANSWER_S", 0.01)
    lost: list[str] = []
    is_in_doubt = asyncio.Event()

    async def fall_silent(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        near = next(near for near in network.near if near.peer == "cellar" and near.purpose == wire.CONTROL)
        near.is_silent = True
        is_in_doubt.set()
        return []

    network.nodes["cellar"].answer = fall_silent
    with pytest.raises(LinkLostError, match="cellar"):
        async with (
            asyncio.timeout(5.0),
            open_on(network, on_lost=lambda board: lost.append(board.node), is_in_doubt=is_in_doubt),
        ):
            pass
    assert lost == ["cellar"]


async def test_weights_may_come_from_the_origin_first_and_from_all_others(network: FakeNetwork) -> None:
    async with open_on(network):
        pass
    assert network.nodes["cellar"].request.sources == [
        "192.0.2.1:7000/origin",
        "192.0.2.10:7361/attic",
        "192.0.2.12:7361/hall",
    ]


async def test_weights_do_not_come_from_who_does_not_answer(network: FakeNetwork) -> None:
    network.nodes["hall"].is_gone = True
    async with open_on(network):
        pass
    assert network.nodes["cellar"].request.sources == ["192.0.2.1:7000/origin", "192.0.2.10:7361/attic"]


async def test_of_many_sources_only_so_many_are_named(network: FakeNetwork, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowspec_edge.core.wire.MAX_SOURCES", 2)
    async with open_on(network):
        pass
    assert network.nodes["cellar"].request.sources == ["192.0.2.1:7000/origin", "192.0.2.10:7361/attic"]


async def test_links_say_which_ring_and_hop_they_are_of(network: FakeNetwork) -> None:
    async with open_on(network):
        ring = network.nodes["attic"].request.ring
        assert [(node, hello.purpose, hello.ring) for node, hello in network.hellos] == [
            ("attic", wire.CONTROL, ring),
            ("cellar", wire.CONTROL, ring),
            ("hall", wire.CONTROL, ring),
            ("attic", wire.DATA, f"{ring}/0"),
        ]
        assert network.returned is not None and network.returned.hello.ring == f"{ring}/3"
    assert not network.returned.is_open


async def test_a_ring_that_is_open_works(network: FakeNetwork) -> None:
    """It reads its links: what a stage says ends it, and no request is taken any more."""
    async with open_on(network) as ring:
        network.nodes["cellar"].controls[0].send(wire.StageFailure("out of memory"))
        await settle()
        assert not ring.is_open


async def test_nodes_that_cannot_serve_are_left_out(network: FakeNetwork, caplog: pytest.LogCaptureFixture) -> None:
    network.nodes["attic"].is_gone = True
    network.nodes["hall"].welcome = msgspec.structs.replace(network.nodes["hall"].welcome, bundles=[])
    async with open_on(network) as ring:
        assert [stage.plan.node for stage in ring.stages] == ["cellar"]
    assert "peer attic cannot be reached" in caplog.text
    assert "node hall does not have this bundle and may not fetch it" in caplog.text
    assert not [message for message in network.nodes["hall"].asked if isinstance(message, wire.OpenStage)]


async def test_one_that_may_fetch_the_bundle_serves(network: FakeNetwork) -> None:
    for node in network.nodes.values():
        node.welcome = msgspec.structs.replace(node.welcome, bundles=[], can_fetch=True)
    async with open_on(network) as ring:
        assert len(ring.stages) == 3


async def test_where_none_can_serve_the_first_reason_is_said(network: FakeNetwork) -> None:
    for node in network.nodes.values():
        node.is_gone = True
    with pytest.raises(NodeUnavailableError, match="none of the 3 nodes found can serve: peer attic cannot be reached"):
        async with open_on(network):
            pass


async def test_what_does_not_fit_is_refused_before_anything_is_asked_for(network: FakeNetwork) -> None:
    for node in network.nodes.values():
        node.welcome = msgspec.structs.replace(node.welcome, free_memory_bytes=1000)
    with pytest.raises(PlacementError):
        async with open_on(network):
            pass
    assert not any(node.asked for node in network.nodes.values())


REFUSALS = [
    (wire.StageFailure("out of memory"), StageFailedError, r"node cellar, layers \[3, 6\): out of memory"),
    (wire.Credit(1), ProtocolError, "peer cellar: Credit came where StageOpened was expected"),
    (None, StageFailedError, r"node cellar: layers \[3, 6\) were not loaded within 0 s"),
]


@pytest.mark.parametrize(("answer", "error", "said"), REFUSALS, ids=["failure", "nonsense", "silence"])
async def test_a_stage_that_is_not_opened_ends_the_opening(
    network: FakeNetwork,
    monkeypatch: pytest.MonkeyPatch,
    answer: wire.Message | None,
    error: type[FlowspecError],
    said: str,
) -> None:
    async def refuse(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        return [] if answer is None else [answer]

    monkeypatch.setattr(dialogue, "STAGE_OPEN_S", 0.05)
    network.nodes["cellar"].answer = refuse
    with pytest.raises(error, match=said):
        async with open_on(network):
            pass


async def test_a_node_that_is_lost_while_a_ring_opens_is_told_of_before_the_engine_is_loaded(
    network: FakeNetwork,
) -> None:
    are_told = threading.Event()

    async def vanish(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        node.controls[0].cut()
        return []

    def load(*arguments: Any) -> Any:
        in_time.append(are_told.wait(LIMIT_S / 2))
        return NoEngine(*arguments)

    def tell(board: Announcement) -> None:
        lost.append(board.node)
        if len(lost) == 2:
            are_told.set()

    lost: list[str] = []
    in_time: list[bool] = []
    network.nodes["attic"].is_gone = True
    network.nodes["cellar"].answer = vanish
    with pytest.raises(LinkLostError, match="cellar"):
        async with open_ring(network, network.bundle, network.found, load, on_lost=tell):
            pass
    assert lost == ["attic", "cellar"]
    assert in_time == [True]


@pytest.mark.parametrize("is_cut", [True, False])
async def test_a_stage_that_is_lost_before_the_links_stand_is_not_waited_for(
    network: FakeNetwork, is_cut: bool
) -> None:
    async def leave(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        assert isinstance(message, wire.OpenStage)
        opened = wire.StageOpened(message.ring, 0, 0)
        if is_cut:
            asyncio.get_running_loop().call_later(0.02, node.controls[0].cut)
            return [opened]
        return [opened, wire.StageFailure("peer cellar cannot be reached")]

    network.nodes["hall"].answer = leave  # it never connects back, for which the origin would wait two minutes
    expected, said = (LinkLostError, "hall") if is_cut else (RingLostError, "node hall, .* cellar cannot be reached")
    with pytest.raises(expected, match=said):
        async with open_on(network):
            pass


async def test_as_long_as_bytes_come_a_stage_is_waited_for(network: FakeNetwork) -> None:
    came = (0, 50, 50, 100)
    told: list[tuple[str, int, int]] = []

    async def fetch(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        progress = [wire.StageProgress("ring", num_bytes, 100) for num_bytes in came]
        return [*progress, *await open_stage(node, message)]

    network.nodes["cellar"].answer = fetch
    async with open_on(network, on_fetch=lambda plan, num_bytes, total: told.append((plan.node, num_bytes, total))):
        pass
    assert told == [("cellar", num_bytes, 100) for num_bytes in came]
    assert present(network.nodes["cellar"].controls[0]._other).num_vouched == 2, "each time that more had come"


async def test_a_last_stage_that_never_connects_back_is_named(network: FakeNetwork) -> None:
    async def forget(node: FakeNode, message: wire.Message) -> list[wire.Message]:
        assert isinstance(message, wire.OpenStage)
        return [wire.StageOpened(message.ring, 0, 0)]

    network.arrivals.limit_s = 0.02
    network.nodes["hall"].answer = forget
    with pytest.raises(FlowspecError, match=r"the data link origin-\w+/3 was not opened within 0 s"):
        async with open_on(network):
            pass


async def test_an_engine_that_cannot_be_loaded_ends_it_after_the_stages_have_answered(network: FakeNetwork) -> None:
    def fail(*arguments: Any) -> Any:
        raise StageFailedError("no memory for the head")

    with pytest.raises(StageFailedError, match="no memory for the head"):
        async with open_ring(network, network.bundle, network.found, fail):
            pass


# ---------------------------------------------------------------------- plans


def planned(*stages: StagePlan, **changes: Any) -> Plan:
    """As much of a plan as an opening looks at."""
    parts = [SimpleNamespace(node=s.node, start=s.start, stop=s.stop, precision="int8", stage_plan=s) for s in stages]
    times = RingTimes((Line(0.0, 0.1),) * len(stages), ())
    values = {"stages": tuple(parts), "hops": (), "trip_ms": 100.0, "left_out": (), "times": times, **changes}
    return SimpleNamespace(**values)  # type: ignore[return-value]


PLAN = planned(StagePlan("hall", 0, 5, 0), StagePlan("attic", 5, 8, 0))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What plans were made of; each is PLAN."""
    calls: list[tuple[Any, ...]] = []

    async def make(*arguments: Any, **options: Any) -> Plan:
        calls.append(arguments)
        return PLAN

    for module in (opening, planning):
        monkeypatch.setattr(module, "make_plan", make)
    return calls


async def test_with_wishes_the_planner_deals_and_its_placement_is_kept(
    network: FakeNetwork, made: list[tuple[Any, ...]]
) -> None:
    network.nodes["cellar"].is_gone = True
    plan_options = PlanOptions()
    async with open_on(network, plan_options=plan_options) as ring:
        assert ring.plan is PLAN
        assert [stage.plan for stage in ring.stages] == [stage.stage_plan for stage in PLAN.stages]
    ((settings, bundle, peers, refused, wished),) = made
    assert (settings, bundle, wished) == (network.settings, network.bundle, plan_options)
    assert list(peers) == ["attic", "hall"]
    assert refused == [LeftOut("cellar", "peer cellar cannot be reached")]
    assert {name: (part.start, part.stop) for name, part in load_placement(bundle.digest).items()} == {
        "hall": (0, 5),
        "attic": (5, 8),
    }
    assert network.nodes["hall"].request.precision == "", "each node has its own"


async def test_a_plan_that_may_choose_says_in_which_precision(
    network: FakeNetwork, made: list[tuple[Any, ...]]
) -> None:
    async with open_on(network, plan_options=PlanOptions(is_any_precision=True)):
        pass
    assert network.nodes["hall"].request.precision == "int8"


async def test_where_nothing_is_measured_yet_shares_are_equal(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*arguments: Any, **options: Any) -> Plan:
        raise NotMeasuredError("none of the 3 nodes")

    monkeypatch.setattr(planning, "make_plan", refuse)
    async with open_on(network, plan_options=PlanOptions()) as ring:
        assert ring.plan is None and len(ring.stages) == 3
    assert not load_placement(network.bundle.digest)


async def test_a_plan_that_is_given_is_taken_as_it_is(network: FakeNetwork, made: list[tuple[Any, ...]]) -> None:
    async with open_on(network, plan_options=PlanOptions(), plan=PLAN) as ring:
        assert ring.plan is PLAN
        assert ring.costs.prompt_chunk_rows(100) == 1, "its times are known to the core: rows alone cost"
    assert not made


async def test_a_node_of_the_plan_that_is_gone_is_named_with_its_reason(network: FakeNetwork) -> None:
    network.nodes["hall"].is_gone = True
    with pytest.raises(NodeUnavailableError, match="peer hall cannot be reached"):
        async with open_on(network, plan=PLAN):
            pass
    with pytest.raises(NodeUnavailableError, match="node zero is not found any more"):
        async with open_on(network, plan=planned(StagePlan("zero", 0, 8, 0))):
            pass


async def test_what_a_ring_holds_counts_as_free_for_the_plan_that_would_follow(
    network: FakeNetwork, made: list[tuple[Any, ...]]
) -> None:
    async with open_on(network) as ring:
        await plan_layers(network, network.bundle, network.found, PlanOptions(), ring.stages)
    (_, _, peers, _, _, loaded) = made[-1]
    welcomed = network.nodes["cellar"].welcome.free_memory_bytes
    assert peers["cellar"].free_memory_bytes == welcomed + 1001
    assert (loaded["cellar"].start, loaded["cellar"].stop) == (3, 6)
    with pytest.raises(NodeUnavailableError, match="peer cellar cannot be reached"):
        network.nodes["cellar"].is_gone = True
        await plan_layers(network, network.bundle, network.found, PlanOptions(), ring.stages)


async def test_only_a_slow_network_has_its_links_measured_anew(
    network: FakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    async def measure(settings: Any, peers: Any, plan: Plan) -> dict[tuple[str, str], Hop]:
        asked.append(sorted(peers))
        return {}

    monkeypatch.setattr(opening, "links_now", measure)
    slow = Outcome(20.0, 10.0, "the network was slower", is_network=True)
    async with open_on(network, plan=PLAN) as ring:
        other = dataclasses.replace(slow, is_network=False)
        assert await explain_outcome(network, network.bundle, ring, other) is other
        assert not asked
        explained = await explain_outcome(network, network.bundle, ring, slow)
        assert explained.cause == "the network was slower; by now each link is as it was measured"
        assert asked == [["attic", "hall"]]
        for node in network.nodes.values():
            node.is_gone = True
        assert await explain_outcome(network, network.bundle, ring, slow) is slow, "all of it is lost"
