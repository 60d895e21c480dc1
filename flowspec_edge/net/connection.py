"""A link: one WebSocket, the same class at either end. ``link.py`` opens and accepts them.

A message is one binary frame with its header; the tail of a chunk follows in further ones (``outbox.py``), which the
receiver puts together in one buffer (``assembly.py``). aiohttp makes the handshake; from then on the transport is the
link's own: what is sent goes to it at once where it takes anything, and what comes is read in the turn of the loop in
which it comes. No task and no queue lies between.

Between two nodes there are two kinds of link: control (small messages both ways, with a heartbeat) and data (chunks
forwards, credits backwards). A heartbeat behind a large chunk on a slow wire raises false alarms, so on data links the
system watches that bytes are taken.

A link is used once. It ends by ``close`` here, by the peer, by a cut, or by a broken rule; the first of these is the
error that ``receive`` and ``send`` raise from then on. Reconnecting lives outside.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

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
from flowspec_edge.net.assembly import Assembly
from flowspec_edge.net.close_codes import CloseCode, close_code_of
from flowspec_edge.net.frames import FrameReader, Opcode
from flowspec_edge.net.heartbeat import LATE_S, Heartbeat
from flowspec_edge.net.held_bytes import ALL_LINKS
from flowspec_edge.net.outbox import Outbox
from flowspec_edge.net.sent_packets import Packets, SentPackets
from flowspec_edge.net.standstill import MAX_STILL_S

UNSENT_BYTES = 131072
"""What the system may hold of a link beyond what is on the wire. Heartbeats pass between the pieces of tapped rows, but
not what the system has taken: on 10 Mbit/s with its usual megabytes a link was lost after 3 s, with this it carried 24
MB in 21 s (x86, Linux 6, tbf). And rows of a chunk can die as long as it is here."""
UNTAKEN_MS = 1300
"""A data link of which the peer's system has taken nothing for so long is lost, and with it the way to that peer: 0.2 s
later, after TCP's first repetition. Whether the peer itself still works is what its control link tells."""
IDLE_S = 1
"""A data link on which nothing came for so long is probed by the system, and lost when the second probe is due."""
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
"""For an aborted transport to say that it has ended; it takes one turn of the loop."""
STILL_BYTES = 2
"""Of the answer to no question that tells for how many milliseconds the peer may stand still."""
MAX_REASON_BYTES = 120
"""A WebSocket close frame holds 123 bytes of text (RFC 6455, 5.5)."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def _tell_nobody(has_room: bool) -> None:
    """Nobody sends what could wait."""


class Link(asyncio.BufferedProtocol):
    """One connection to a peer, over a transport whose handshake is made by ``is_client``'s side. Made by ``open_link``
    and ``LinkServer``.

    ``let_go`` ends what has made the handshake, once the connection has ended.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        purpose: str,
        peer: str,
        *,
        is_client: bool,
        heartbeat: tuple[float, float] | None = None,
        hello: wire.Hello | None = None,
        let_go: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.peer, self.purpose = peer, purpose
        self._hello, self._let_go = hello, let_go
        self._outbox = Outbox(transport, is_client=is_client)
        self._frames = FrameReader()
        self._is_held_back = False  # the peer: nobody takes its messages
        self._assembly = Assembly(purpose)
        self._incoming: deque[tuple[wire.Message, int]] = deque()  # with the bytes that each was
        self._num_queued_bytes = self.num_sent_bytes = self.num_received_bytes = 0
        self._arrived = asyncio.Event()
        self._deliver_to: tuple[Callable[[wire.Message], None], asyncio.Future[None]] | None = None
        self._has_room = True
        self._tell_room: Callable[[bool], None] = _tell_nobody
        self._num_asked = self._num_answered = 0
        self._vouched_at = float("-inf")
        self._answered = asyncio.Event()
        self._end: FlowspecError | None = None
        self._is_clean, self._gone = False, asyncio.Event()  # the connection
        self._closer: asyncio.Task[None] | None = None
        self.local_host = str(transport.get_extra_info("sockname")[0])
        """The address by which the peer at the other end knows this machine."""
        self.peer_host = str(transport.get_extra_info("peername")[0])
        """The address that the peer connects from, or answers at."""
        self._socket = transport.get_extra_info("socket")
        _set_up(self._socket, purpose)
        self._sent_packets = SentPackets(self._socket)
        self._transport = transport
        self._before: asyncio.BaseProtocol | None = transport.get_protocol()
        transport.set_protocol(self)
        self._heartbeat = Heartbeat(*heartbeat, self._ask_peer, self._lose_silent) if heartbeat else None

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
        """Hand a message to the system, or queue it where that takes nothing now; never waits. The array of a chunk
        must not be changed afterwards.

        Raises:
            LinkLostError: the link has ended, or the peer took nothing for so long that the queue is full.
            ProtocolError: the link ended because the peer broke the rules.
        """
        if self._end is not None:
            raise self._end.again()
        limit = SEND_QUEUE_MESSAGES[self.purpose]
        if len(self._outbox) >= limit:
            full = LinkLostError(
                f"peer {self.peer}: {limit} messages wait on the {self.purpose} link, the limit (SEND_QUEUE_MESSAGES); "
                "the peer has stopped reading"
            )
            self._lose(full)
            raise full.again()
        header, tail = codec.encode(message)
        self.num_sent_bytes += len(header) + (len(tail) if tail is not None else 0)
        self._write(self._outbox.put, Opcode.BINARY, header, tail)

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
        message, num_bytes = self._incoming.popleft()
        self._num_queued_bytes -= num_bytes
        ALL_LINKS.release(self, num_bytes)
        if self._is_held_back and not self._is_full:
            self._go_on_reading()
        return message

    async def deliver(
        self, take: Callable[[wire.Message], None], tell_room: Callable[[bool], None] = _tell_nobody
    ) -> None:
        """Hand each message to ``take`` in the turn of the loop in which its last byte comes. Never returns.

        ``tell_room`` is told False where what is sent next would wait here, as a chunk does that is longer than what
        the system takes, and True once the system takes it.

        Raises:
            LinkLostError, ProtocolError, OtherVersionError: the link has ended, as ``receive`` tells it.
            Exception: what ``take`` or ``tell_room`` has raised.
        """
        while self._incoming:
            take(await self.receive())
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deliver_to, self._tell_room = (take, ended), tell_room
        try:
            if self._end is not None:
                raise self._end.again()
            await ended
        finally:
            self._deliver_to, self._tell_room = None, _tell_nobody
            if ended.done() and not ended.cancelled():
                ended.exception()  # where this task was cancelled in the same turn, nobody else asks for it

    async def answers(self, within_s: float) -> bool:
        """Whether the peer answers a question that it is asked now, behind what waits to be sent, or is vouched for in
        the second half of that time, or has told that it stands still.
        """
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
                    if self._heartbeat is not None and self._heartbeat.is_excused:
                        return True
                    return self._vouched_at > deadline - within_s / 2
                deadline = loop.time() + LATE_S  # this process stood still, and the answer may be there
        return self._end is None

    def vouch(self) -> None:
        """The peer is known to be there and to be reached, though an answer of its may be held up: as where weights
        come to it over a slow wire, behind which questions wait. That it tells something is not enough, for of a wire
        that is broken one way it hears nothing.
        """
        self._vouched_at = asyncio.get_running_loop().time()

    def probe(self) -> None:
        """Ask the peer for an answer for which nobody waits: a packet either way, behind what waits to be sent."""
        self._num_asked += 1
        self._write(self._outbox.put, Opcode.PING, self._num_asked.to_bytes(8, "big"))

    def tell_still(self, seconds: float) -> None:
        """Tell the peer that it may hear nothing for so long from now on; 0: that this is over. It never fails."""
        if self._end is None:
            still_ms = round(1000 * seconds)
            self._write(self._outbox.put_now, Opcode.PONG, still_ms.to_bytes(STILL_BYTES, "big"))

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
        await self._gone.wait()

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

    # ------------------------------------------------------------------ the end

    def _finish(self, end: FlowspecError) -> None:
        """The first end counts; everyone who waits sees it."""
        if self._end is None and isinstance(end, LinkLostError) and self.purpose == wire.DATA:
            end.neighbour = self.peer
        self._end = self._end or end
        for event in (self._arrived, self._answered):
            event.set()
        if self._deliver_to is not None:
            self._stop_delivering(self._end.again())

    def _lose(self, end: FlowspecError) -> None:
        self._finish(end)
        # Not at once: asyncio's TLS breaks where it is aborted while it hands on what it has read behind the end.
        asyncio.get_running_loop().call_soon(self._abort_transport)

    def _lose_silent(self, why: str) -> None:
        self._lose(LinkLostError(f"peer {self.peer}: the {self.purpose} link was lost ({why})"))

    def _start_closing(self, end: FlowspecError) -> None:
        if self._closer is not None:
            return
        if self._end is None:
            code = close_code_of(end)
            self._is_clean = code is CloseCode.DONE
            reason = b"" if self._is_clean else str(end).encode()[:MAX_REASON_BYTES]
            said = code.to_bytes(2, "big") + reason.decode(errors="ignore").encode()
            self._finish(end)
            self._write(self._outbox.put_last, Opcode.CLOSE, said)
            if self._is_held_back:
                self._go_on_reading()
        self._closer = asyncio.create_task(self._shut(), name=f"link closer {self.peer}")

    def _abort_transport(self) -> None:
        if not self._gone.is_set():  # the TLS of Debian 12's Python, 3.11.2, breaks where it is aborted behind its end
            self._transport.abort()

    async def _shut(self) -> None:
        """The link reads on until the peer's goodbye: a socket closed over unread bytes would reset the connection and
        take our last messages with it."""
        for limit_s in (CLOSE_S, ABORT_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await self._gone.wait()
            self._abort_transport()
        if self._gone.is_set():
            self._transport.close()  # of one that is closed already: asyncio's transport leaves its protocol
        if self._let_go is not None:
            await self._let_go()

    def connection_lost(self, exc: Exception | None) -> None:
        why = "connection ended" if exc is None else system_words(exc) if isinstance(exc, OSError) else _described(exc)
        self._finish(LinkLostError(f"peer {self.peer}: the {self.purpose} link was lost ({why})"))
        if self._heartbeat is not None:
            self._heartbeat.stop()
        ALL_LINKS.drop(self)
        self._outbox.clear()
        self._gone.set()
        before, self._before = self._before, None
        if before is not None:
            before.connection_lost(exc)

    # ------------------------------------------------------------------ writing

    def _write(self, write: Callable[..., None], *arguments: object) -> None:
        try:
            write(*arguments)
        except Exception as cause:  # a bug; a link that nobody writes to must not stay open
            _log.exception("peer %s: its link cannot be written to", self.peer)
            self._lose(LinkLostError(f"peer {self.peer}: the {self.purpose} link broke ({_described(cause)})"))

    def _ask_peer(self) -> None:
        self._outbox.put_now(Opcode.PING, b"")

    def pause_writing(self) -> None:
        self._outbox.is_paused = True
        self._note_room()

    def resume_writing(self) -> None:
        self._outbox.is_paused = False
        self._write(self._outbox.flush)
        self._note_room()

    def _note_room(self) -> None:
        """The transport may have been paused again by what waited."""
        if self._has_room is self._outbox.is_paused:
            self._has_room = not self._has_room
            self._deliver(self._has_room, self._tell_room)

    # ------------------------------------------------------------------ reading

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._frames.room()

    def buffer_updated(self, nbytes: int) -> None:
        self._frames.fill(nbytes)
        if self._heartbeat is not None:
            self._heartbeat.hear()
        self._read()

    def _read(self) -> None:
        """Take the frames that are here, until nobody takes the messages any more."""
        try:
            while not (self._is_held_back or self._transport.is_closing()) and (frame := self._frames.take()):
                self._take(*frame)
                if self._is_full and self._end is None:
                    self._is_held_back = True
                    self._transport.pause_reading()
        except ProtocolError as cause:
            self._refuse(cause)

    def _refuse(self, cause: ProtocolError) -> None:
        self._start_closing(ProtocolError(f"peer {self.peer}: {cause}"))

    def _go_on_reading(self) -> None:
        self._is_held_back = False
        self._read()
        if not (self._is_held_back or self._transport.is_closing()):
            self._transport.resume_reading()

    def _take(self, opcode: Opcode, payload: memoryview) -> None:
        match opcode:
            case Opcode.CLOSE:
                self._take_goodbye(int.from_bytes(payload[:2], "big"), bytes(payload[2:]))
            case Opcode.PING:
                if not self._outbox.is_paused:  # whoever asks and takes no answers gets none
                    self._outbox.put_now(Opcode.PONG, bytes(payload))
            case Opcode.PONG:
                if len(payload) == STILL_BYTES:
                    self._excuse(min(int.from_bytes(payload, "big") / 1000, MAX_STILL_S))
                elif payload:  # those of a heartbeat are empty
                    self._num_answered = int.from_bytes(payload, "big")
                    self._answered.set()
            case _ if self._end is not None:
                pass  # what comes between our goodbye and the peer's
            case Opcode.TEXT:
                self._refuse(ProtocolError("a text message; links carry binary ones"))
            case _:
                self._take_part(payload)

    def _excuse(self, seconds: float) -> None:
        """The peer stands still for so long at most: it says nothing, and its system takes what it has room for."""
        if self._heartbeat is not None:
            self._heartbeat.excuse(seconds)
        elif self.purpose == wire.DATA and self._end is None:
            _set_options(self._socket, {"TCP_USER_TIMEOUT": UNTAKEN_MS + round(1000 * seconds)})

    def _take_goodbye(self, code: int, reason: bytes) -> None:
        self._is_clean = self._is_clean or (self._end is None and code == CloseCode.DONE)
        said = plain_text(reason.decode(errors="replace"))
        text = f"peer {self.peer} closed the link" + (f": {said}" if said else "")
        if self._end is None:  # or ours has been said already
            self._outbox.put_now(Opcode.CLOSE, code.to_bytes(2, "big") if code else b"")
        self._lose(OtherVersionError(text) if code == CloseCode.OTHER_VERSION else LinkLostError(text))

    def _take_part(self, part: memoryview) -> None:
        """A part of a message. Behind one that cannot be read the peer's goodbye may follow, so reading goes on."""
        ALL_LINKS.add(self, len(part))
        try:
            whole = self._assembly.take(part) if self._end is None else None
        except ProtocolError as cause:
            self._refuse(cause)
        except Exception as cause:  # whatever was sent: a link that nobody reads must not stay open
            _log.exception("peer %s: what it has sent cannot be read", self.peer)
            self._refuse(ProtocolError(f"its message cannot be read ({_described(cause)})"))
        else:
            if whole is not None:
                self._hand_out(*whole)

    def _hand_out(self, message: wire.Message, num_bytes: int) -> None:
        self.num_received_bytes += num_bytes
        if self._deliver_to is not None:
            ALL_LINKS.release(self, num_bytes)
            self._deliver(message, self._deliver_to[0])
        else:
            self._incoming.append((message, num_bytes))
            self._num_queued_bytes += num_bytes
            self._arrived.set()

    def _deliver(self, told: _T, take: Callable[[_T], None]) -> None:
        try:
            take(told)
        except Exception as error:
            release_frames(error)
            self._stop_delivering(error)

    def _stop_delivering(self, error: Exception) -> None:
        """What comes from now on waits for whoever receives it."""
        if self._deliver_to is not None:
            (_, ended), self._deliver_to = self._deliver_to, None
            if not ended.done():
                ended.set_exception(error)

    @property
    def _is_full(self) -> bool:
        limit = RECEIVE_QUEUE_MESSAGES[self.purpose]
        return len(self._incoming) >= limit or self._num_queued_bytes >= RECEIVE_QUEUE_BYTES


def _set_up(connection: socket.socket, purpose: str) -> None:
    """Choose what the system does with a link's socket. Systems other than Linux lack some of these options."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    options = {"TCP_NOTSENT_LOWAT": UNSENT_BYTES}
    if purpose == wire.DATA:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        options |= {"TCP_USER_TIMEOUT": UNTAKEN_MS, "TCP_KEEPIDLE": IDLE_S, "TCP_KEEPINTVL": IDLE_S}
    _set_options(connection, options)


def _set_options(connection: socket.socket, options: dict[str, int]) -> None:
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _described(cause: Exception) -> str:
    """An error that nobody foresaw, for a text that the peer may get."""
    return plain_text(f"{type(cause).__name__}: {cause}"[:MAX_REASON_BYTES])
