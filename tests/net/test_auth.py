"""The cluster key at work on real sockets: members get in, nobody else gets or learns anything."""

import asyncio
import contextlib
import hashlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from flowspec_edge.core import wire
from flowspec_edge.core.rows import Chunk, Row
from flowspec_edge.errors import ClusterKeyError, KeyTextError, LinkLostError, OtherKeyError
from flowspec_edge.net import server as servers
from flowspec_edge.net.auth import Credentials, derive_credentials, key_path, load_key, make_key, replace_key
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import LinkServer, open_link
from tests.narrowing import instance, present
from tests.net.conftest import make_hello, make_welcome


@pytest.fixture(scope="module")
def ours() -> Credentials:
    return derive_credentials(bytes(range(20)))


@pytest.fixture(scope="module")
def theirs() -> Credentials:
    return derive_credentials(bytes(20))


@contextlib.asynccontextmanager
async def serving(
    credentials: Credentials | None, on_link: Callable[[Link], Awaitable[None]] | None = None
) -> AsyncIterator[LinkServer]:
    """A listener that fails the test where an intruder reaches it."""
    reached = []

    async def take(link: Link) -> None:
        reached.append(link.peer)
        if on_link is not None:
            await on_link(link)

    server = await LinkServer.start("127.0.0.1", 0, make_welcome, take, credentials=credentials)
    try:
        async with asyncio.timeout(20):
            yield server
    finally:
        await server.close()
    assert (reached != []) == (on_link is not None)


def test_the_same_key_is_the_same_certificate_on_every_machine(ours: Credentials, theirs: Credentials) -> None:
    """Pinned: a version of ours, or of the library, that made another one would cut a cluster in two."""
    assert hashlib.sha256(ours.certificate).hexdigest() == (
        "f30f8dede9d2677512fb2a415bfb40d0b8cc226aa7aa599fcdb9e1fd8c62dd06"
    )
    assert ours.fingerprint == "54a523cb2f40eb70"
    assert theirs.fingerprint != ours.fingerprint


@pytest.mark.parametrize("num_bytes", [0, 8, 19, 21])
def test_keys_of_another_length_are_refused(num_bytes: int) -> None:
    with pytest.raises(KeyTextError, match=f"a key of {num_bytes} bytes; keys have 20"):
        derive_credentials(bytes(num_bytes))


async def test_members_exchange_what_they_like(ours: Credentials) -> None:
    hidden = np.arange(60 * 2500, dtype=np.float32).reshape(60, 2500)  # 600 KB
    chunk = wire.ChunkMessage(0, Chunk(3, tuple(Row(i, max(i - 1, 0), 7) for i in range(60)), 1, hidden))

    async def echo(link: Link) -> None:
        link.send(await link.receive())
        await link.wait_closed()

    async with serving(ours, echo) as server:
        link, welcome = await open_link("127.0.0.1", server.port, make_hello(wire.DATA), credentials=ours)
        assert welcome == make_welcome()
        assert link._transport.get_extra_info("ssl_object").version() == "TLSv1.3"
        link.send(chunk)
        found = instance(await link.receive(), wire.ChunkMessage).chunk.hidden
        np.testing.assert_array_equal(present(found), hidden)
        await link.close()


async def test_a_member_that_is_killed_is_seen_at_once(ours: Credentials) -> None:
    async def leave(link: Link) -> None:
        await link.receive()
        link._transport.abort()

    async with serving(ours, leave) as server:
        link, _ = await open_link("127.0.0.1", server.port, make_hello(), credentials=ours)
        link.send(wire.CloseSession(1))
        with pytest.raises(LinkLostError, match="pi-kitchen"):
            await link.receive()
        await link.close()


async def test_another_key_gets_nothing(ours: Credentials, theirs: Credentials) -> None:
    async with serving(ours) as server:
        with pytest.raises(OtherKeyError, match=r"peer pi-kitchen at 127.0.0.1:\d+ has another cluster key; .*key set"):
            await open_link("127.0.0.1", server.port, make_hello(), node="pi-kitchen", credentials=theirs)


async def test_no_key_gets_nothing(ours: Credentials) -> None:
    async with serving(ours) as server:
        with pytest.raises(OtherKeyError, match="closed the connection at once, .*flowspec key show there"):
            await open_link("127.0.0.1", server.port, make_hello())


async def test_a_key_does_not_talk_to_a_node_without_one(ours: Credentials) -> None:
    async with serving(None) as server:
        with pytest.raises(OtherKeyError, match="does not encrypt"):
            await open_link("127.0.0.1", server.port, make_hello(), credentials=ours)


def intruder(certificates: Path | None = None, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """A client that believes whatever the server says; the question is whether the server believes it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = version
    if certificates is not None:
        context.load_cert_chain(certificates)
    return context


async def shout(port: int, context: ssl.SSLContext | None) -> bytes:
    """Ask for a link as a member would, and return everything that comes back."""
    request = (
        b"GET /link/control HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        return b""
    got = b""
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        writer.write(request)
        while part := await reader.read(4096):
            got += part
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()
    return got


async def test_a_client_without_our_certificate_hears_nothing(
    ours: Credentials, theirs: Credentials, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    other.write_bytes(self_signed())
    async with serving(ours) as server:
        assert await shout(server.port, intruder()) == b""
        assert await shout(server.port, intruder(other)) == b""
        assert await shout(server.port, intruder(other, ssl.TLSVersion.TLSv1_2)) == b""


def self_signed() -> bytes:
    """Our certificate's name and dates with a key of its own."""
    from flowspec_edge.net.auth import _certificate_of

    return b"".join(_certificate_of(bytes(32)))


async def test_plain_tcp_hears_nothing(ours: Credentials) -> None:
    async with serving(ours) as server:
        answer = await shout(server.port, None)
    assert b"HTTP" not in answer
    assert len(answer) < 16  # an alert of TLS, or nothing


async def test_silent_sockets_keep_nobody_out_and_are_closed(
    ours: Credentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "HANDSHAKE_S", 0.5)

    async def wait(link: Link) -> None:
        await link.wait_closed()

    async with serving(ours, wait) as server:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
        link, _ = await open_link("127.0.0.1", server.port, make_hello(), credentials=ours)
        await link.close()
        for one in silent:
            one.setblocking(False)
            with contextlib.suppress(ConnectionError):
                assert await asyncio.get_running_loop().sock_recv(one, 100) == b""
            one.close()


async def test_a_rogue_that_announces_itself_learns_nothing(ours: Credentials, tmp_path: Path) -> None:
    """It answers where a member was expected, with a certificate that looks like ours, and takes whatever is said."""
    heard: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    (tmp_path / "rogue.pem").write_bytes(self_signed())
    context.load_cert_chain(tmp_path / "rogue.pem")

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(4096))
        writer.close()

    rogue = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context)
    port = rogue.sockets[0].getsockname()[1]
    async with asyncio.timeout(10):
        with pytest.raises(OtherKeyError, match="peer pi-kitchen .*another cluster key"):
            await open_link("127.0.0.1", port, make_hello(), node="pi-kitchen", credentials=ours)
    rogue.close()
    await rogue.wait_closed()
    assert b"".join(heard) == b""


def test_the_first_run_makes_a_key_that_only_its_owner_reads() -> None:
    assert load_key() is None
    secret, is_new = make_key()
    assert is_new
    assert make_key() == (secret, False)
    assert load_key() == secret
    assert key_path().stat().st_mode & 0o777 == 0o600
    assert key_path().parent.stat().st_mode & 0o077 == 0


def test_a_key_that_is_replaced_is_kept_beside_the_new_one() -> None:
    first, kept = replace_key()
    assert kept is None
    second, kept = replace_key()
    assert load_key() == second != first
    assert present(kept).stat().st_mode & 0o777 == 0o600
    assert replace_key(second) == (second, None)
    present(kept).replace(key_path())
    assert load_key() == first


def test_a_broken_key_file_is_named() -> None:
    make_key()
    key_path().write_text("fsk1-oops\n")
    with pytest.raises(ClusterKeyError, match=r"cluster\.key: .*flowspec key new"):
        load_key()
