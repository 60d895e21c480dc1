"""Test vectors of the protocol between nodes: messages, frames, the key and the record, with the bytes of each.

``docs/protocol-vectors.json`` has them for programs in any language, and ``docs/protocol.md`` shows them
(``docs/protocol.py``).
"""

from __future__ import annotations

import hashlib
import ssl
from typing import Any

import msgspec
import numpy as np
from zeroconf import ServiceInfo

from flowspec_edge.core import codec, wire
from flowspec_edge.core.cluster.key_text import format_key
from flowspec_edge.core.row_kinds import kind_of, narrow, widen
from flowspec_edge.core.rows import NO_PARENT, Chunk, Passage, Row, SessionSpec
from flowspec_edge.net.auth import derive_credentials
from flowspec_edge.net.close_codes import CloseCode
from flowspec_edge.net.connection import STILL_BYTES
from flowspec_edge.net.discovery import SERVICE_TYPE, Announcement
from flowspec_edge.net.frames import Opcode, head_of

Json = dict[str, Any]

BUNDLE = hashlib.sha256(b"flowspec").hexdigest()
HIDDEN = np.array([[0.5, -1.0, 2.0, 0.0], [1.0, 0.25, -0.125, 3.0]], np.float32)  # [rows, hidden_size]
ROWS = (Row(4, 3, 97), Row(5, 4, 110))
MESSAGES: tuple[tuple[wire.Message, str], ...] = (
    (wire.Hello("pi-hall", "0.1.0", wire.PROTOCOL_VERSION, wire.CONTROL, ""), "on a control link"),
    (wire.Hello("pi-hall", "0.1.0", wire.PROTOCOL_VERSION, wire.DATA, "pi-hall-1f2e3d4c/1"), "on a data link"),
    (wire.Welcome("pi-attic", "0.1.0", 2**32, [BUNDLE], True, False, 51, 7.25, 1234.5), "a board with sensors"),
    (wire.Welcome("mini-pc", "0.1.0", 2**34, []), "a board without one"),
    (wire.Peers(7361, ["192.0.2.7:7361", "[2001:db8::7]:7361"]), "of a node that serves"),
    (wire.MeasureLayers(BUNDLE, True), "in any precision"),
    (
        wire.LayersMeasured(["w8a8 410000 52000"], 1100, "", [0, 1, 2, 3], 4),
        "410 us a layer and 52 us a row, 10 % slower now",
    ),
    (wire.MeasureLink("pi-attic", "192.0.2.7", 7361), "to that node"),
    (wire.Probe(b"\x00\x01\x02\x03", True), "to be answered"),
    (wire.ProbeAnswer(4), "to that"),
    (wire.LinkMeasured(180_000, 117_000_000), "180 us one way, 117 MB/s"),
    (
        wire.OpenStage("pi-hall-1f2e3d4c", 1, BUNDLE, 0, 4, "pi-attic", "192.0.2.7", 7361, ["192.0.2.5:7361/pi-hall"]),
        "in a precision that the node chooses",
    ),
    (
        wire.OpenStage("pi-hall-1f2e3d4c", 0, BUNDLE, 0, 4, "pi-attic", "192.0.2.7", 7361, [], "w8a8", "float16"),
        "in one that it does not, whose rows leave in 16 bits",
    ),
    (wire.StageProgress("pi-hall-1f2e3d4c", 65_536, 3_353_432), "while weights come"),
    (
        wire.StageOpened("pi-hall-1f2e3d4c", 3_600_000, 240, 3_353_432, "w8a8 on x86_64, avx2, onnxruntime 1.30.0"),
        "loaded and connected",
    ),
    (wire.StageFailure("node pi-attic cannot be reached", "pi-attic"), "a neighbour was lost"),
    (wire.PrepareLayers(BUNDLE, 4, 8, ["192.0.2.5:7361/pi-hall"], "w8a8"), "to stand by"),
    (wire.CancelPreparing(), "of that"),
    (wire.LayersPrepared(4, 8, 3_600_000, 240), "nothing had to be fetched"),
    (wire.LayersGivenBack(4, 8), "their memory was needed"),
    (wire.OpenSession(SessionSpec(7, 2560, True, False, 3)), "a new one, with a prompt of 3 rows"),
    (wire.OpenSession(SessionSpec(8, 2560, True, False, 120, 7, 119)), "takes over 119 rows of session 7"),
    (wire.SessionOpened(8, 119), "they are there"),
    (wire.AdvanceSession(7, 4, 110), "the token after row 4 is 110"),
    (wire.BeginTurn(7, 2), "of a schedule with turns"),
    (wire.CloseSession(7, True), "and keep its rows"),
    (wire.SessionFailure(7, "its cache cannot grow"), "the others go on"),
    (wire.PacketsSent(1200, 3, 40, 0), "3 of 1200 were lost on the way ahead"),
    (wire.EnergyTaken("boot-1", 1234.5, 7.25), "what the whole board took since it began to measure"),
    (wire.Credit(1), "one more chunk"),
    (
        wire.ChunkMessage(0, Chunk(7, (Row(0, NO_PARENT, 464), Row(1, 0, 97), Row(2, 1, 8)), 1)),
        "the prompt on its way to the first stage: no hidden rows",
    ),
    (
        wire.ChunkMessage(1, Chunk(7, ROWS, 2, HIDDEN, 2, (Passage(2, 0.5, 0.25),))),
        "two draft rows behind the first stage, of a schedule with turns",
    ),
    (wire.ChunkMessage(2, Chunk(7, ROWS, 2, narrow(HIDDEN, "float16"))), "the same rows in float16"),
    (wire.ChunkMessage(3, Chunk(7, ROWS, 2, narrow(HIDDEN, "bfloat16"))), "the same rows in bfloat16"),
    (wire.TappedRows(7, 2, (4, 5), HIDDEN), "for the drafter at the origin"),
)
SECRET = bytes(range(20))
RECORD_NAME = f"pi-hall-0a1b2c.{SERVICE_TYPE}"


def vectors() -> Json:
    """All of them, as docs/protocol-vectors.json has them: bytes are in hex."""
    key = key_vector(SECRET)
    return {
        "protocol": wire.PROTOCOL_VERSION,
        "messages": [message_vector(message, note) for message, note in MESSAGES],
        "frames": [frame_vector(*frame) for frame in _frames()],
        "key": key,
        "record": record_vector(key["fingerprint"]),
    }


def message_vector(message: wire.Message, note: str) -> Json:
    header, tail = codec.encode(message)
    kind = msgspec.msgpack.decode(header)[0]
    encoded = {"header": header.hex(), "tail": None if tail is None else tail.hex()}
    return {"kind": kind, "note": note, "fields": fields_of(message), **encoded}


def fields_of(message: wire.Message) -> Json:
    """What a message says, as JSON: bytes in hex, rows as ``[id, parent, token]``, hidden rows as lists."""
    match message:
        case wire.ChunkMessage(number, chunk):
            return {
                "number": number,
                "session": chunk.session,
                "num_wanted": chunk.num_wanted,
                "rows": [list(row) for row in chunk.rows],
                "hidden": None if chunk.hidden is None else widen(chunk.hidden).tolist(),
                "turn": chunk.turn,
                "passages": [list(msgspec.structs.astuple(passage)) for passage in chunk.passages],
                "row_kind": "float32" if chunk.hidden is None else kind_of(chunk.hidden),
            }
        case wire.TappedRows(session, layer, ids, hidden):
            return {"session": session, "layer": layer, "ids": list(ids), "hidden": hidden.tolist()}
    return {name: _plain(value) for name, value in msgspec.structs.asdict(message).items()}


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    return msgspec.structs.asdict(value) if isinstance(value, SessionSpec) else value


def _frames() -> list[tuple[str, bool, Opcode, bytes]]:
    """What each is, whether it comes from the side that connected, its opcode and payload."""
    credit, _ = codec.encode(wire.Credit(1))
    version = CloseCode.OTHER_VERSION.to_bytes(2, "big") + b"run one flowspec version on both"
    return [
        ("Credit, from the side that connected", True, Opcode.BINARY, credit),
        ("Credit, from the side that listened", False, Opcode.BINARY, credit),
        ("a heartbeat's question", True, Opcode.PING, b""),
        ("its answer", False, Opcode.PONG, b""),
        ("a question that is numbered, the third", True, Opcode.PING, (3).to_bytes(8, "big")),
        ("its answer", False, Opcode.PONG, (3).to_bytes(8, "big")),
        ("it stands still for 15 s at most", False, Opcode.PONG, (15_000).to_bytes(STILL_BYTES, "big")),
        ("a goodbye", True, Opcode.CLOSE, CloseCode.DONE.to_bytes(2, "big")),
        ("a refusal", False, Opcode.CLOSE, version),
    ]


def frame_vector(note: str, is_client: bool, opcode: Opcode, payload: bytes) -> Json:
    frame = head_of(opcode, len(payload), is_client=is_client) + payload
    return {"note": note, "opcode": opcode.name, "is_client": is_client, "payload": payload.hex(), "frame": frame.hex()}


def key_vector(secret: bytes) -> Json:
    credentials = derive_credentials(secret)
    pem = credentials.certificate.decode()
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    return {
        "secret": secret.hex(),
        "text": format_key(secret),
        "fingerprint": credentials.fingerprint,
        "certificate": pem,
        "certificate_sha256": digest,
    }


def record_vector(fingerprint: str) -> Json:
    node = Announcement(
        node="pi-hall", host="192.0.2.5", port=7361, cluster="flowspec", version="0.1.0", fingerprint=fingerprint
    )
    info = ServiceInfo(SERVICE_TYPE, RECORD_NAME, properties=dict(node.properties))
    return {"name": RECORD_NAME, "properties": node.properties, "txt": info.text.hex()}
