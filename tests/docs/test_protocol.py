"""The page of the protocol and its test vectors say what the code does, bit for bit."""

import hashlib
import json

import msgpack
import pytest
from zeroconf.asyncio import AsyncServiceInfo

from docs.protocol import KINDS, PAGE, VECTORS, fields_of_kind, page_of, tag_of
from docs.protocol_vectors import Json, fields_of, vectors
from flowspec_edge.core import codec, wire
from flowspec_edge.core.cluster.key_text import parse_key
from flowspec_edge.core.limits import CREDITS_PER_HOP
from flowspec_edge.core.rows import NO_PARENT
from flowspec_edge.net.addresses import NODE_PORT
from flowspec_edge.net.discovery import SERVICE_TYPE, _record_from
from flowspec_edge.net.frames import FrameReader, Opcode, head_of
from flowspec_edge.net.link import DEFAULT_TIMEOUTS
from tests.narrowing import present

KEPT: Json = json.loads(VECTORS.read_text(encoding="utf-8"))
TEXT = PAGE.read_text(encoding="utf-8")
REMEDY = "python -m docs.protocol --write; raise PROTOCOL_VERSION where nodes of before would not understand it"


def test_page_and_vectors_are_those_of_the_code() -> None:
    today = vectors()
    assert today == KEPT, REMEDY
    assert page_of(TEXT, today) == TEXT, REMEDY


def test_every_kind_has_a_vector() -> None:
    assert {vector["kind"] for vector in KEPT["messages"]} == {tag_of(kind) for kind in KINDS}
    assert KEPT["protocol"] == wire.PROTOCOL_VERSION


@pytest.mark.parametrize("vector", KEPT["messages"], ids=lambda vector: f"{vector['kind']} {vector['note']}")
def test_a_message_is_read_and_written_bit_for_bit(vector: Json) -> None:
    header = bytes.fromhex(vector["header"])
    tail = None if vector["tail"] is None else bytes.fromhex(vector["tail"])
    message = codec.decode(header, tail)
    assert fields_of(message) == vector["fields"]
    written, behind = codec.encode(message)
    assert (written, None if behind is None else bytes(behind)) == (header, tail)


def test_a_header_is_what_the_page_says_of_it() -> None:
    """By another reader of MessagePack: the kind's name, then the fields that the table has, in its order."""
    names = {tag_of(kind): [name for name, _ in fields_of_kind(kind)] for kind in KINDS}
    for vector in KEPT["messages"]:
        kind, *values = msgpack.unpackb(bytes.fromhex(vector["header"]))
        said = dict(zip(names[kind], values, strict=True))
        if kind == "Chunk":
            rows = vector["fields"]["rows"]
            table = [value for column in zip(*rows, strict=True) for value in column]
            assert said["table"] == b"".join(value.to_bytes(4, "little") for value in table)
            assert said["width"] == (len(vector["fields"]["hidden"][0]) if vector["tail"] else 0)
        elif kind not in ("Tapped", "Probe", "OpenSession"):
            assert said == vector["fields"]


def test_fields_with_a_default_may_be_left_out_from_the_end() -> None:
    assert codec.decode(msgpack.packb(["SessionOpened", 7])) == wire.SessionOpened(7, 0)


@pytest.mark.parametrize("vector", KEPT["frames"], ids=lambda vector: str(vector["note"]))
def test_a_frame_is_read_and_written_bit_for_bit(vector: Json) -> None:
    frame, payload = bytes.fromhex(vector["frame"]), bytes.fromhex(vector["payload"])
    reader = FrameReader()
    reader.room()[: len(frame)] = frame
    reader.fill(len(frame))
    opcode, came = present(reader.take())
    assert (opcode.name, bytes(came)) == (vector["opcode"], payload)
    assert head_of(Opcode[vector["opcode"]], len(payload), is_client=vector["is_client"]) + payload == frame


def test_the_key_makes_the_certificate_by_the_way_that_the_page_tells() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.x509 import load_pem_x509_certificate

    key = KEPT["key"]
    secret = parse_key(key["text"])
    assert secret.hex() == key["secret"]
    made = hashlib.scrypt(secret, salt=b"flowspec cluster 1", n=2**15, r=8, p=1, maxmem=2**26, dklen=40)
    assert made[32:].hex() == key["fingerprint"]
    certificate = load_pem_x509_certificate(key["certificate"].encode())
    private = Ed25519PrivateKey.from_private_bytes(made[:32])
    assert certificate.public_key() == private.public_key()
    assert certificate.signature == private.sign(certificate.tbs_certificate_bytes)
    assert str(certificate.not_valid_after_utc) == "9999-12-31 23:59:59+00:00" and certificate.serial_number == 1


def test_a_record_is_read_and_written_bit_for_bit() -> None:
    record, txt = KEPT["record"], bytes.fromhex(KEPT["record"]["txt"])
    info = AsyncServiceInfo(SERVICE_TYPE, record["name"], port=NODE_PORT, addresses=[bytes(4)], properties=txt)
    heard = present(_record_from(info))
    read = {"node": heard.node, "cluster": heard.cluster, "version": heard.version, "key": heard.fingerprint}
    assert read == record["properties"]


def test_the_numbers_in_its_sentences_are_those_of_the_code() -> None:
    said = " ".join(TEXT.split())
    assert f"one TCP port ({NODE_PORT} where it is free)" in said
    assert f"nothing came for {DEFAULT_TIMEOUTS.heartbeat_s:g} s is asked with an empty ping" in said
    assert f"no answer within {DEFAULT_TIMEOUTS.answer_s:g} s more" in said
    assert f"{NO_PARENT} is the parent of the first one" in said
    assert f"A sender begins with {CREDITS_PER_HOP}, spends one" in said
    assert f"`{SERVICE_TYPE}`" in said
    assert f"`Text` has at most {wire.MAX_TEXT} characters" in said
