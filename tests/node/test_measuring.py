"""What an origin asks before it plans, and what a node answers: messages in, messages out."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.measured import curves_from_text
from flowspec_edge.core.planning.shared_cores import Cores
from flowspec_edge.errors import FlowspecError, LinkLostError, NodeUnavailableError, ProtocolError, StageFailedError
from flowspec_edge.manifest import Manifest
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import OPENING
from flowspec_edge.node import measuring
from flowspec_edge.node.curves import Measurements
from flowspec_edge.node.kept_layers import KeptLayers
from flowspec_edge.node.measuring import Measuring, measure_link
from flowspec_edge.node.precision_choice import PrecisionChoice
from flowspec_edge.node.resources import MemoryAccount, NodeSettings
from tests.fake_links import LIMIT_S, FakeLink, fake_pair

LINE = Line(4.0, 0.5)
GIB = 2**30
DIGEST = "d" * 64
CORES = Cores("boot", frozenset({2, 0}), 2)
OPEN = wire.OpenStage("ring-1", 0, DIGEST, 0, 8, "origin", "192.0.2.1", 1)


class FakeMeasurements(Measurements):
    """Curves at once, but for those precisions that cannot be run here; ``asked`` are those that were measured."""

    def __init__(self) -> None:
        super().__init__(1)
        self.known: dict[str, Line] = {}
        self.asked: list[tuple[str, int]] = []
        self.times = 1.0

    async def slowdown(self) -> float:
        return self.times

    def kept(self, manifest: Manifest, precision: str) -> Line | None:
        return self.known.get(precision)

    async def curve(self, bundle: Bundle, precision: str, free_bytes: int) -> Line:
        self.asked.append((precision, free_bytes))
        if precision == "w8a8":
            raise StageFailedError("this processor cannot add bytes up exactly")
        return LINE


class FakeSupply:
    """Has one bundle, or its manifest alone, or nothing."""

    def __init__(self, bundle: Bundle | None, manifest: Manifest | None) -> None:
        self.bundle, self.manifest = bundle, manifest

    def known(self, digest: str) -> tuple[Bundle | None, Manifest | None]:
        return self.bundle, self.manifest


class NoKeptLayers(KeptLayers):
    """Counts how often its memory was wanted."""

    num_drops = 0

    def give_back_all(self) -> None:
        self.num_drops += 1


class Asked:
    """A node's answers, and an origin that asks."""

    def __init__(self, bundle: Bundle | None, manifest: Manifest | None, **changes: Any) -> None:
        self.measurements, self.kept = FakeMeasurements(), NoKeptLayers()
        self.told: list[wire.Peers] = []
        self.measuring = dataclasses.replace(
            Measuring(
                settings=NodeSettings(name="hall", cluster="test", cores=CORES),
                precisions=PrecisionChoice(),
                memory=MemoryAccount(GIB),
                kept=self.kept,
                measurements=self.measurements,
                supply=FakeSupply(bundle, manifest),  # type: ignore[arg-type]
                is_measured=True,
                exchange_peers=self._exchange_peers,
            ),
            **changes,
        )
        self.origin, self.control = fake_pair("origin", "hall")

    async def _exchange_peers(self, control: Link, told: wire.Peers) -> None:
        self.told.append(told)
        control.send(wire.Peers(7361, ["192.0.2.9:7361"]))

    async def answer(self, *questions: wire.Message) -> list[wire.Message]:
        """The answers to them, until the origin asks for its stage."""
        for question in questions:
            self.origin.send(question)
        self.origin.send(OPEN)
        assert await self.measuring.answer(self.control) == OPEN
        return self.origin.received()


async def test_a_curve_is_measured_where_the_layers_are_here(bundle: Bundle) -> None:
    asked = Asked(bundle, bundle.manifest)
    (answer,) = await asked.answer(wire.MeasureLayers(DIGEST))
    assert isinstance(answer, wire.LayersMeasured)
    assert (curves_from_text(answer.curves, "hall"), answer.slowdown_permille) == ({"int8": LINE}, 1000)
    assert asked.measurements.asked == [("int8", GIB)]
    assert asked.kept.num_drops == 1, "its memory is wanted"


async def test_a_curve_that_is_known_is_told_at_once(bundle: Bundle) -> None:
    asked = Asked(None, bundle.manifest)
    asked.measurements.known["int8"] = Line(9.0, 1.0)
    asked.measurements.times = 1.9
    (answer,) = await asked.answer(wire.MeasureLayers(DIGEST))
    assert answer == wire.LayersMeasured(["int8 9000000 1000000"], 1900, "boot", [0, 2], 2)
    assert not asked.measurements.asked and not asked.kept.num_drops


async def test_what_is_free_is_what_it_may_be_measured_in(bundle: Bundle) -> None:
    asked = Asked(bundle, bundle.manifest)
    with asked.measuring.memory.reserve(FakeLink("other"), 1000):
        await asked.answer(wire.MeasureLayers(DIGEST))
    assert asked.measurements.asked == [("int8", GIB - 1000)]


@pytest.mark.parametrize("has_manifest", [False, True])
async def test_a_node_without_the_layers_tells_none_and_how_slow_it_is(bundle: Bundle, has_manifest: bool) -> None:
    asked = Asked(None, bundle.manifest if has_manifest else None)
    asked.measurements.times = 1.25
    assert await asked.answer(wire.MeasureLayers(DIGEST)) == [wire.LayersMeasured([], 1250, "boot", [0, 2], 2)]


async def test_an_emulated_board_tells_nothing_of_this_machine(bundle: Bundle) -> None:
    asked = Asked(bundle, bundle.manifest, is_measured=False)
    asked.measurements.times = 3.0
    assert await asked.answer(wire.MeasureLayers(DIGEST, True)) == [wire.LayersMeasured([], 1000)]
    assert not asked.measurements.asked


async def test_any_precision_means_all_that_it_can_run(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Manifest, "precisions", property(lambda manifest: ("int8", "w8a8", "int4")))
    asked = Asked(bundle, bundle.manifest)
    (answer,) = await asked.answer(wire.MeasureLayers(DIGEST, True))
    assert isinstance(answer, wire.LayersMeasured)
    assert list(curves_from_text(answer.curves, "hall")) == ["int8", "int4"], "w8a8 does not run here"


async def test_a_precision_set_by_hand_is_the_only_one_that_is_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Manifest, "precisions", property(lambda manifest: ("int8", "int4")))
    asked = Asked(bundle, bundle.manifest, precisions=PrecisionChoice("int8"))
    (answer,) = await asked.answer(wire.MeasureLayers(DIGEST, True))
    assert isinstance(answer, wire.LayersMeasured)
    assert list(curves_from_text(answer.curves, "hall")) == ["int8"]


async def test_one_that_the_bundle_does_not_have_is_a_reason(bundle: Bundle) -> None:
    asked = Asked(bundle, bundle.manifest, precisions=PrecisionChoice("int3"))
    failure, after = await asked.answer(wire.MeasureLayers(DIGEST), wire.Probe(b"123", True))
    assert isinstance(failure, wire.StageFailure) and "has no precision 'int3'" in failure.reason
    assert after == wire.ProbeAnswer(3), "and the next question is answered"


async def test_probes_are_counted_and_only_answered_where_that_is_asked(bundle: Bundle) -> None:
    asked = Asked(bundle, bundle.manifest)
    probes = [wire.Probe(b"", True), wire.Probe(b"12345", False), wire.Probe(b"123", True)]
    assert await asked.answer(*probes) == [wire.ProbeAnswer(0), wire.ProbeAnswer(8)]


async def test_peers_are_exchanged(bundle: Bundle) -> None:
    asked = Asked(bundle, bundle.manifest)
    told = wire.Peers(1234, ["192.0.2.7:7361"])
    assert await asked.answer(told) == [wire.Peers(7361, ["192.0.2.9:7361"])]
    assert asked.told == [told]


async def test_a_link_is_measured_for_the_origin_or_the_reason_told(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measure(settings: NodeSettings, peer: str, host: str, port: int) -> wire.LinkMeasured:
        if peer == "cellar":
            raise NodeUnavailableError("peer cellar cannot be reached")
        return wire.LinkMeasured(len(settings.name), port)

    monkeypatch.setattr(measuring, "measure_link", measure)
    asked = Asked(bundle, bundle.manifest)
    questions = [wire.MeasureLink("attic", "192.0.2.3", 7361), wire.MeasureLink("cellar", "192.0.2.4", 7361)]
    assert await asked.answer(*questions) == [
        wire.LinkMeasured(4, 7361),
        wire.StageFailure("peer cellar cannot be reached"),
    ]


async def test_an_origin_that_asks_for_no_stage_just_leaves(bundle: Bundle) -> None:
    asked = Asked(bundle, bundle.manifest)
    await asked.origin.close()
    assert await asked.measuring.answer(asked.control) is None
    asked = Asked(bundle, bundle.manifest)
    asked.origin.cut()
    with pytest.raises(LinkLostError):
        await asked.measuring.answer(asked.control)


# ---------------------------------------------------------------------- the probing side


class ProbedLink(FakeLink):
    """Its peer answers probes as ``answer`` says."""

    def __init__(self, answer: Any) -> None:
        super().__init__("attic")
        self.num_bytes, self.sent = 0, list[int]()
        self._answer = answer

    def send(self, message: wire.Message) -> None:
        assert isinstance(message, wire.Probe)
        self.num_bytes += len(message.payload)
        self.sent.append(len(message.payload))
        if message.is_answered and (answer := self._answer(self.num_bytes)) is not None:
            self._came.append(answer)
            self._changed.set()


@contextlib.asynccontextmanager
async def probing(monkeypatch: pytest.MonkeyPatch, answer: Any) -> AsyncIterator[ProbedLink]:
    link = ProbedLink(answer)

    async def open_fake(host: str, port: int, hello: wire.Hello, **options: Any) -> tuple[Link, wire.Welcome]:
        assert (host, port, hello.purpose, hello.node) == ("192.0.2.3", 7361, wire.CONTROL, "hall")
        assert options == {"node": "attic", "credentials": None, "timeouts": OPENING}
        return link, wire.Welcome("attic", "0.1.0", GIB, [])

    monkeypatch.setattr(measuring, "open_link", open_fake)
    async with asyncio.timeout(LIMIT_S):
        yield link
    assert not link.is_open, "closed whatever came of it"


SETTINGS = NodeSettings(name="hall", cluster="test")


async def test_a_quick_link_gets_all_probes_a_mebibyte_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with probing(monkeypatch, wire.ProbeAnswer) as link:
        found = await measure_link(SETTINGS, "attic", "192.0.2.3", 7361)
    assert link.num_bytes == 2**20 and max(link.sent) <= wire.MAX_PROBE_BYTES
    assert 0 <= found.latency_ns < 10**9


async def test_a_slow_link_gets_no_larger_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SLOW_TRANSFER_S", -1.0)
    async with probing(monkeypatch, wire.ProbeAnswer) as link:
        await measure_link(SETTINGS, "attic", "192.0.2.3", 7361)
    assert link.num_bytes == 2**16


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (lambda num_bytes: wire.Credit(1), ProtocolError, "peer attic: Credit came where ProbeAnswer was expected"),
        (lambda num_bytes: None, LinkLostError, "peer attic: no answer to a probe of the link within 0.02 s"),
    ],
)
async def test_a_peer_that_does_not_confirm_is_named(
    monkeypatch: pytest.MonkeyPatch, answer: Any, error: type[FlowspecError], said: str
) -> None:
    monkeypatch.setattr(measuring, "LINK_LIMIT_S", 0.02)
    async with probing(monkeypatch, answer):
        with pytest.raises(error, match=said):
            await measure_link(SETTINGS, "attic", "192.0.2.3", 7361)


async def test_a_link_that_is_too_slow_to_be_measured_counts_as_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "LINK_LIMIT_S", 0.1)
    async with probing(monkeypatch, lambda num_bytes: None if num_bytes else wire.ProbeAnswer(0)):
        found = await measure_link(SETTINGS, "attic", "192.0.2.3", 7361)
    assert found.bytes_per_s == pytest.approx(2**16 / 0.1, rel=0.5)


async def test_what_nobody_foresaw_is_told_and_the_next_question_is_answered(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(settings: NodeSettings, peer: str, host: str, port: int) -> wire.LinkMeasured:
        raise KeyError(peer)

    monkeypatch.setattr(measuring, "measure_link", fail)
    failure, after = await Asked(bundle, bundle.manifest).answer(
        wire.MeasureLink("attic", "192.0.2.3", 7361), wire.Probe(b"123", True)
    )
    assert isinstance(failure, wire.StageFailure) and "a bug in flowspec-edge (KeyError)" in failure.reason
    assert after == wire.ProbeAnswer(3)
