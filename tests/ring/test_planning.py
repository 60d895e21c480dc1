"""Plans from what real nodes measure, and rings that are opened with them."""

import asyncio
import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.show_plan import format_plan
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import codec, wire
from flowspec_edge.core.device.throttling import ThermalReport
from flowspec_edge.core.limits import TREE_MARGIN
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.placement import LoadedLayers, Plan
from flowspec_edge.core.planning.prediction import Outcome
from flowspec_edge.core.planning.shared_cores import Cores
from flowspec_edge.core.planning.throughput import TYPICAL_DRAFTS
from flowspec_edge.core.planning.working_memory import kv_cache_bytes
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import LinkLostError, NotMeasuredError, StateError
from flowspec_edge.files import state_directory
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import open_link
from flowspec_edge.node import measuring
from flowspec_edge.node.curves import Measurements
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin import dialogue, measured_links, planning
from flowspec_edge.origin.opening import explain_outcome, open_ring, plan_layers
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.remembered import keep_placement, learn_draft_gain, load_placement
from flowspec_edge.origin.ring import Ring
from tests.narrowing import present
from tests.ring.conftest import answer_of, found_of, nodes_of, tokens_of, unsplit_tokens

PLAN_OPTIONS = PlanOptions(num_tokens=256)
EQUAL_SPLIT = dataclasses.replace(PLAN_OPTIONS, is_equal_split=True)


async def test_a_plan_from_what_nodes_and_links_really_take(int8_bundle: Bundle, state: Path) -> None:
    async with nodes_of(int8_bundle, ("attic", "cellar")) as (serving, origin):
        plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert sum(stage.stop - stage.start for stage in plan.stages) == 8
    assert all(0 < stage.time.at(2) < 1000 for stage in plan.stages)
    assert plan.tokens_per_s > 0 and 0 < plan.head_ms < plan.trip_ms
    (curve,) = (state / "curves").glob("*.json")
    kept = json.loads(curve.read_text())
    assert kept["how"] == "measured" and kept["fixed_ms"] > 0
    links = json.loads((state / "links.json").read_text())
    assert len(links) == 3 and ["attic", "cellar"] in [link[:2] for link in links]
    assert all(0 < latency_ns < 10**9 for _, _, latency_ns, *_ in links)
    assert curve.stat().st_mode & 0o077 == 0


async def test_plans_know_of_caches_in_float16(int8_bundle: Bundle, quick_curve: list[str]) -> None:
    needed = []
    for has_half_cache in (False, True):
        async with nodes_of(int8_bundle, ("attic",), has_half_cache=has_half_cache) as (serving, origin):
            plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
            needed.append(plan.stages[0].memory_bytes)
    geometry, num_tokens = int8_bundle.manifest.geometry, 256 + TREE_MARGIN
    assert needed[0] - needed[1] == kv_cache_bytes(geometry, 8, num_tokens) // 2 - kv_cache_bytes(
        geometry, 1, num_tokens
    )


async def test_what_is_known_is_not_measured_again(
    int8_bundle: Bundle, quick_curve: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes_of(int8_bundle) as (serving, origin):
        first = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
        assert quick_curve, "the first time"
        quick_curve.clear()

        async def never(*arguments: object) -> None:
            raise AssertionError("a link was measured again")

        monkeypatch.setattr(measured_links, "measure_link", never)
        monkeypatch.setattr(measuring, "measure_link", never)
        again = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert again == first and not quick_curve
    assert len(first.stages) == 3, "slow layers want all boards"


async def test_nodes_that_run_on_the_same_machine_share_its_cores(int8_bundle: Bundle, quick_curve: list[str]) -> None:
    here = Cores("boot", frozenset({0, 1}), 2)
    async with nodes_of(int8_bundle, ("attic", "cellar"), cores=here) as (serving, origin):
        plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    (used,) = (stage.node for stage in plan.stages)  # slow layers would want both, were they apart
    (unused,) = plan.left_out
    assert {used, unused.node} == {"attic", "cellar"} and f"{used} has its cores" in unused.reason
    assert plan.interval_ms > plan.stages[0].time.at(plan.num_rows) + plan.head_ms, "the origin runs there, too"


async def test_a_ring_serves_what_was_planned_and_writes_the_unsplit_models_text(
    int8_bundle: Bundle, quick_curve: list[str], prompts: list[list[int]]
) -> None:
    options = GenerateOptions(max_new_tokens=24)
    async with nodes_of(int8_bundle) as (serving, origin):
        plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
        async with open_ring(origin, int8_bundle, found_of(serving), plan_options=PLAN_OPTIONS) as ring:
            answer = await ring.begin(prompts[0], options)
            pieces = [piece async for piece in ring.write(answer)]
            outcome = present(ring.outcome(answer, present(pieces[-1].statistics)))
    assert tokens_of(pieces) == unsplit_tokens(int8_bundle, prompts[0], options)
    assert [stage.plan for stage in ring.stages] == [stage.stage_plan for stage in plan.stages]
    assert ring.plan == plan
    assert outcome.difference > 0.2 and present(outcome.gain) > 0
    assert "quicker than measured" in present(outcome.cause)
    kept = load_placement(int8_bundle.digest)
    assert kept == {stage.node: LoadedLayers(stage.start, stage.stop, "int8") for stage in plan.stages}


async def test_equal_shares_are_held_against_what_they_are_expected_to_bring(
    int8_bundle: Bundle, quick_curve: list[str], prompts: list[list[int]]
) -> None:
    options = GenerateOptions(max_new_tokens=24)
    async with nodes_of(int8_bundle) as (serving, origin):
        async with open_ring(origin, int8_bundle, found_of(serving), plan_options=EQUAL_SPLIT) as ring:
            answer = await ring.begin(prompts[0], options)
            pieces = [piece async for piece in ring.write(answer)]
            outcome = present(ring.outcome(answer, present(pieces[-1].statistics)))
    assert tokens_of(pieces) == unsplit_tokens(int8_bundle, prompts[0], options)
    assert [(stage.plan.start, stage.plan.stop) for stage in ring.stages] == [(0, 3), (3, 6), (6, 8)]
    assert outcome.predicted_per_s == present(ring.plan).tokens_per_s


async def test_who_cannot_measure_has_an_equal_share_too(
    int8_bundle: Bundle, quick_curve: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> Line:
        raise StateError("the disk is full")

    async with nodes_of(int8_bundle, ("attic", "cellar")) as (serving, origin):
        monkeypatch.setattr(serving[1].measurements, "curve", fail)
        async with open_ring(origin, int8_bundle, found_of(serving), plan_options=EQUAL_SPLIT) as ring:
            assert [stage.plan.node for stage in ring.stages] == ["attic", "cellar"] and ring.plan is None


async def test_a_text_that_had_company_or_another_schedule_tells_nothing(
    int8_bundle: Bundle, quick_curve: list[str], prompts: list[list[int]]
) -> None:
    options = GenerateOptions(max_new_tokens=24)
    plain = dataclasses.replace(options, schedule="autoregressive")

    async def outcome_of(ring: Ring, options: GenerateOptions) -> Outcome | None:
        answer = await ring.begin(prompts[0], options)
        pieces = [piece async for piece in ring.write(answer)]
        return ring.outcome(answer, present(pieces[-1].statistics))

    async with nodes_of(int8_bundle) as (serving, origin):
        async with open_ring(origin, int8_bundle, found_of(serving), plan_options=PLAN_OPTIONS) as ring:
            assert await asyncio.gather(*(outcome_of(ring, options) for _ in range(2))) == [None, None]
            assert await outcome_of(ring, plain) is None
            assert await outcome_of(ring, options) is not None


async def test_a_plan_expects_of_drafts_what_they_have_brought(
    int8_bundle: Bundle, quick_curve: list[str], state: Path
) -> None:
    async with nodes_of(int8_bundle) as (serving, origin):
        before = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
        learn_draft_gain(int8_bundle.digest, 0.2, 2000)
        after = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert before.acceptance == TYPICAL_DRAFTS
    assert after.acceptance.at(64) == pytest.approx(1 + 0.2 * (TYPICAL_DRAFTS.at(64) - 1), rel=0.05)
    assert after.tokens_per_s < before.tokens_per_s


async def test_a_ring_is_held_against_what_it_serves_itself(int8_bundle: Bundle, quick_curve: list[str]) -> None:
    """Whatever others on this machine have served since."""
    async with nodes_of(int8_bundle) as (serving, origin):
        async with open_ring(origin, int8_bundle, found_of(serving), plan_options=PLAN_OPTIONS) as ring:
            first, *others = present(ring.plan).stages
            swapped = [
                dataclasses.replace(stage, node=other.node) for stage, other in zip(others, others[::-1], strict=True)
            ]
            keep_placement(int8_bundle.digest, dataclasses.replace(present(ring.plan), stages=(first, *swapped)))
            plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS, ring.stages)
            assert plan.is_kept and plan.stages == present(ring.plan).stages


async def test_where_the_network_was_slow_its_links_are_measured_anew(
    int8_bundle: Bundle, quick_curve: list[str], monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    async with nodes_of(int8_bundle, ("attic", "cellar")) as (serving, origin):
        async with open_ring(origin, int8_bundle, found_of(serving), plan_options=PLAN_OPTIONS) as ring:
            outcome = Outcome(20.0, 10.0, "the network, all hops together, was slower", is_network=True, num_rows=4)

            async def measure(settings: NodeSettings, peer: str, host: str, port: int) -> wire.LinkMeasured:
                is_slow = {settings.name, peer} == {"attic", "cellar"}
                return wire.LinkMeasured(3 * 10**9 if is_slow else 10**6, 10**8)

            for module in (measured_links, measuring):
                monkeypatch.setattr(module, "measure_link", measure)
            said = present((await explain_outcome(origin, int8_bundle, ring, outcome)).cause)
            other = dataclasses.replace(outcome, is_network=False)
            assert await explain_outcome(origin, int8_bundle, ring, other) is other
    assert re.fullmatch(
        r"the link between (attic and cellar|cellar and attic) was slower than measured: 300\d ms .*", said
    )
    kept = {tuple(link[:2]): link[2] for link in json.loads((state / "links.json").read_text())}
    assert kept["attic", "cellar"] == 3 * 10**9, "and the next plan counts it"


async def test_a_node_without_layers_learns_from_its_first_session(
    int8_bundle: Bundle, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, state: Path
) -> None:
    monkeypatch.setattr(planning, "origin_costs", lambda bundle, num_threads: (0.5, 1.0))
    async with nodes_of(int8_bundle, ("attic", "cellar")) as (serving, origin):
        for node in serving:
            monkeypatch.setattr(node.supply, "known", lambda digest: (None, int8_bundle.manifest))
        with pytest.raises(NotMeasuredError, match="none of the 2 nodes"):
            await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
        async with open_ring(origin, int8_bundle, found_of(serving), plan_options=PLAN_OPTIONS) as ring:
            assert ring.plan is None and len(ring.stages) == 2, "equal shares"
            await answer_of(ring, prompts[0], GenerateOptions(max_new_tokens=32))
        async with asyncio.timeout(10):
            while not list((state / "curves").glob("*.json")):
                await asyncio.sleep(0.01)
        plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert json.loads(next((state / "curves").glob("*.json")).read_text())["how"] == "learned"
    assert plan.stages


def served(plan: Plan) -> dict[str, int]:
    return {stage.node: stage.stop - stage.start for stage in plan.stages}


async def test_a_board_whose_forwards_got_slow_is_given_less_in_the_next_plan(
    int8_bundle: Bundle, quick_curve: list[str]
) -> None:
    async with nodes_of(int8_bundle, ("attic", "hall")) as (serving, origin):
        before = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
        recorder = serving[0].measurements.recorder(int8_bundle.manifest, None, 4)
        for ago in range(90, 0, -1):
            recorder.watch.observe(100.0, 190.0, time.monotonic() - ago)
        after = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert served(before) == {"attic": 4, "hall": 4}
    assert served(after).get("attic", 0) < 4 < served(after)["hall"]
    assert after.tokens_per_s < before.tokens_per_s


async def test_a_board_that_says_that_it_is_hot_is_given_less_in_the_next_plan(
    int8_bundle: Bundle, quick_curve: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes_of(int8_bundle, ("attic", "hall")) as (serving, origin):
        monkeypatch.setattr(serving[0].measurements, "_thermometer", lambda: ThermalReport(82.0, 80.0, 0.6))
        plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert served(plan) == {"attic": 3, "hall": 5}
    said = {stage.node: stage.slowdown for stage in plan.stages}
    assert said == {"attic": 1.67, "hall": 1.0}
    assert "attic takes 1.7 times what it once measured: it is hot" in format_plan(plan)


class UnmeasuredBoard(Board):
    is_measured = False


async def test_an_emulated_board_tells_no_curve(int8_bundle: Bundle, state: Path) -> None:
    async with nodes_of(int8_bundle, ("attic",), board=UnmeasuredBoard) as (serving, origin):
        with pytest.raises(NotMeasuredError):
            await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert not (state / "curves").exists()


async def test_nodes_that_cannot_serve_are_named(int8_bundle: Bundle, quick_curve: list[str]) -> None:
    async with nodes_of(int8_bundle, ("attic",)) as (serving, origin):
        gone = dataclasses.replace(serving[0].announcement, node="cellar", port=1)
        plan = await plan_layers(origin, int8_bundle, [serving[0].announcement, gone], PLAN_OPTIONS)
    assert [stage.node for stage in plan.stages] == ["attic"]
    (out,) = plan.left_out
    assert out.node == "cellar" and "cannot be reached" in out.reason


async def test_a_link_is_measured_with_at_most_a_mebibyte(int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    encode = codec.encode

    def encode_and_count(message: wire.Message) -> tuple[bytes, memoryview | None]:
        if isinstance(message, wire.Probe):
            sent.append(len(message.payload))
        return encode(message)

    monkeypatch.setattr(codec, "encode", encode_and_count)
    async with nodes_of(int8_bundle, ("attic",)) as (serving, origin):
        found = await measuring.measure_link(origin.settings, "attic", "127.0.0.1", serving[0].port)
    assert found.latency_ns > 0
    assert 2**16 <= sum(sent) <= 2**20


async def test_a_link_that_cannot_be_measured_is_a_reason_and_no_end(int8_bundle: Bundle) -> None:
    async with nodes_of(int8_bundle, ("attic",)) as (serving, origin):
        link, _ = await open_link("127.0.0.1", serving[0].port, origin.settings.hello(wire.CONTROL, ""), node="attic")
        link.send(wire.MeasureLink("cellar", "127.0.0.1", 1))
        answer = await link.receive()
        assert isinstance(answer, wire.StageFailure) and "cannot be reached" in answer.reason
        link.send(wire.Probe(b"123", True))
        assert await link.receive() == wire.ProbeAnswer(3)
        await link.close()


@pytest.mark.slow
async def test_a_plan_may_choose_each_devices_precision(
    two_precisions: Bundle, monkeypatch: pytest.MonkeyPatch, prompts: list[list[int]]
) -> None:
    """By hand one board keeps its own; of the others each gets the quickest that it has room for."""
    curves = {"fp32": Line(300.0, 1.0), "int8": Line(400.0, 1.0)}
    monkeypatch.setattr(Measurements, "_measure", lambda self, bundle, precision, free: curves[precision])
    monkeypatch.setattr(planning, "origin_costs", lambda bundle, num_threads: (0.5, 1.0))
    plan_options = dataclasses.replace(PLAN_OPTIONS, is_any_precision=True)
    async with nodes_of(two_precisions, ("attic", "hall")) as (serving, origin):
        own = await plan_layers(origin, two_precisions, found_of(serving), PLAN_OPTIONS)
        assert {stage.precision for stage in own.stages} == {"fp32"}, "the bundle's own"
        serving[0].precisions.by_hand = "int8"
        plan = await plan_layers(origin, two_precisions, found_of(serving), plan_options)
        assert {stage.node: stage.precision for stage in plan.stages} == {"attic": "int8", "hall": "fp32"}
        serving[0].precisions.by_hand = None
        curves["int8"] = Line(100.0, 1.0)
        for curve in state_directory().glob("curves/*.json"):
            curve.unlink()
        plan = await plan_layers(origin, two_precisions, found_of(serving), plan_options)
        assert {stage.precision for stage in plan.stages} == {"int8"}
        async with open_ring(origin, two_precisions, found_of(serving), plan_options=plan_options) as ring:
            assert {stage.plan.precision for stage in ring.stages} == {"int8"}
            options = GenerateOptions(max_new_tokens=16)
            tokens = tokens_of(await answer_of(ring, prompts[0], options))
    unsplit = UnsplitModel(two_precisions.directory, two_precisions.manifest, precision="int8")
    assert tokens == list(unsplit.generate(prompts[0], options))


async def test_files_that_are_broken_are_measured_anew(
    int8_bundle: Bundle, quick_curve: list[str], state: Path
) -> None:
    async with nodes_of(int8_bundle, ("attic", "cellar")) as (serving, origin):
        await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
        for path in [*(state / "curves").glob("*.json"), state / "links.json"]:
            path.write_text('{"fixed_ms": "soon"}')
        (state / "placements").mkdir(exist_ok=True)
        quick_curve.clear()
        plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    assert quick_curve and plan.stages


async def test_a_node_that_cannot_measure_is_left_out_with_its_reason(
    int8_bundle: Bundle, quick_curve: list[str]
) -> None:
    async with nodes_of(int8_bundle, ("attic", "cellar")) as (serving, origin):
        serving[1].precisions.by_hand = "int3"
        plan = await plan_layers(origin, int8_bundle, found_of(serving), PLAN_OPTIONS)
    (out,) = plan.left_out
    assert out.node == "cellar" and "has no precision 'int3'" in out.reason


async def test_no_link_stays_open_when_a_plan_is_given_up(
    int8_bundle: Bundle, quick_curve: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node has answered, another one never does, and whoever planned is cancelled."""
    answered: asyncio.Queue[Link] = asyncio.Queue()

    async def open_and_tell(*arguments: Any, **options: Any) -> tuple[Link, wire.Welcome]:
        link, welcome = await open_link(*arguments, **options)
        answered.put_nowait(link)
        return link, welcome

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    monkeypatch.setattr(dialogue, "open_link", open_and_tell)
    silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    async with asyncio.timeout(20), silent, nodes_of(int8_bundle, ("attic",)) as (serving, origin):
        (attic,) = found_of(serving)
        found = [attic, dataclasses.replace(attic, node="silent", port=silent.sockets[0].getsockname()[1])]
        planned = asyncio.create_task(plan_layers(origin, int8_bundle, found, PLAN_OPTIONS))
        link = await answered.get()
        planned.cancel()
        await asyncio.wait({planned})
        assert planned.cancelled()
        with pytest.raises(LinkLostError):
            await link.receive()
