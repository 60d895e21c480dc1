"""A link: one WebSocket, the same class at either end. ``link.py`` opens and accepts them.

A message is one binary WebSocket message with its header; the tail of a chunk follows in further ones of at most
FRAGMENT_BYTES, which the receiver puts together in one buffer. Between two nodes there are two kinds of link: control
(small messages both ways, with a heartbeat) and data (chunks forwards, credits backwards). A heartbeat behind a large
chunk on a slow wire raises false alarms, so on data links the system watches that bytes are taken.

A link is used once. It ends by ``close`` here, by the peer, by a cut, or by a broken rule; the first of these is the
error that ``receive`` and ``send`` raise from then on. Reconnecting lives outside.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from typing import Any, cast

import aiohttp
import numpy as np
from aiohttp import WSMsgType, web

from flowspec_edge.core import codec, wire
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    OtherVersionError,
    ProtocolError,
    plain_text,
    release_frames,
    system_words,
)
from flowspec_edge.net.close_codes import CloseCode, close_code_of
from flowspec_edge.net.held_bytes import ALL_LINKS
from flowspec_edge.net.sent_packets import Packets, SentPackets

FRAGMENT_BYTES = 65536
"""Largest piece of a tail. 600 KB in one message took 1066 us on loopback, in pieces of 64-128 KB 280 us (x86, 2
cores)."""
MAX_FRAME_BYTES = 66560
"""What the WebSocket layer lets in: a fragment or a header, and 1 KB for its way of counting."""
UNSENT_BYTES = 131072
"""What the system may hold of a control link beyond what is on the wire. Heartbeats pass between the pieces of tapped
rows, but not what the system has taken: on 10 Mbit/s with its usual megabytes a link was lost after 3 s, with this it
carried 24 MB in 21 s (x86, Linux 6, tbf)."""
UNTAKEN_MS = 1300
"""A data link of which the peer's system has taken nothing for so long is lost, and with it the way to that peer: 0.2 s
later, after TCP's first repetition. Whether the peer itself still works is what its control link tells."""
IDLE_S = 1
"""A data link on which nothing came for so long is probed by the system, and lost when the second probe is due."""
TAIL_ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector load of today's CPUs."""
SEND_QUEUE_MESSAGES = {wire.CONTROL: 1024, wire.DATA: 64}
"""More than a live peer ever leaves waiting: an origin sends a few hundred control messages per second, and credits
keep a data link at one or two chunks."""
RECEIVE_QUEUE_MESSAGES = {wire.CONTROL: 1024, wire.DATA: 8}
"""Beyond this the link stops reading, so that a peer that sends too much is held back by TCP."""
RECEIVE_QUEUE_BYTES = 32 * 2**20
"""The same in bytes: two chunks of the largest kind."""
CLOSE_S = 0.8
"""For the last messages and the peer's goodbye; after a cut nothing comes, and the transport is aborted."""
ABORT_S = 0.2
"""For the two tasks to see an aborted transport; it takes one turn of the loop."""
LATE_S = 0.25
"""A timer that is later than this means that this process itself stood still. What came meanwhile is read first."""
MAX_REASON_BYTES = 120
"""A WebSocket close frame holds 123 bytes of text (RFC 6455, 5.5)."""

_log = logging.getLogger(__name__)
_WebSocket = aiohttp.ClientWebSocketResponse | web.WebSocketResponse


class Link:
    """One connection to a peer. Made by ``open_link`` and ``LinkServer``."""

    def __init__(
        self,
        websocket: _WebSocket,
        transport: asyncio.Transport,
        purpose: str,
        peer: str,
        hello: wire.Hello | None = None,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        self.peer = peer
        self.purpose = purpose
        self._hello = hello
        self._websocket = websocket
        self._transport, self._protocol = transport, cast(Any, transport.get_protocol())
        self._session = session
        self._outgoing: deque[tuple[bytes, memoryview | None]] = deque()
        self._incoming: deque[tuple[wire.Message, int]] = deque()  # with the bytes that each was
        self._num_queued_bytes = 0
        self.num_sent_bytes = self.num_received_bytes = 0
        self._to_send, self._arrived, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._next_number = 0
        self._num_asked = self._num_answered = 0
        self._answered = asyncio.Event()
        self._end: FlowspecError | None = None
        self._is_clean = False
        self._goodbye: bytes | None = None
        self.local_host = str(transport.get_extra_info("sockname")[0])
        """The address by which the peer at the other end knows this machine."""
        self.peer_host = str(transport.get_extra_info("peername")[0])
        """The address that the peer connects from, or answers at."""
        connection = transport.get_extra_info("socket")
        _set_up(connection, purpose)
        self._sent_packets = SentPackets(connection)
        self._reader = asyncio.create_task(self._read(), name=f"link reader {peer}")
        self._writer = asyncio.create_task(self._write(), name=f"link writer {peer}")
        self._closer: asyncio.Task[None] | None = None

    @property
    def hello(self) -> wire.Hello:
        """What the connecting side said first; at the accepting end known once the link is handed out."""
        assert self._hello is not None, "a link is handed out after its Hello"
        return self._hello

    def accept(self, hello: wire.Hello) -> None:
        """From now on the peer has a name."""
        self._hello, self.peer = hello, hello.node

    @property
    def is_open(self) -> bool:
        return self._end is None

    def send(self, message: wire.Message) -> None:
        """Queue a message; never waits. The array of a chunk must not be changed afterwards.

        Raises:
            LinkLostError: the link has ended, or the peer took nothing for so long that the queue is full.
            ProtocolError: the link ended because the peer broke the rules.
        """
        if self._end is not None:
            raise self._end.again()
        limit = SEND_QUEUE_MESSAGES[self.purpose]
        if len(self._outgoing) >= limit:
            full = LinkLostError(
                f"peer {self.peer}: {limit} messages wait on the {self.purpose} link, the limit (SEND_QUEUE_MESSAGES); "
                "the peer has stopped reading"
            )
            self._lose(full)
            raise full.again()
        self._outgoing.append(codec.encode(message))
        self._to_send.set()

    async def receive(self) -> wire.Message:
        """The next message; those that came before the end are still handed out.

        Raises:
            LinkLostError: the link has ended.
            ProtocolError: the peer broke the rules; the link is closed.
            OtherVersionError: the peer speaks another version of the protocol, and closed the link.
        """
        while not self._incoming:
            if self._end is not None:
                raise self._end.again()
            self._arrived.clear()
            await self._arrived.wait()
        self._room.set()
        message, num_bytes = self._incoming.popleft()
        self._num_queued_bytes -= num_bytes
        ALL_LINKS.release(self, num_bytes)
        return message

    async def answers(self, within_s: float) -> bool:
        """Whether the peer answers a question that it is asked now, behind what waits to be sent."""
        self.probe()
        asked, loop = self._num_asked, asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while self._end is None and self._num_answered < asked:
            self._answered.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._answered.wait()
            except TimeoutError:
                if loop.time() - deadline <= LATE_S:
                    return False
                deadline = loop.time() + LATE_S  # this process stood still, and the answer may be there
        return self._end is None

    def probe(self) -> None:
        """Ask the peer for an answer for which nobody waits: a packet either way, behind what waits to be sent."""
        self._num_asked += 1
        self._to_send.set()

    def take_packets(self) -> Packets:
        """How many packets the system has sent since the last call, and how many of these were lost, where it tells."""
        return self._sent_packets.take()

    def __aiter__(self) -> Link:
        return self

    async def __anext__(self) -> wire.Message:
        """Like ``receive``, but a link that was closed, here or by the peer, ends the loop without an error."""
        try:
            return await self.receive()
        except LinkLostError:
            if self._is_clean:
                raise StopAsyncIteration from None
            raise

    async def close(self, error: ProtocolError | OtherVersionError | None = None) -> None:
        """Send what is queued and say goodbye, or abort after about a second. With ``error`` the peer is told why."""
        self._start_closing(error or LinkLostError(f"peer {self.peer}: the link was closed here"))
        assert self._closer is not None
        await asyncio.shield(self._closer)

    def abort(self) -> None:
        """End it at once: nobody is at the other end any more to say goodbye to."""
        self._lose(LinkLostError(f"peer {self.peer}: the {self.purpose} link was given up here"))

    async def wait_closed(self) -> None:
        """Until the link has ended, here or there."""
        await asyncio.wait({self._reader})

    def give_way(self, num_bytes: int, limit_bytes: int) -> None:
        """End, since all links together hold too much and this one has stood still the longest; see ``HeldBytes``."""
        self._incoming.clear()
        self._num_queued_bytes = 0
        self._start_closing(
            ProtocolError(
                f"peer {self.peer}: {num_bytes} bytes of its messages stood here unfinished or untaken, while all "
                f"links together may hold {limit_bytes} (MAX_HELD_BYTES)"
            )
        )

    def _finish(self, end: FlowspecError) -> None:
        """The first end counts; everyone who waits sees it."""
        if self._end is None and isinstance(end, LinkLostError) and self.purpose == wire.DATA:
            end.neighbour = self.peer
        self._end = self._end or end
        for event in (self._to_send, self._arrived, self._room, self._answered):
            event.set()

    def _lose(self, end: FlowspecError) -> None:
        self._finish(end)
        self._transport.abort()

    def _start_closing(self, end: FlowspecError) -> None:
        if self._closer is not None:
            return
        if self._end is None:
            code = close_code_of(end)
            self._is_clean = code is CloseCode.DONE
            reason = b"" if self._is_clean else str(end).encode()[:MAX_REASON_BYTES]
            self._goodbye = code.to_bytes(2, "big") + reason.decode(errors="ignore").encode()
            self._finish(end)
        self._closer = asyncio.create_task(self._shut(), name=f"link closer {self.peer}")

    async def _shut(self) -> None:
        """The reader goes on until the peer's goodbye: a socket closed over unread bytes would reset the connection and
        take our last messages with it. Nothing here cancels a send, which would break aiohttp's shared drain."""
        await asyncio.wait({self._reader, self._writer}, timeout=CLOSE_S)
        self._transport.abort()
        _, pending = await asyncio.wait({self._reader, self._writer}, timeout=ABORT_S)
        for task in pending:
            task.cancel()
        if self._session is not None:
            await self._session.close()
        if not pending:
            self._let_go()

    def _let_go(self) -> None:
        """Break the reference cycles that a closed connection lies in, or 300 KB of TLS stay until Python looks for
        such cycles, and that is seldom."""
        if (error := self._websocket.exception()) is not None:
            release_frames(error)
        self._transport.close()  # of one that is closed already: asyncio's transport leaves its protocol
        # aiohttp gives no public way to end what it began for its heartbeats.
        self._protocol._data_received_cb = None

    async def _write(self) -> None:
        num_asked = 0
        try:
            while True:
                while self._outgoing and (self._end is None or self._goodbye is not None):
                    header, tail = self._outgoing.popleft()
                    await self._websocket.send_bytes(header)
                    self.num_sent_bytes += len(header) + (len(tail) if tail is not None else 0)
                    for start in range(0, len(tail) if tail is not None else 0, FRAGMENT_BYTES):
                        assert tail is not None
                        # aiohttp masks a copy or hands the view on, so it takes any buffer although it names bytes.
                        await self._websocket.send_bytes(tail[start : start + FRAGMENT_BYTES])  # type: ignore[arg-type]
                if self._end is not None:
                    break
                if num_asked < self._num_asked:
                    num_asked = self._num_asked
                    await self._websocket.ping(num_asked.to_bytes(8, "big"))
                    continue
                self._to_send.clear()
                await self._to_send.wait()
            if self._goodbye is not None:
                await self._websocket.send_frame(self._goodbye, WSMsgType.CLOSE)
        except (OSError, aiohttp.ClientError) as cause:
            self._lose(LinkLostError(f"peer {self.peer}: the {self.purpose} link broke ({system_words(cause)})"))
        except Exception as cause:  # a bug; a link that nobody writes to must not stay open
            _log.exception("peer %s: its link cannot be written to", self.peer)
            self._lose(LinkLostError(f"peer {self.peer}: the {self.purpose} link broke ({_described(cause)})"))

    async def _read(self) -> None:
        try:
            await self._read_messages()
        except Exception as cause:  # whatever was sent: a link that nobody reads must not stay open
            _log.exception("peer %s: what it has sent cannot be read", self.peer)
            self._start_closing(ProtocolError(f"peer {self.peer}: its message cannot be read ({_described(cause)})"))
        finally:
            ALL_LINKS.drop(self)

    async def _read_messages(self) -> None:
        header: bytes | None = None
        tail, filled = np.empty(0, np.uint8), 0
        while (frame := await self._next_frame()) is not None:
            if self._end is not None:
                continue  # what comes between our goodbye and the peer's
            try:
                if header is None:
                    header, filled = frame, 0
                    tail = _aligned_buffer(codec.num_tail_bytes(header))
                elif not frame or filled + len(frame) > len(tail):
                    raise ProtocolError(
                        f"a fragment of {len(frame)} bytes came where at most {len(tail) - filled} were expected"
                    )
                else:
                    tail[filled : filled + len(frame)] = np.frombuffer(frame, np.uint8)
                    filled += len(frame)
                ALL_LINKS.add(self, len(frame))
                if filled == len(tail) and self._end is None:
                    message = self._checked(codec.decode(header, tail.data if len(tail) else None))
                    num_bytes = len(header) + filled
                    self.num_received_bytes += num_bytes
                    header, tail, filled = None, np.empty(0, np.uint8), 0
                    await self._deliver(message, num_bytes)
            except ProtocolError as cause:
                self._start_closing(ProtocolError(f"peer {self.peer}: {cause}"))

    async def _next_frame(self) -> bytes | None:
        """The next binary message, or None when there will be no more. Questions whether we are there are answered."""
        message: aiohttp.WSMessage = await self._websocket.receive()
        while message.type in (WSMsgType.PING, WSMsgType.PONG):
            if message.type is WSMsgType.PING:
                try:
                    await self._websocket.pong(message.data)
                except (OSError, aiohttp.ClientError) as error:  # the answer cannot leave any more
                    self._lose(LinkLostError(f"peer {self.peer}: the {self.purpose} link was lost ({error})"))
                    return None
            elif message.data:  # those of a heartbeat are empty
                self._num_answered = int.from_bytes(message.data, "big")
                self._answered.set()
            message = await self._websocket.receive()
        if message.type is WSMsgType.BINARY:
            return bytes(message.data)
        if message.type is WSMsgType.TEXT:
            self._start_closing(ProtocolError(f"peer {self.peer}: a text message; links carry binary ones"))
            return b""
        if message.type is WSMsgType.CLOSE:
            self._is_clean = self._is_clean or (self._end is None and message.data == CloseCode.DONE)
            text = f"peer {self.peer} closed the link" + (f": {plain_text(message.extra)}" if message.extra else "")
            self._lose(OtherVersionError(text) if message.data == CloseCode.OTHER_VERSION else LinkLostError(text))
            return None
        cause = message.data if message.type is WSMsgType.ERROR else self._websocket.exception()
        if isinstance(cause, aiohttp.WebSocketError):
            self._lose(ProtocolError(f"peer {self.peer}: {cause} (limit of a frame: {MAX_FRAME_BYTES} bytes)"))
        else:
            self._lose(
                LinkLostError(f"peer {self.peer}: the {self.purpose} link was lost ({cause or 'connection ended'})")
            )
        return None

    def _checked(self, message: wire.Message) -> wire.Message:
        if isinstance(message, wire.ChunkMessage):
            if self.purpose != wire.DATA:
                raise ProtocolError("a chunk on a control link")
            if message.number != self._next_number:
                raise ProtocolError(f"chunk {message.number} came where {self._next_number} was expected")
            self._next_number += 1
        return message

    async def _deliver(self, message: wire.Message, num_bytes: int) -> None:
        while self._is_full and self._end is None:
            self._room.clear()
            await self._room.wait()
        self._incoming.append((message, num_bytes))
        self._num_queued_bytes += num_bytes
        self._arrived.set()

    @property
    def _is_full(self) -> bool:
        limit = RECEIVE_QUEUE_MESSAGES[self.purpose]
        return len(self._incoming) >= limit or self._num_queued_bytes >= RECEIVE_QUEUE_BYTES


def _set_up(connection: socket.socket, purpose: str) -> None:
    """Choose what the system does with a link's socket. Systems other than Linux lack some of these options."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if purpose == wire.CONTROL:
        options = {"TCP_NOTSENT_LOWAT": UNSENT_BYTES}
    else:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options = {"TCP_USER_TIMEOUT": UNTAKEN_MS, "TCP_KEEPIDLE": IDLE_S, "TCP_KEEPINTVL": IDLE_S}
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _described(cause: Exception) -> str:
    """An error that nobody foresaw, for a text that the peer may get."""
    return plain_text(f"{type(cause).__name__}: {cause}"[:MAX_REASON_BYTES])


def _aligned_buffer(num_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An uninitialised buffer whose first byte lies on a multiple of TAIL_ALIGNMENT_BYTES."""
    room = np.empty(num_bytes + TAIL_ALIGNMENT_BYTES, np.uint8)  # [bytes]
    offset = -room.ctypes.data % TAIL_ALIGNMENT_BYTES
    return room[offset : offset + num_bytes]
