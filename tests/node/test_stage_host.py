"""A stage at work: what comes over its links is told to its core, and what the core answers is done.

No sockets, no ONNX.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from flowspec_edge.config import RowKind
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.row_kinds import kind_of, narrow, widen
from flowspec_edge.core.rows import NO_PARENT, Chunk, Passage, Row, SessionSpec, SlotMove
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.errors import CacheFullError, FlowspecError, LinkLostError, ProtocolError, StageFailedError
from flowspec_edge.net import packet_counter
from flowspec_edge.net.sent_packets import Packets
from flowspec_edge.node import stage_host
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.stage_host import StageHost, StageLinks
from tests.fake_links import LIMIT_S, FakeLink, fake_pair, settle
from tests.narrowing import instance

HIDDEN = np.arange(4, dtype=np.float32).reshape(1, 4)
ROWS = (Row(0, NO_PARENT, 5),)
PASSAGES = (Passage(4, 0.5, 0.25),)
MAX_CAPACITY = 200


class ScriptedCore(Stage):
    """Notes what it is told, and answers what the test has prepared."""

    def __init__(self) -> None:
        super().__init__(is_last=False)
        self.told: list[ev.StageEvent] = []
        self.answers: list[list[ev.StageAction]] = []

    def handle(self, event: ev.StageEvent, now: float) -> list[ev.StageAction]:
        self.told.append(event)
        return self.answers.pop(0) if self.answers else []


class FakeRunner:
    """Notes what it has to do; its forwards add one to each row."""

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.run_as: Callable[[ev.RunForward, Callable[[], bool]], None] = lambda forward, is_cancelled: None

    def open_cache(self, session: int, capacity: int) -> None:
        self.done.append(("open", session, capacity))

    def free_cache(self, session: int) -> None:
        self.done.append(("free", session))

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None:
        self.done.append(("keep", session, moves))

    def take_over_cache(self, session: int, kept: int) -> bool:
        self.done.append(("take over", session, kept))
        return ("keep", kept, MOVES) in self.done

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished:
        self.run_as(forward, is_cancelled)
        self.done.append(("ran", forward.session, is_cancelled()))
        hidden = HIDDEN if forward.hidden is None else forward.hidden
        return ev.ForwardFinished(hidden + 1, {2: hidden} if forward.is_tapped else {})


class Recorder:
    """In the place of a StageRecorder."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def add(self, num_rows: int, ran_s: float) -> None:
        assert ran_s >= 0
        self.sizes.append(num_rows)


def wait_until(is_cancelled: Callable[[], bool]) -> None:
    """On the thread of a forward; no longer than a test may take."""
    deadline = time.monotonic() + LIMIT_S
    while not is_cancelled() and time.monotonic() < deadline:
        time.sleep(0.001)


class Hosted:
    """A stage host, and the other ends of its links."""

    def __init__(self, core: Stage) -> None:
        self.journal = Journal("stage", {})  # which writes nothing
        self.core, self.runner, self.recorder = core, FakeRunner(), Recorder()
        self.origin, control = fake_pair("origin", "hall")
        self.before, behind = fake_pair("attic", "hall", wire.DATA, "ring-1/1")
        ahead, self.after = fake_pair("hall", "cellar", wire.DATA, "ring-1/2")
        self.links = StageLinks(control, behind, ahead)
        self.energy: wire.EnergyTaken | None = None
        self.row_kind: RowKind = "float32"

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[StageHost]:
        with ThreadPoolExecutor(1) as executor:
            host = StageHost(
                self.core,
                self.journal,
                self.runner,
                self.links,
                Board(),
                executor,
                max_capacity=MAX_CAPACITY,
                row_kind=self.row_kind,
                activity=Activity(),
                recorder=self.recorder,  # type: ignore[arg-type]
                energy=lambda: self.energy,
            )
            async with asyncio.timeout(LIMIT_S), host:
                yield host


def forward_of(session: int, num_rows: int = 1, *, is_tapped: bool = False) -> ev.RunForward:
    rows = tuple(Row(id, id - 1 if id else NO_PARENT, 5) for id in range(num_rows))
    return ev.RunForward(session, rows, None, KvSlots(num_rows).place(rows), is_tapped)


SPEC = SessionSpec(1, 100, False, True, 7)
MOVES = (SlotMove(5, 3, 2),)
IN = [
    ("origin", wire.OpenSession(SPEC), ev.SessionRequested(SPEC)),
    ("origin", wire.AdvanceSession(1, 4, 5), ev.AdvanceArrived(1, 4, 5)),
    ("origin", wire.BeginTurn(1, 3), ev.TurnBegan(1, 3)),
    ("origin", wire.CloseSession(1), ev.SessionEnded(1)),
    ("origin", wire.CloseSession(1, True), ev.SessionEnded(1, is_kept=True)),
    ("after", wire.Credit(2), ev.CreditArrived(2)),
]


@pytest.mark.parametrize(("sender", "message", "event"), IN, ids=[type(message).__name__ for _, message, _ in IN])
async def test_what_comes_is_told_to_the_core(sender: str, message: wire.Message, event: ev.StageEvent) -> None:
    hosted = Hosted(core := ScriptedCore())
    async with hosted.at_work():
        getattr(hosted, sender).send(message)
        await settle()
    assert core.told == [event]


async def test_the_core_is_told_whether_the_link_ahead_takes_chunks() -> None:
    hosted = Hosted(core := ScriptedCore())
    async with hosted.at_work():
        await settle()
        for has_room in (False, True):
            instance(hosted.links.ahead, FakeLink).tell_room(has_room)
    assert core.told == [ev.LinkPaused(), ev.LinkResumed()]


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
async def test_rows_come_and_leave_in_16_bits_and_are_computed_in_32(kind: RowKind) -> None:
    hosted = Hosted(core := ScriptedCore())
    hosted.row_kind = kind
    forward = dataclasses.replace(forward_of(1), hidden=narrow(HIDDEN, kind))
    async with hosted.at_work():
        core.answers = [[forward]]
        hosted.after.send(wire.Credit(1))
        while len(core.told) < 2:
            await asyncio.sleep(0)
    finished = instance(core.told[1], ev.ForwardFinished)
    assert kind_of(finished.hidden) == kind
    np.testing.assert_array_equal(widen(finished.hidden), HIDDEN + 1)


async def test_a_row_beyond_float16_ends_its_session() -> None:
    hosted = Hosted(core := ScriptedCore())
    hosted.row_kind = "float16"
    forward = dataclasses.replace(forward_of(1), hidden=np.full((1, 4), 70000, np.float32))
    async with hosted.at_work():
        core.answers = [[forward]]
        hosted.after.send(wire.Credit(1))
        failure = instance(await hosted.origin.receive(), wire.SessionFailure)
    assert failure.session == 1 and "a value of 70001, which is beyond float16" in failure.reason
    assert ev.SessionEnded(1) in core.told


async def test_what_the_board_takes_is_told_from_the_first_session_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_host, "TELL_ENERGY_S", 0.001)
    hosted = Hosted(ScriptedCore())
    hosted.energy = wire.EnergyTaken("boot", 12.0, 5.0)
    async with hosted.at_work():
        await settle()
        hosted.origin.send(wire.OpenSession(SPEC))
        assert await hosted.origin.receive() == hosted.energy
        hosted.energy = wire.EnergyTaken("boot", 13.0, 5.0)
        while await hosted.origin.receive() != hosted.energy:
            pass


async def test_a_chunk_is_told_as_it_came() -> None:
    hosted = Hosted(core := ScriptedCore())
    chunk = Chunk(3, ROWS, 1, HIDDEN, 2, PASSAGES)
    async with hosted.at_work():
        hosted.before.send(wire.ChunkMessage(0, chunk))
        await settle()
    (told,) = core.told
    assert isinstance(told, ev.ChunkArrived) and told.chunk is chunk


OUT = [
    ([ev.OpenCache(1, 100)], "origin", [wire.SessionOpened(1)], [("open", 1, 100)]),
    ([ev.FreeCache(1)], "origin", [], [("free", 1)]),
    ([ev.GrantCredit(2)], "before", [wire.Credit(2)], []),
]


@pytest.mark.parametrize(
    ("actions", "receiver", "messages", "done"), OUT, ids=["OpenCache", "FreeCache", "GrantCredit"]
)
async def test_what_the_core_answers_is_done(
    actions: list[ev.StageAction], receiver: str, messages: list[wire.Message], done: list[object]
) -> None:
    hosted = Hosted(core := ScriptedCore())
    core.answers = [actions]
    async with hosted.at_work():
        hosted.after.send(wire.Credit(1))
        await settle()
        assert hosted.runner.done == done
        for name in ("origin", "before", "after"):
            assert getattr(hosted, name).received() == (messages if name == receiver else [])


async def test_chunks_and_tapped_rows_leave_as_they_are_and_chunks_are_numbered() -> None:
    hosted = Hosted(core := ScriptedCore())
    chunks = [Chunk(session, ROWS, 1, HIDDEN, 4, PASSAGES) for session in (8, 9)]
    core.answers = [[*(ev.SendChunk(chunk) for chunk in chunks), ev.SendTapped(8, 2, (0,), HIDDEN)]]
    async with hosted.at_work():
        hosted.after.send(wire.Credit(1))
        sent = [await hosted.after.receive() for _ in chunks]
        tapped = await hosted.origin.receive()
    for number, (message, chunk) in enumerate(zip(sent, chunks, strict=True)):
        assert isinstance(message, wire.ChunkMessage)
        assert message.number == number and message.chunk is chunk
    assert isinstance(tapped, wire.TappedRows)
    assert (tapped.session, tapped.layer, tapped.ids) == (8, 2, (0,)) and tapped.hidden is HIDDEN


async def test_what_its_data_links_lose_is_told_to_the_origin_once_there_is_a_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packet_counter, "COUNT_S", 0.0)
    hosted = Hosted(ScriptedCore())
    links = hosted.links.ahead, hosted.links.behind
    links[0].packets, links[1].packets = Packets(100, 3), Packets(20, 1)  # type: ignore[attr-defined]
    async with hosted.at_work():
        await settle()
        assert hosted.origin.received() == [], "the ring may still open, and expects something else"
        hosted.origin.send(wire.OpenSession(SPEC))
        assert await hosted.origin.receive() == wire.PacketsSent(100, 3, 20, 1)
        await settle()
        assert hosted.origin.received() == [], "nothing was sent since"
        assert links[1].num_probes > 0  # type: ignore[attr-defined]


async def test_forwards_run_one_after_another_and_are_told_as_they_end() -> None:
    hosted = Hosted(core := ScriptedCore())
    core.answers = [[forward_of(1, 3, is_tapped=True), forward_of(2)], [], [ev.GrantCredit(1)]]
    async with hosted.at_work():
        hosted.after.send(wire.Credit(1))
        await hosted.before.receive()
    assert hosted.runner.done == [("ran", 1, False), ("ran", 2, False)]
    first, second = core.told[1:]
    assert isinstance(first, ev.ForwardFinished) and isinstance(second, ev.ForwardFinished)
    np.testing.assert_array_equal(first.hidden, HIDDEN + 1)
    assert list(first.tapped) == [2] and not second.tapped
    assert hosted.recorder.sizes == [3, 1]


async def test_a_cancel_is_meant_for_the_newest_forward_and_what_was_given_up_is_not_recorded() -> None:
    hosted = Hosted(core := ScriptedCore())
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_cancel(forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> None:
        if forward.session == 1:
            loop.call_soon_threadsafe(began.set)
            wait_until(is_cancelled)

    hosted.runner.run_as = wait_for_cancel
    core.answers = [[forward_of(1)], [ev.CancelForward(1), forward_of(2)], [], [ev.GrantCredit(1)]]
    async with hosted.at_work():
        hosted.after.send(wire.Credit(1))
        await began.wait()
        hosted.after.send(wire.Credit(1))
        await hosted.before.receive()
    assert hosted.runner.done == [("ran", 1, True), ("ran", 2, False)]
    assert hosted.recorder.sizes == [1]


async def test_whoever_leaves_the_context_gives_up_what_runs() -> None:
    hosted = Hosted(core := ScriptedCore())
    cancelled, began = threading.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def wait_for_cancel(forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> None:
        loop.call_soon_threadsafe(began.set)
        wait_until(is_cancelled)
        if is_cancelled():
            cancelled.set()

    hosted.runner.run_as = wait_for_cancel
    core.answers = [[forward_of(1)]]
    async with hosted.at_work():
        hosted.after.send(wire.Credit(1))
        await began.wait()
    assert cancelled.is_set()
    hosted.after.send(wire.Credit(1))
    await settle()
    assert core.told == [ev.CreditArrived(1)], "nobody reads any more"


WRONG: list[tuple[str, wire.Message, str]] = [
    (
        "origin",
        wire.OpenSession(SessionSpec(1, MAX_CAPACITY + 1)),
        "peer origin: a session of 201 rows exceeds the 200 that this model can use",
    ),
    ("origin", wire.Credit(1), "peer origin: Credit came on a control link"),
    ("before", wire.Credit(1), "peer attic: Credit came where a chunk was expected"),
    ("after", wire.CloseSession(1), "peer cellar: CloseSession came where Credit was expected"),
]


@pytest.mark.parametrize(("sender", "message", "said"), WRONG)
async def test_what_does_not_belong_on_a_link_ends_the_stage(sender: str, message: wire.Message, said: str) -> None:
    hosted = Hosted(core := ScriptedCore())
    async with hosted.at_work() as host:
        getattr(hosted, sender).send(message)
        with pytest.raises(ProtocolError) as ended:
            await host.wait_ended()
    assert str(ended.value) == said and not core.told


async def test_the_largest_session_is_served() -> None:
    hosted = Hosted(Stage(is_last=True))
    async with hosted.at_work():
        hosted.origin.send(wire.OpenSession(SessionSpec(1, MAX_CAPACITY)))
        assert await hosted.origin.receive() == wire.SessionOpened(1)


async def test_the_origin_ends_it_in_order_by_closing_the_control_link() -> None:
    hosted = Hosted(ScriptedCore())
    async with hosted.at_work() as host:
        await hosted.origin.close()
        await host.wait_ended()


@pytest.mark.parametrize("lost", ["origin", "before", "after"])
async def test_a_lost_link_ends_it(lost: str) -> None:
    hosted = Hosted(ScriptedCore())
    async with hosted.at_work() as host:
        link: FakeLink = getattr(hosted, lost)
        link.cut()
        with pytest.raises(LinkLostError, match="was lost"):
            await host.wait_ended()


@pytest.mark.parametrize("error", [StageFailedError("out of memory"), ProtocolError("a chunk without credit")])
async def test_what_a_forward_or_the_core_cannot_do_ends_it(error: FlowspecError) -> None:
    hosted = Hosted(core := ScriptedCore())

    def fail(forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> None:
        raise error

    hosted.runner.run_as = fail
    core.answers = [[forward_of(1)]]
    async with hosted.at_work() as host:
        hosted.after.send(wire.Credit(1))
        with pytest.raises(type(error), match=str(error)):
            await host.wait_ended()


async def test_a_cache_that_cannot_grow_ends_its_session_alone() -> None:
    hosted = Hosted(Stage(is_last=False))

    def fail(forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> None:
        if forward.session == 1:
            raise CacheFullError("no memory for a KV cache of 256 slots")

    hosted.runner.run_as = fail
    async with hosted.at_work():
        for session in (1, 2):
            hosted.origin.send(wire.OpenSession(SessionSpec(session, 100)))
            assert await hosted.origin.receive() == wire.SessionOpened(session)
        for number, session in enumerate((1, 1, 2)):
            rows = ROWS if not number else (Row(9, ROWS[-1].id, 5),)
            rows = ROWS if session == 2 else rows
            hosted.before.send(wire.ChunkMessage(number, Chunk(session, rows, 1, HIDDEN[: len(rows)])))
        assert await hosted.origin.receive() == wire.SessionFailure(1, "no memory for a KV cache of 256 slots")
        message = await hosted.after.receive()
        assert isinstance(message, wire.ChunkMessage) and message.chunk.session == 2
        assert [await hosted.before.receive() for _ in range(3)] == [wire.Credit(1)] * 3
    assert ("free", 1) in hosted.runner.done


async def test_a_chunk_passes_a_real_core_from_link_to_link() -> None:
    hosted = Hosted(Stage(is_last=False))
    async with hosted.at_work():
        hosted.origin.send(wire.OpenSession(SessionSpec(1, 100)))
        assert await hosted.origin.receive() == wire.SessionOpened(1)
        hosted.before.send(wire.ChunkMessage(0, Chunk(1, ROWS, 1, HIDDEN, passages=PASSAGES)))
        message = await hosted.after.receive()
        assert isinstance(message, wire.ChunkMessage) and message.chunk.hidden is not None
        chunk = message.chunk
        np.testing.assert_array_equal(chunk.hidden, HIDDEN + 1)
        assert (message.number, chunk.rows, chunk.passages[0]) == (0, ROWS, PASSAGES[0])
        assert chunk.passages[1].num_rows == 1
        assert await hosted.before.receive() == wire.Credit(1)
        hosted.origin.send(wire.CloseSession(1))
        await settle()
    assert hosted.runner.done == [("open", 1, 100), ("ran", 1, False), ("free", 1)]


async def test_a_cache_is_kept_and_taken_over_behind_the_forward_that_runs() -> None:
    hosted = Hosted(core := ScriptedCore())
    core.answers = [[forward_of(1), ev.KeepCache(1, MOVES), ev.OpenCache(2, 100, 1, 5), ev.OpenCache(3, 100, 9, 5)]]
    async with hosted.at_work():
        hosted.after.send(wire.Credit(1))
        opened = [await hosted.origin.receive() for _ in range(2)]
    assert opened == [wire.SessionOpened(2, 5), wire.SessionOpened(3, 0)]
    assert [done for done in hosted.runner.done if done[0] != "open"] == [
        ("ran", 1, False),
        ("keep", 1, MOVES),
        ("take over", 2, 1),
        ("take over", 3, 9),
    ]
