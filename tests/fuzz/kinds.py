"""What is tried with broken inputs: readers of bytes, the cores behind them, and what people see of it.

``try_one`` makes one input and hands it over. It answers with what came of it, and raises whatever is not a named
error: that is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeGuard

import msgpack
import numpy as np
from zeroconf._dns import DNSText
from zeroconf._protocol.incoming import DNSIncoming
from zeroconf._protocol.outgoing import DNSOutgoing
from zeroconf.asyncio import AsyncServiceInfo

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.cli.run_doctor import print_findings
from flowspec_edge.core import codec, wire
from flowspec_edge.core import events as ev
from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.diagnosis import Surroundings, diagnose
from flowspec_edge.core.rows import NO_PARENT, Chunk, Passage, Row, SessionSpec
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.errors import BundleError, FlowspecError, ProtocolError, StageFailedError, is_plain
from flowspec_edge.manifest import MANIFEST_NAME, bundle_digest, parse_manifest
from flowspec_edge.net.discovery import SERVICE_TYPE, _record_from
from flowspec_edge.net.neighbourhood import Neighbourhood
from tests.fuzz.http_bodies import try_body
from tests.fuzz.inputs import NASTY_TEXTS, changed, changed_value, nested

TryOne = Callable[[random.Random], str]
ACCEPTED, REFUSED = "accepted", "refused"
DIGEST = "0" * 64
HIDDEN = np.arange(8, dtype=np.float32).reshape(2, 4)
MESSAGES: tuple[wire.Message, ...] = (
    wire.Hello("pi-hall", "0.1.0", wire.PROTOCOL_VERSION, wire.CONTROL, "ring-1"),
    wire.Welcome("pi-hall", "0.1.0", 2**30, [DIGEST], True, False, 61, 7.5, 1234.5),
    wire.Peers(7361, ["192.0.2.1:7361", "[2001:db8::1]:7361"]),
    wire.OpenStage("ring-1", 0, DIGEST, 0, 4, "pi", "127.0.0.1", 7361, ["127.0.0.1:7361/pi"]),
    wire.StageProgress("ring-1", 5, 10),
    wire.StageOpened("ring-1", 1000, 20),
    wire.PrepareLayers(DIGEST, 0, 4, ["127.0.0.1:7361/pi"]),
    wire.CancelPreparing(),
    wire.LayersPrepared(0, 4, 1000, 20, 10),
    wire.LayersGivenBack(0, 4),
    wire.OpenSession(SessionSpec(7, 512, False, True, 20, 6, 19)),
    wire.SessionOpened(7, 19),
    wire.AdvanceSession(7, 3, 42),
    wire.BeginTurn(7, 12),
    wire.CloseSession(7, True),
    wire.StageFailure("out of memory"),
    wire.PacketsSent(100, 3, 20, 0),
    wire.EnergyTaken("boot", 1234.5, 7.5),
    wire.MeasureLayers(DIGEST),
    wire.LayersMeasured(["int8 1.0 2.0"], 1250, "boot", [0, 1], 2),
    wire.MeasureLink("pi", "127.0.0.1", 1),
    wire.LinkMeasured(1000, 10**9),
    wire.Probe(b"12345", True),
    wire.ProbeAnswer(5),
    wire.Credit(2),
    wire.ChunkMessage(0, Chunk(7, (Row(0, NO_PARENT, 5), Row(1, 0, 6)), 1, HIDDEN, 2, (Passage(4, 0.5, 0.25),))),
    wire.TappedRows(7, 2, (0, 1), HIDDEN),
)
MANIFEST = (DEMO_BUNDLE / MANIFEST_NAME).read_bytes()


def frame(rng: random.Random) -> tuple[bytes, bytes]:
    """A header and a tail that may belong to each other."""
    header, tail = codec.encode(rng.choice(MESSAGES))
    whole = b"" if tail is None else bytes(tail)
    match rng.randrange(8):
        case 0:
            header = rng.randbytes(rng.randrange(60))
        case 1:
            header = nested(rng, rng.choice((b"\x91", b"\x81\xa1a", b"\x92\xa6Credit\x91", b"\xdd\xff\xff\xff\xff")))
        case 2 | 3:
            header = msgpack.packb(changed_value(rng, msgpack.unpackb(header)), unicode_errors="surrogatepass")
        case 4:
            whole = whole[: rng.randrange(len(whole) + 1)]
        case _:
            header = changed(rng, header)
    return header, whole


def shown(error: FlowspecError) -> str:
    """A named error, which people will see."""
    if not is_plain(str(error)):
        raise AssertionError(f"a terminal would obey {str(error)!r}")
    return REFUSED


def try_frame(rng: random.Random) -> str:
    header, tail = frame(rng)
    try:
        num_bytes = codec.num_tail_bytes(codec.read_header(header))
        assert num_bytes <= codec.MAX_TAIL_BYTES
        message = codec.decode(header, tail or None)
    except ProtocolError as refused:
        return shown(refused)
    codec.encode(message)
    return ACCEPTED


def try_manifest(rng: random.Random) -> str:
    match rng.randrange(5):
        case 0:
            text = changed(rng, MANIFEST).decode("latin-1")
        case 1:
            text = nested(rng, b'{"a":[' if rng.random() < 0.5 else b"[", b"]").decode()
        case _:
            whole = json.loads(MANIFEST)
            for _ in range(rng.choice((1, 1, 2))):
                whole = changed_value(rng, whole, has_bytes=False)
            text = json.dumps(whole)
    try:
        manifest = parse_manifest(text, Path("a bundle"))
    except BundleError as refused:
        return shown(refused)
    assert len(bundle_digest(manifest)) == 64
    assert all(is_plain(entry.file) and entry.num_bytes > 0 for entry in manifest.files())
    return ACCEPTED


def try_record(rng: random.Random) -> str:
    """A forged mDNS record, on its way into what ``flowspec doctor`` prints."""
    texts = {b"node": b"pi", b"cluster": b"home", b"key": b"abc", b"version": b"0.1.0"}
    for name in rng.sample(list(texts), rng.randrange(3)):
        texts[name] = rng.choice((rng.choice(NASTY_TEXTS).encode(errors="replace")[:240], rng.randbytes(9)))
    data = b"".join(bytes([len(pair)]) + pair for pair in (k + b"=" + v for k, v in texts.items()))
    if rng.random() < 0.3:
        data = changed(rng, data)
    addresses = [socket.inet_aton(f"192.0.2.{rng.randrange(256)}") for _ in range(rng.choice((1, 1, 40)))]
    info = AsyncServiceInfo(
        SERVICE_TYPE, f"x.{SERVICE_TYPE}", port=rng.choice((0, 1, 7361)), addresses=addresses, properties=data
    )
    record = _record_from(info)
    if record is None:
        return REFUSED
    members = ms.Membership("doctor", "home", "abc", 0.0)
    for address in record.addresses:
        members.handle(ms.AddressLearned(address, ms.TYPED), 0.0)
    members.handle(record, 0.0)
    members.handle(ms.PeerFailed(record.addresses[0], ms.Failure(ms.BROKEN, "closed")), 1.0)
    members.check()
    findings = diagnose(members, Surroundings({}, frozenset()))
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        print_findings(Neighbourhood(cluster="home", host="0.0.0.0"), None, findings)
    assert all(is_plain(line) for line in shown.getvalue().split("\n")), "a terminal would obey it"
    return ACCEPTED


def try_packet(rng: random.Random) -> str:
    """A broken mDNS packet, as zeroconf reads it; the texts of what it makes of it are taken as a record's."""
    packet = DNSIncoming(changed(rng, _PACKET))
    for answer in packet.answers() if packet.valid else ():
        if isinstance(answer, DNSText):
            name = f"x.{SERVICE_TYPE}"
            info = AsyncServiceInfo(SERVICE_TYPE, name, port=1, addresses=[bytes(4)], properties=answer.text)
            record = _record_from(info)
            assert record is None or is_plain(record.node + record.cluster + record.fingerprint + record.version)
            return ACCEPTED
    return REFUSED


def _packet() -> bytes:
    from zeroconf.const import _CLASS_IN, _FLAGS_QR_RESPONSE, _TYPE_TXT

    out = DNSOutgoing(_FLAGS_QR_RESPONSE)
    text = b"\x07node=pi\x0ccluster=home\x07key=abc\x0dversion=0.1.0"
    out.add_answer_at_time(DNSText(f"x.{SERVICE_TYPE}", _TYPE_TXT, _CLASS_IN, 120, text), 0)
    return out.packets()[0]


_PACKET = _packet()


def try_stage(rng: random.Random) -> str:
    """A stage's core meets a peer that knows the messages and no rules, until one of its sides gives up."""
    embeds = rng.random() < 0.5
    stage = Stage(is_last=rng.random() < 0.5, embeds=embeds, vocab_size=50, hidden_size=4)
    running: ev.RunForward | None = None
    wildness = rng.choice((0.0, 0.05, 1.0))
    try:
        for step in range(30):
            actions = stage.handle(_stage_event(rng, embeds, is_wild=rng.random() < wildness), float(step))
            running = next(filter(_is_forward, actions), running)
            if running is not None and rng.random() < 0.7:
                hidden = np.zeros((len(running.rows), 4), np.float32)
                finished = ev.ForwardFinished(hidden, {2: hidden} if running.is_tapped else {})
                running = next(filter(_is_forward, stage.handle(finished, float(step))), None)
            stage.check()
    except (ProtocolError, StageFailedError):
        return REFUSED
    return ACCEPTED


def _is_forward(action: ev.StageAction) -> TypeGuard[ev.RunForward]:
    return isinstance(action, ev.RunForward)


def _stage_event(rng: random.Random, embeds: bool, *, is_wild: bool) -> ev.StageEvent:
    """What a peer may send; a wild one keeps to no rule."""
    session = rng.randrange(3)
    numbers = (0, 1, 2, 3, 4, 5, NO_PARENT, rng.getrandbits(32)) if is_wild else (0, 1, 2)
    match rng.randrange(12):
        case 0 | 1:
            session = session if is_wild else rng.getrandbits(32)
            return ev.SessionRequested(
                SessionSpec(
                    session,
                    rng.choice((0, 8, 100)),
                    rng.random() < 0.5,
                    rng.random() < 0.5,
                    rng.choice(numbers),
                    rng.randrange(3),
                    rng.choice((0, 1, 2)) if is_wild else 0,
                )
            )
        case 2 | 3:
            return ev.AdvanceArrived(session, rng.choice(numbers), rng.randrange(60) if is_wild else 7)
        case 4:
            return ev.CreditArrived(rng.choice((0, 1, 2, 2**40) if is_wild else (0,)))
        case 5:
            return ev.TurnBegan(session, rng.randrange(4))
        case 6:
            return ev.SessionEnded(session, is_kept=rng.random() < 0.5)
        case 7:
            return rng.choice((ev.LinkPaused(), ev.LinkResumed()))
        case _:
            num_rows = rng.choice((1, 2, 3))
            rows = tuple(
                Row(*(rng.choice(numbers) for _ in range(3))) if is_wild else Row(at, at - 1 if at else NO_PARENT, 7)
                for at in range(num_rows)
            )
            width = rng.choice((4, 4, 4, 0, 7)) if is_wild else 4
            is_bare = not embeds if is_wild and rng.random() < 0.1 else embeds
            hidden = None if is_bare else np.zeros((num_rows, width), np.float32)
            return ev.ChunkArrived(Chunk(session, rows, rng.randrange(num_rows + 1), hidden, rng.choice((0, 0, 0, 2))))


def try_membership(rng: random.Random) -> str:
    """The members of a cluster, told anything by anyone; limits hold."""
    members = ms.Membership("here", "home", "abc", 0.0)
    for step in range(40):
        hosts = [f"10.0.{rng.randrange(3)}.{rng.randrange(256)}" for _ in range(rng.choice((1, 16)))]
        addresses = tuple(Address(host, rng.choice((1, 7361))) for host in hosts)
        node = rng.choice(("hall", "attic", "here"))
        match rng.randrange(5):
            case 0 | 1:
                members.handle(
                    ms.RecordHeard(f"r{rng.randrange(300)}", node, addresses, "home", "abc", "1"), float(step)
                )
            case 2:
                members.handle(ms.PeerFailed(addresses[0], ms.Failure(ms.REFUSED, "refused")), float(step))
            case 3:
                peer = ms.Peer(node, addresses[0], "1", 5)
                members.handle(ms.PeerAnswered(addresses[0], peer, addresses[1:]), float(step))
            case _:
                members.handle(ms.RecordGone(f"r{rng.randrange(300)}"), float(step))
        members.check()
    return ACCEPTED


KINDS: dict[str, tuple[TryOne, float]] = {
    "frames": (try_frame, 0.50),
    "HTTP bodies": (try_body, 0.10),
    "manifests": (try_manifest, 0.10),
    "mDNS records": (try_record, 0.08),
    "mDNS packets": (try_packet, 0.10),
    "stage cores": (try_stage, 0.10),
    "membership": (try_membership, 0.02),
}
"""Each with its share of all inputs."""
