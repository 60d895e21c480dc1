"""Both ends of a link over real loopback sockets: order, bytes, limits, and every way it may end."""

import asyncio
import fcntl
import socket
import sys
import time
from asyncio import sslproto
from collections.abc import Callable
from typing import Any

import aiohttp
import msgpack
import numpy as np
import pytest
from aiohttp import web

from flowspec_edge.core import codec, wire
from flowspec_edge.core.rows import Chunk, Row
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    OtherVersionError,
    ProtocolError,
    is_plain,
)
from flowspec_edge.net import connection
from flowspec_edge.net.assembly import TAIL_ALIGNMENT_BYTES
from flowspec_edge.net.auth import derive_credentials
from flowspec_edge.net.close_codes import CloseCode
from flowspec_edge.net.connection import Link
from flowspec_edge.net.frames import Opcode
from flowspec_edge.net.heartbeat import Heartbeat
from flowspec_edge.net.link import LinkServer, LinkTimeouts, open_link
from flowspec_edge.net.server import serve_app
from flowspec_edge.net.standstill import THIS_PROCESS
from tests.narrowing import instance, present
from tests.net.conftest import linked, listening, make_hello, make_welcome, send_raw


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def make_chunk(number: int, num_rows: int = 1, width: int = 4) -> wire.ChunkMessage:
    hidden = np.arange(num_rows * width, dtype=np.float32).reshape(num_rows, width)
    rows = tuple(Row(i, max(i - 1, 0), 7) for i in range(num_rows))
    return wire.ChunkMessage(number, Chunk(3, rows, 1, hidden))


async def raw_websocket(
    session: aiohttp.ClientSession, server: LinkServer, purpose: str = wire.CONTROL
) -> aiohttp.ClientWebSocketResponse:
    return await session.ws_connect(f"http://127.0.0.1:{server.port}/link/{purpose}")


async def chunk_from(link: Link) -> wire.ChunkMessage:
    return instance(await link.receive(), wire.ChunkMessage)


async def let_nobody_in(link: Link) -> None:
    pytest.fail(f"{link.peer} was let in")


async def test_hello_and_welcome_reach_the_other_end() -> None:
    async with linked() as pair:
        assert pair.welcome == make_welcome()
        assert pair.far.hello == make_hello()
        assert (pair.near.peer, pair.far.peer) == ("pi-kitchen", "pi-hall")


async def test_a_large_tail_arrives_whole_aligned_and_comes_back() -> None:
    async with linked(wire.DATA) as pair:
        sent = make_chunk(0, num_rows=60, width=2500)  # 600 KB
        pair.near.send(sent)
        got = await chunk_from(pair.far)
        np.testing.assert_array_equal(present(got.chunk.hidden), present(sent.chunk.hidden))
        assert got.chunk.rows == sent.chunk.rows
        assert present(got.chunk.hidden).ctypes.data % TAIL_ALIGNMENT_BYTES == 0
        pair.far.send(got)
        back = await chunk_from(pair.near)
        np.testing.assert_array_equal(present(back.chunk.hidden), present(sent.chunk.hidden))


async def test_messages_are_delivered_in_order_those_that_waited_first() -> None:
    async with linked() as pair:
        taken: list[wire.Message] = []
        has_all = asyncio.Event()

        def take(message: wire.Message) -> None:
            taken.append(message)
            if len(taken) == 4:
                has_all.set()

        for session in (1, 2):
            pair.near.send(wire.CloseSession(session))
        while len(pair.far._incoming) < 2:
            await asyncio.sleep(0)
        delivering = asyncio.create_task(pair.far.deliver(take))
        for session in (3, 4):
            pair.near.send(wire.CloseSession(session))
        await has_all.wait()
        assert taken == [wire.CloseSession(session) for session in (1, 2, 3, 4)]
        await pair.near.close()
        with pytest.raises(LinkLostError, match="pi-hall closed the link"):
            await delivering
        with pytest.raises(LinkLostError, match="pi-hall closed the link"):
            await pair.far.deliver(take)


async def test_whoever_cannot_take_a_message_is_delivered_no_more_and_the_rest_waits() -> None:
    def refuse(message: wire.Message) -> None:
        raise ProtocolError("session 1 was never opened")

    async with linked() as pair:
        delivering = asyncio.create_task(pair.far.deliver(refuse))
        for session in (1, 2):
            pair.near.send(wire.CloseSession(session))
        with pytest.raises(ProtocolError, match="session 1 was never opened"):
            await delivering
        assert await pair.far.receive() == wire.CloseSession(2)


async def test_many_messages_keep_their_order_both_ways() -> None:
    async with linked() as pair:
        for i in range(1000):
            pair.near.send(wire.AdvanceSession(1, i, i + 1))
            pair.far.send(wire.CloseSession(i))
        assert [instance(await pair.far.receive(), wire.AdvanceSession).at for _ in range(1000)] == list(range(1000))
        assert [instance(await pair.near.receive(), wire.CloseSession).session for _ in range(1000)] == list(
            range(1000)
        )


async def test_chunks_without_rows_of_floats_pass() -> None:
    async with linked(wire.DATA) as pair:
        for number in range(3):
            pair.near.send(wire.ChunkMessage(number, Chunk(1, (Row(0, 0, 5),), 1)))
            assert (await chunk_from(pair.far)).number == number
        pair.far.send(wire.Credit(2))
        assert await pair.near.receive() == wire.Credit(2)


async def test_small_messages_are_not_held_back() -> None:
    async with linked() as pair:
        for link in (pair.near, pair.far):
            assert link._transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("purpose", [wire.CONTROL, wire.DATA])
async def test_a_killed_peer_is_seen_at_once(purpose: str) -> None:
    async with linked(purpose) as pair:
        pair.near.send(wire.CloseSession(1))
        await pair.far.receive()
        pair.near._transport.abort()
        started = time.monotonic()
        with pytest.raises(LinkLostError, match="pi-hall"):
            await pair.far.receive()
        with pytest.raises(LinkLostError, match="pi-kitchen"):
            await pair.near.receive()
        assert time.monotonic() - started < 0.5
        with pytest.raises(LinkLostError):
            pair.near.send(wire.CloseSession(1))


@pytest.mark.parametrize("closer", ["near", "far"])
async def test_a_clean_close_delivers_the_last_message(closer: str) -> None:
    async with linked() as pair:
        closing, other = (pair.near, pair.far) if closer == "near" else (pair.far, pair.near)
        for i in range(100):
            closing.send(wire.CloseSession(i))
            other.send(wire.CloseSession(i))
        closing.send(wire.StageFailure("out of memory"))
        await closing.close()
        got = [message async for message in other]
        assert len(got) == 101
        assert got[-1] == wire.StageFailure("out of memory")
        with pytest.raises(LinkLostError, match="closed the link"):
            await other.receive()


async def test_close_may_be_called_often_and_by_several() -> None:
    async with linked() as pair:
        await asyncio.gather(pair.near.close(), pair.near.close(), pair.far.close())
        await pair.near.close()
        assert not pair.near.is_open
        assert [message async for message in pair.near] == []


async def test_an_iteration_over_a_cut_link_raises() -> None:
    async with linked() as pair:
        pair.near._transport.abort()
        with pytest.raises(LinkLostError):
            async for _ in pair.far:
                pass


async def test_close_is_quick_where_the_peer_reads_nothing() -> None:
    async with linked(wire.DATA) as pair:
        pair.far._transport.pause_reading()
        for number in range(30):
            pair.near.send(make_chunk(number, num_rows=64, width=4096))  # 30 MB, more than the kernel takes
        started = time.monotonic()
        await pair.near.close()
        assert time.monotonic() - started < 1.5
        pair.far._transport.resume_reading()


async def test_a_full_queue_ends_the_link_and_names_the_limit() -> None:
    rows = wire.TappedRows(1, 2, tuple(range(64)), np.zeros((64, 1024), np.float32))  # 256 KB
    async with linked() as pair:
        pair.far._transport.pause_reading()
        with pytest.raises(LinkLostError, match=r"peer pi-kitchen: 1024 messages .*SEND_QUEUE_MESSAGES"):
            while True:
                pair.near.send(rows)
        with pytest.raises(LinkLostError, match="1024 messages"):
            await pair.near.receive()
        pair.far._transport.resume_reading()
        with pytest.raises(LinkLostError):
            while True:
                await pair.far.receive()


async def test_a_slow_receiver_holds_the_sender_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.RECEIVE_QUEUE_MESSAGES, wire.DATA, 2)
    async with linked(wire.DATA) as pair:
        for number in range(40):
            pair.near.send(make_chunk(number, num_rows=64, width=4096))  # 1 MB each
        first = await chunk_from(pair.far)
        while len(pair.far._incoming) < 2:
            await asyncio.sleep(0)
        assert first.number == 0
        assert len(pair.far._incoming) == 2
        assert [(await chunk_from(pair.far)).number for _ in range(39)] == list(range(1, 40))


async def test_a_link_that_holds_its_peer_back_still_hears_its_goodbye(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.RECEIVE_QUEUE_MESSAGES, wire.CONTROL, 2)
    async with linked() as pair:
        for session in range(9):
            pair.near.send(wire.CloseSession(session))
        while not pair.far._is_held_back:
            await asyncio.sleep(0)
        monkeypatch.setattr(pair.far, "_lose", heard := Heard(pair.far._lose))
        await pair.far.close()
        assert heard.ends == ["peer pi-hall closed the link"], "it has not waited for its limit"


async def test_a_goodbye_and_an_end_that_waited_unread_end_an_encrypted_link_quietly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio's TLS breaks where it is aborted while it hands on what it has read behind the end."""
    monkeypatch.setitem(connection.RECEIVE_QUEUE_MESSAGES, wire.CONTROL, 2)
    broken: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: broken.append(context))
    async with linked(credentials=derive_credentials(bytes(range(20)))) as pair:
        for session in range(9):
            pair.near.send(wire.CloseSession(session))
        while not pair.far._is_held_back:
            await asyncio.sleep(0)
        closing = asyncio.create_task(pair.near.close())
        await asyncio.sleep(0)
        pair.near._transport.abort()
        tls = pair.far._transport._ssl_protocol  # type: ignore[attr-defined]
        while not tls._eof_received:
            await asyncio.sleep(0)
        await asyncio.gather(closing, pair.far.close())
    assert not broken


async def test_an_encrypted_link_is_not_aborted_behind_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The TLS of Debian 12's Python, 3.11.2, breaks there."""
    was_there: list[bool] = []
    abort = sslproto._SSLProtocolTransport.abort

    def watched(transport: Any) -> None:
        was_there.append(transport._ssl_protocol is not None)
        abort(transport)

    monkeypatch.setattr(sslproto._SSLProtocolTransport, "abort", watched)
    async with linked(credentials=derive_credentials(bytes(range(20)))) as pair:
        await pair.near.close()
        await pair.far.close()
    assert was_there and all(was_there)


class Heard:
    """Notes for which reasons a link is lost."""

    def __init__(self, lose: Callable[[FlowspecError], None]) -> None:
        self.lose = lose
        self.ends: list[str] = []

    def __call__(self, end: FlowspecError) -> None:
        self.ends.append(str(end))
        self.lose(end)


async def test_a_gap_in_the_chunk_numbers_is_named_at_both_ends() -> None:
    async with linked(wire.DATA) as pair:
        pair.near.send(make_chunk(0))
        pair.near.send(make_chunk(2))
        assert (await chunk_from(pair.far)).number == 0
        with pytest.raises(ProtocolError, match="peer pi-hall: chunk 2 came where 1 was expected"):
            await pair.far.receive()
        with pytest.raises(LinkLostError, match="pi-kitchen closed the link: .*chunk 2 came where 1"):
            await pair.near.receive()


async def test_a_chunk_on_a_control_link_is_refused() -> None:
    async with linked() as pair:
        pair.near.send(make_chunk(0))
        with pytest.raises(ProtocolError, match="a chunk on a control link"):
            await pair.far.receive()


async def test_close_with_an_error_tells_the_peer_why() -> None:
    async with linked() as pair:
        await pair.far.close(ProtocolError("session 9 was never opened"))
        with pytest.raises(LinkLostError, match="session 9 was never opened"):
            await pair.near.receive()


FRAMES = [
    (b"\xc1", "not a message"),
    (b"", "not a message"),
    (msgpack.packb(["Credit", -1]), "Credit: Expected `int` >= 0"),
    (bytes(100_000), "exceeds the 66560-byte limit (MAX_FRAME_BYTES)"),
    ("text", "text message"),
]


@pytest.mark.parametrize(("frame", "text"), FRAMES, ids=[text for _, text in FRAMES])
async def test_garbage_closes_the_link_with_a_named_error(frame: bytes | str, text: str) -> None:
    failed: asyncio.Future[Exception] = asyncio.Future()

    async def on_link(link: connection.Link) -> None:
        try:
            await link.receive()
        except ProtocolError as error:
            failed.set_result(error)
            raise

    async with listening(on_link) as server, aiohttp.ClientSession() as session, asyncio.timeout(5):
        websocket = await raw_websocket(session, server)
        await websocket.send_bytes(codec.encode(make_hello())[0])
        await websocket.receive()
        await (websocket.send_str(frame) if isinstance(frame, str) else websocket.send_bytes(frame))
        error = await failed
        assert str(error).startswith("peer pi-hall: ")
        assert text in str(error)
        assert (await websocket.receive()).type is aiohttp.WSMsgType.CLOSE


@pytest.mark.parametrize(("fragment", "text"), [(bytes(17), "at most 16"), (b"", "at most 16")])
async def test_a_wrong_fragment_is_refused(fragment: bytes, text: str) -> None:
    async with linked(wire.DATA) as pair:
        header, _ = codec.encode(make_chunk(0))
        send_raw(pair.near, header)
        send_raw(pair.near, fragment)
        with pytest.raises(ProtocolError, match=text):
            await pair.far.receive()


@pytest.mark.parametrize(
    ("first", "text"),
    [(wire.Credit(1), "Credit came where Hello was expected"), (make_hello(wire.DATA), "Hello for a data link")],
)
async def test_a_wrong_first_message_is_refused(first: wire.Plain, text: str) -> None:
    async with listening(let_nobody_in) as server, aiohttp.ClientSession() as session, asyncio.timeout(5):
        websocket = await raw_websocket(session, server)
        await websocket.send_bytes(codec.encode(first)[0])
        answer = await websocket.receive()
        assert answer.type is aiohttp.WSMsgType.CLOSE
        assert text in present(answer.extra)


BOTH_PROTOCOLS = f"pi-hall speaks protocol 99, pi-kitchen speaks {wire.PROTOCOL_VERSION};"


async def test_another_protocol_version_is_named_at_both_ends(caplog: pytest.LogCaptureFixture) -> None:
    async with listening(let_nobody_in) as server, asyncio.timeout(5):
        with pytest.raises(OtherVersionError, match=BOTH_PROTOCOLS):
            await open_link("127.0.0.1", server.port, make_hello(protocol=99))
    assert "pi-hall speaks protocol 99" in caplog.text


async def test_a_peer_of_another_name_is_refused() -> None:
    async def on_link(link: connection.Link) -> None:
        async for _ in link:
            pass

    async with listening(on_link) as server, asyncio.timeout(5):
        with pytest.raises(NodeUnavailableError, match="peer pi-attic: .*answers pi-kitchen"):
            await open_link("127.0.0.1", server.port, make_hello(), node="pi-attic")


async def test_silent_sockets_do_not_block_others_and_are_closed() -> None:
    async with (
        listening(lambda link: link.close(), LinkTimeouts(connect_s=0.3)) as server,
        aiohttp.ClientSession() as session,
        asyncio.timeout(5),
    ):
        silent = [await raw_websocket(session, server) for _ in range(20)]
        link, welcome = await open_link("127.0.0.1", server.port, make_hello())
        assert welcome == make_welcome()
        await link.close()
        for websocket in silent:
            answer = await websocket.receive()
            assert "no Hello within 0.3 s" in present(answer.extra)


async def test_nobody_listening_says_what_to_try() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(NodeUnavailableError, match=rf"peer pi-attic at 127.0.0.1:{port} cannot be .*flowspec node"):
            await open_link("127.0.0.1", port, make_hello(), node="pi-attic")


async def test_a_listener_that_says_nothing_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(NodeUnavailableError, match=r"no answer within 0.2 s"):
            await open_link("127.0.0.1", silent.getsockname()[1], make_hello(), timeouts=LinkTimeouts(connect_s=0.2))


async def test_a_port_in_use_is_named() -> None:
    async with listening(let_nobody_in) as server:
        with pytest.raises(
            NodeUnavailableError, match=f"^cannot listen on 127.0.0.1:{server.port}: address already in use; "
        ):
            await LinkServer.start("127.0.0.1", server.port, make_welcome, let_nobody_in)


async def test_a_peer_that_has_answered_is_asked_again_as_soon_as_it_is_quiet() -> None:
    asked: asyncio.Queue[bool] = asyncio.Queue()
    heartbeat = Heartbeat(0.01, 60.0, lambda: asked.put_nowait(True), lambda why: None)
    for _ in range(3):
        async with asyncio.timeout(10):
            await asked.get()
        heartbeat.hear()
    heartbeat.stop()


async def test_a_heartbeat_finds_a_peer_that_stopped() -> None:
    async with linked(timeouts=LinkTimeouts(heartbeat_s=0.2, answer_s=0.1)) as pair:
        pair.near._transport.pause_reading()  # like SIGSTOP: the socket lives, nobody answers pings
        started = time.monotonic()
        with pytest.raises(LinkLostError, match="peer pi-hall: .*PONG"):
            await pair.far.receive()
        assert time.monotonic() - started < 1


async def test_a_peer_that_told_so_may_stand_still_until_it_is_over() -> None:
    async with linked(timeouts=LinkTimeouts(heartbeat_s=0.05, answer_s=0.1)) as pair:
        with THIS_PROCESS.expected():
            await asyncio.sleep(0.02)  # both ends have been told, for both are in this process
            pair.near._transport.pause_reading()
            assert await pair.far.answers(0.1), "its silence is no sign that it is lost"
            await asyncio.sleep(0.5)
            assert pair.far.is_open
            pair.near._transport.resume_reading()
        await asyncio.sleep(0.02)
        pair.near._transport.pause_reading()
        with pytest.raises(LinkLostError, match="PONG"):
            await pair.far.receive()


async def test_a_link_is_told_that_is_opened_while_its_process_may_stand_still() -> None:
    with THIS_PROCESS.expected():
        async with linked(timeouts=LinkTimeouts(heartbeat_s=0.05, answer_s=0.1)) as pair:
            await asyncio.sleep(0.02)
            pair.near._transport.pause_reading()
            await asyncio.sleep(0.5)
            assert pair.far.is_open


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
async def test_rows_wait_for_a_peer_that_stands_still() -> None:
    """Its system takes only what it has room for; of others that is the end of a data link."""
    async with linked(wire.DATA) as pair:
        pair.far.tell_still(15)
        await asyncio.sleep(0.02)
        pair.far._transport.pause_reading()
        pair.near.send(make_chunk(0, 256, 16384))
        await asyncio.sleep(3)
        assert pair.near.is_open
        pair.far._transport.resume_reading()
        assert (await chunk_from(pair.far)).number == 0
        pair.far.tell_still(0)
        await asyncio.sleep(0.02)
        pair.far._transport.pause_reading()
        pair.near.send(make_chunk(1, 256, 16384))
        with pytest.raises(LinkLostError):
            await pair.near.receive()


async def test_no_peer_may_stand_still_for_longer_than_any_board_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_STILL_S", 0.2)
    async with linked(timeouts=LinkTimeouts(heartbeat_s=0.05, answer_s=0.1)) as pair:
        began = time.monotonic()
        pair.near.tell_still(60)
        await asyncio.sleep(0.02)
        pair.near._transport.pause_reading()
        with pytest.raises(LinkLostError, match="PONG"):
            await pair.far.receive()
        assert time.monotonic() - began > 0.3


async def test_whoever_stood_still_itself_reads_the_answer_before_it_gives_up() -> None:
    async with linked(timeouts=LinkTimeouts(heartbeat_s=0.02, answer_s=0.1)) as pair:
        for _ in range(2):
            await asyncio.sleep(0.03)  # the question is on its way
            time.sleep(0.5)  # noqa: ASYNC251  it is the loop that stands still
            await asyncio.sleep(0.05)
            assert pair.far.is_open and pair.near.is_open


@pytest.mark.parametrize("purpose", [wire.CONTROL, wire.DATA])
async def test_a_peer_answers_a_question_until_it_stops(purpose: str) -> None:
    async with linked(purpose, LinkTimeouts(heartbeat_s=0)) as pair:
        assert await pair.near.answers(5) and await pair.far.answers(5)
        assert all(await asyncio.gather(*(pair.near.answers(5) for _ in range(3))))
        pair.far._transport.pause_reading()
        assert not await pair.near.answers(0.05) and pair.near.is_open
        pair.far._transport.resume_reading()
        assert await pair.near.answers(5), "the answer to an earlier question is none to this one"


@pytest.mark.parametrize("is_vouched_for", [True, False])
async def test_a_peer_that_is_vouched_for_is_there_and_one_that_only_tells_something_is_not(
    is_vouched_for: bool,
) -> None:
    async with linked() as pair:
        pair.far._transport.pause_reading()  # like a wire that is broken this way, or on which weights come first
        asked = asyncio.create_task(pair.near.answers(1.0))
        pair.near.vouch()  # before the second half
        while not asked.done():
            await asyncio.sleep(0.01)
            pair.far.send(wire.PacketsSent(1, 0, 1, 0))
            if is_vouched_for:
                pair.near.vouch()
        assert asked.result() is is_vouched_for


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell nothing")
@pytest.mark.parametrize("purpose", [wire.CONTROL, wire.DATA])
async def test_each_probe_is_a_packet_of_its_own_and_so_is_its_answer(purpose: str) -> None:
    async with linked(purpose, LinkTimeouts(heartbeat_s=0)) as pair, asyncio.timeout(5):
        for end in (pair.near, pair.far):
            end.take_packets()
        for _ in range(5):
            pair.near.probe()
            num_answered = 0
            while not num_answered:
                await asyncio.sleep(0.001)
                num_answered = pair.far.take_packets().num_sent
            assert num_answered == 1
        assert pair.near.take_packets() == (5, 0)


async def test_a_link_that_ends_is_no_answer() -> None:
    async with linked() as pair:
        pair.far._transport.pause_reading()
        asked = asyncio.create_task(pair.near.answers(20))
        await asyncio.sleep(0)
        pair.near.abort()
        assert not await asked and not await pair.near.answers(20)


async def test_whoever_stood_still_itself_reads_the_answer_before_it_takes_it_for_missing() -> None:
    async with linked() as pair:
        asked = asyncio.create_task(pair.near.answers(0.1))
        await asyncio.sleep(0.03)  # the question is on its way
        time.sleep(0.5)  # noqa: ASYNC251  it is the loop that stands still
        assert await asked


async def test_the_server_ends_links_that_are_still_in_use() -> None:
    async def on_link(link: connection.Link) -> None:
        async for _ in link:
            pass

    server = await LinkServer.start("127.0.0.1", 0, make_welcome, on_link)
    async with asyncio.timeout(5):
        link, _ = await open_link("127.0.0.1", server.port, make_hello())
        await server.close()
        assert [message async for message in link] == []
        await link.close()


async def test_whoever_sends_is_told_when_it_would_wait_and_when_it_would_not() -> None:
    async with linked(wire.DATA) as pair:
        told: list[bool] = []
        has_room = asyncio.Event()

        def tell_room(has: bool) -> None:
            told.append(has)
            has_room.set() if has else has_room.clear()

        pair.far._transport.pause_reading()
        delivering = asyncio.create_task(pair.near.deliver(lambda message: pytest.fail(str(message)), tell_room))
        await asyncio.sleep(0)
        num_sent = 0
        while not told:
            pair.near.send(make_chunk(num_sent, num_rows=60, width=2500))  # 600 KB
            num_sent += 1
        assert told == [False]
        pair.far._transport.resume_reading()
        for _ in range(num_sent):
            await chunk_from(pair.far)
        await has_room.wait()
        assert told == [False, True] * (len(told) // 2)
        delivering.cancel()


@pytest.mark.skipif(not hasattr(socket, "TCP_NOTSENT_LOWAT"), reason="the system cannot bound what it holds")
async def test_the_system_holds_little_of_a_control_link_so_that_heartbeats_pass() -> None:
    """A peer reads nothing while rows are sent: what waits, waits in pieces here, not as one queue in the kernel."""
    async with linked() as pair:
        pair.far._transport.pause_reading()
        hidden = np.zeros((128, 8192), np.float32)
        for layer in range(4):  # 16 MiB, more than any receive buffer takes
            pair.near.send(wire.TappedRows(1, layer, tuple(range(128)), hidden))
        while not pair.near._transport.get_write_buffer_size():
            await asyncio.sleep(0)
        kernel = pair.near._transport.get_extra_info("socket")
        unsent = int.from_bytes(fcntl.ioctl(kernel.fileno(), SIOCOUTQNSD, bytes(4)), sys.byteorder)
        assert unsent <= 2 * connection.UNSENT_BYTES
        pair.far._transport.resume_reading()
        for _ in range(4):
            assert isinstance(await pair.far.receive(), wire.TappedRows)


SIOCOUTQNSD = 0x894B
"""Linux: bytes in a socket's send queue that are not on the wire."""


@pytest.mark.parametrize(
    ("code", "words", "is_other_version"),
    [(CloseCode.OTHER_VERSION, b"", True), (1002, b"pi-hall speaks protocol 9", False)],
)
async def test_another_protocol_version_is_known_by_its_code_alone(
    code: int, words: bytes, is_other_version: bool
) -> None:
    async def refuse(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse()
        await websocket.prepare(request)
        await websocket.receive()
        await websocket.close(code=code, message=words)
        return websocket

    app = web.Application()
    app.router.add_get("/link/control", refuse)
    served = await serve_app(app)
    async with asyncio.timeout(5):
        with pytest.raises(NodeUnavailableError) as refused:
            await open_link("127.0.0.1", served.port, make_hello())
        await served.close()
    assert isinstance(refused.value, OtherVersionError) == is_other_version


def test_the_codes_are_those_that_every_version_knows() -> None:
    assert [int(code) for code in CloseCode] == [1000, 1002, 4001]


@pytest.mark.parametrize(
    "message",
    [
        ["Hello", "pi\x1b[31m", "0.1.0", wire.PROTOCOL_VERSION, "control", ""],
        ["StageOpened", "ring\0", 1, 1, 0],
        ["OpenStage", "r", 0, "../" + "0" * 61, 0, 1, "a", "127.0.0.1", 1, [], ""],
        ["OpenStage", "r", 0, "0" * 64, 0, 1, "a", "127.0.0.1/x?", 1, [], ""],
        ["OpenStage", "r", 0, "0" * 64, 0, 1, "a", "127.0.0.1", 65536, [], ""],
        ["OpenStage", "r", 0, "0" * 64, 0, 1, "a", "127.0.0.1", 1, ["a"] * 65, ""],
        ["MeasureLink", "a", "a b", 1],
        ["MeasureLayers", "0" * 63 + "\n", False],
        ["Welcome", "a", "1", 1, ["0" * 64] * 513, False],
        ["Surprise\x1b[31m\u202e"],
    ],
    ids=lambda message: str(message[0]).encode("ascii", "replace").decode(),
)
async def test_names_that_are_none_end_the_link_and_are_never_shown(message: list[object]) -> None:
    async with linked() as pair:
        send_raw(pair.near, msgpack.packb(message))
        with pytest.raises(ProtocolError, match="peer pi-hall: ") as refused:
            await pair.far.receive()
        with pytest.raises(LinkLostError, match="pi-kitchen closed the link: ") as told:
            await pair.near.receive()
    assert is_plain(str(refused.value)) and is_plain(str(told.value))


async def test_the_reason_of_a_failure_arrives_escaped_and_short_enough() -> None:
    async with linked() as pair:
        pair.near.send(wire.StageFailure("ONNX:\n\x1b[31m" + "x" * 10_000))
        first = await pair.far.receive()
        send_raw(pair.near, msgpack.packb(["StageFailure", "a\nflowspec: all is well\x9b"]))
        second = await pair.far.receive()
    assert isinstance(first, wire.StageFailure) and first.reason.startswith("ONNX:\\x0a\\x1b[31mxxx")
    assert len(first.reason) == wire.MAX_TEXT
    assert second == wire.StageFailure("a\\x0aflowspec: all is well\\x9b")


async def test_why_a_peer_closed_is_shown_escaped() -> None:
    async with linked() as pair:
        send_raw(pair.far, int(CloseCode.BROKEN_RULE).to_bytes(2, "big") + b"a\n\x1b[31m", Opcode.CLOSE)
        with pytest.raises(LinkLostError, match=r"closed the link: a\\x0a\\x1b\[31m"):
            await pair.near.receive()


async def test_a_bug_behind_a_link_is_told_to_its_peer_and_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(link: Link) -> None:
        if link.peer == "pi-hall":
            raise KeyError("x")
        await link.wait_closed()

    async with listening(fail) as server, asyncio.timeout(5):
        link, _ = await open_link("127.0.0.1", server.port, make_hello())
        with pytest.raises(LinkLostError, match="the node at the other end failed .KeyError., which is a bug"):
            await link.receive()
        await link.close()
        other, _ = await open_link(
            "127.0.0.1", server.port, wire.Hello("pi-attic", "1", wire.PROTOCOL_VERSION, wire.CONTROL, "")
        )
        assert other.is_open
        await other.close()
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("host", ["a/b", "a@b", "", "a b", "a\0", "x" * 300, "a..b", "xn--\udc00"])
async def test_what_is_no_host_is_not_connected_to(host: str) -> None:
    with pytest.raises(NodeUnavailableError, match="is no address"):
        await open_link(host, 80, make_hello())


@pytest.mark.parametrize("has_key", [False, True])
async def test_why_nothing_answers_is_a_word_of_the_system_and_no_python_object(has_key: bool) -> None:
    credentials = derive_credentials(bytes(range(20))) if has_key else None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(NodeUnavailableError, match=r"cannot be reached \(Connection refused\)") as refused:
            await open_link("127.0.0.1", unused.getsockname()[1], make_hello(), credentials=credentials)
    assert "<" not in str(refused.value) and "'" not in str(refused.value)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
async def test_a_link_over_ipv6_is_a_link() -> None:
    server = await LinkServer.start("::1", 0, make_welcome, lambda link: link.wait_closed())
    link, _ = await open_link("::1", server.port, make_hello())
    assert (link.local_host, link.peer_host) == ("::1", "::1")
    await link.close()
    await server.close()
    with pytest.raises(NodeUnavailableError, match=rf"at \[::1\]:{server.port} cannot be reached"):
        await open_link("::1", server.port, make_hello())


@pytest.mark.parametrize("path", [f"/link/{wire.CONTROL}", f"/link/{wire.DATA}", "/x"])
async def test_no_page_of_the_web_is_a_node(path: str) -> None:
    async def take(link: Link) -> None:
        raise AssertionError("a page was let in")

    server = await LinkServer.start("127.0.0.1", 0, make_welcome, take)
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(10):
            with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                await session.ws_connect(f"http://127.0.0.1:{server.port}{path}", origin="http://evil.example")
            assert refused.value.status == 403
    finally:
        await server.close()
