"""Measurements as texts in messages, and what is refused where a peer sends it."""

import pytest

from flowspec_edge.core import codec, wire
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.measured import curves_from_text, curves_to_text, estimate_hop, hop_from
from flowspec_edge.errors import ProtocolError


def test_curves_travel_as_text() -> None:
    curves = {"int8": Line(1.25, 0.0313), "fp32": Line(5.0, 0.0)}
    assert curves_from_text(curves_to_text(curves), "pi") == curves


def test_what_noise_adds_is_rounded_away() -> None:
    assert curves_from_text(["int8 5001234 31299"], "pi") == {"int8": Line(5.0, 0.0313)}


@pytest.mark.parametrize("text", ["", "int8", "int8 1", "int8 -1 2", "int8 0 0", "int8 1e9 2", "int8 9999999999999 1"])
def test_a_curve_that_is_none_names_the_peer(text: str) -> None:
    with pytest.raises(ProtocolError, match="peer pi-hall"):
        curves_from_text([text], "pi-hall")


def test_a_link_is_estimated_from_its_quickest_round_trip_and_its_largest_transfer() -> None:
    latency_s, rate = estimate_hop([0.004, 0.002, 0.009], [(65536, 0.0075), (262144, 0.024)])
    assert latency_s == pytest.approx(0.001)
    assert rate == pytest.approx(262144 / 0.022)
    assert estimate_hop([0.002], [(65536, 0.003)])[1] == 0.0, "too quick to be measured"


def test_a_hop_from_what_a_node_sent() -> None:
    hop = hop_from(1_004_321, 12_512_345)
    assert hop.latency_ms == 1.0
    assert hop.ms_per_byte == pytest.approx(1000 / 12.5e6)
    assert hop_from(0, 0).ms_per_byte == 0.0


@pytest.mark.parametrize(
    "message",
    [
        wire.MeasureLayers("0" * 64),
        wire.LayersMeasured(["int8 1 2"], 1500, "boot", [0, 2], 4),
        wire.MeasureLink("pi", "192.0.2.7", 7000),
        wire.LinkMeasured(1000, 10**9),
        wire.Probe(bytes(wire.MAX_PROBE_BYTES), True),
        wire.ProbeAnswer(5),
    ],
)
def test_messages_of_measuring_survive_the_wire(message: wire.Message) -> None:
    header, tail = codec.encode(message)
    assert tail is None and codec.decode(header) == message


def test_a_probe_has_a_limit() -> None:
    header, _ = codec.encode(wire.Probe(bytes(wire.MAX_PROBE_BYTES + 1), False))
    with pytest.raises(ProtocolError, match="Probe: Expected `bytes` of length <= 32768"):
        codec.decode(header)
