"""A ring as its origin sees it: what comes is told to the core, what the core answers is done; and its timer.

No sockets, no ONNX.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.device import energy_shares
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning.packet_loss import Lossy, PacketLoss
from flowspec_edge.core.planning.placement import StagePlan
from flowspec_edge.core.row_kinds import narrow
from flowspec_edge.core.rows import NO_PARENT, Chunk, Passage, Row, SessionSpec
from flowspec_edge.core.speculation.generation import TargetLimits
from flowspec_edge.core.speculation.origin import Origin
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import RingLostError, StageFailedError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.sent_packets import Packets
from flowspec_edge.node.pacing import Board
from flowspec_edge.origin import blame
from flowspec_edge.origin import ring as rings
from flowspec_edge.origin.ring import Ring, RingLinks, RingStage
from tests.fake_links import LIMIT_S, FakeLink, fake_pair, settle
from tests.narrowing import instance, present

ROWS = (Row(0, NO_PARENT, 5),)
HIDDEN = np.arange(4, dtype=np.float32).reshape(1, 4)
PASSAGES = (Passage(4, 0.5, 0.25),)
OPTIONS = GenerateOptions(max_new_tokens=4)


class ScriptedCore(Origin):
    """Notes what it is told, answers what the test has prepared, and has the deadline that it sets."""

    def __init__(self) -> None:
        super().__init__(num_stages=2, limits=TargetLimits(64, 16, frozenset()), has_drafter=True)
        self.deadline: float | None = None
        self.told: asyncio.Queue[tuple[ev.OriginEvent, float]] = asyncio.Queue()
        self.answers: list[list[ev.OriginAction]] = []

    def handle(self, event: ev.OriginEvent, now: float) -> list[ev.OriginAction]:
        self.told.put_nowait((event, now))
        return self.answers.pop(0) if self.answers else []

    def next_deadline(self) -> float | None:
        return self.deadline

    def statistics(self, session: int) -> GenerationStatistics:
        return GenerationStatistics()

    async def next_told(self) -> ev.OriginEvent:
        return (await self.told.get())[0]


class FakeEngine:
    """In the place of an OriginEngine; its drafter is itself."""

    def __init__(self) -> None:
        self.drafter, self.done = self, list[tuple[Any, ...]]()
        self.tokenizer = Tokenizer(DEMO_BUNDLE / "tokenizer.json")

    def open(self, session: int, capacity: int) -> None:
        self.done.append(("open", session, capacity))

    def close(self, session: int) -> None:
        self.done.append(("close", session))

    def keep(self, session: int, taken: Sequence[int]) -> None:
        self.done.append(("keep", session, taken))

    def take_over(self, session: int, kept: int, num_rows: int) -> None:
        self.done.append(("take over", session, kept, num_rows))

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        self.done.append(("run", job.session))
        if isinstance(job, ev.RunHead):
            return ev.HeadFinished((5,))
        return ev.DraftFinished(np.zeros((1, 4), np.int64), np.zeros((1, 4), np.float32))


def announcement_of(name: str) -> Announcement:
    return Announcement(node=name, host="192.0.2.9", port=7361, cluster="test", version="0.1.0", fingerprint="")


class Opened:
    """A ring of two stages, and the other ends of its links."""

    def __init__(self) -> None:
        self.core, self.engine = ScriptedCore(), FakeEngine()
        pairs = [fake_pair("origin", name) for name in ("attic", "hall")]
        self.controls = [far for _, far in pairs]
        ahead, self.first = fake_pair("origin", "attic", wire.DATA, "ring-1/0")
        self.last, behind = fake_pair("hall", "origin", wire.DATA, "ring-1/2")
        self.links = RingLinks([near for near, _ in pairs], ahead, behind)
        self.lossy: list[Lossy] = []
        self.stages = [
            RingStage(StagePlan(name, start, start + 4, 0), announcement_of(name), load_ms=0)
            for name, start in (("attic", 0), ("hall", 4))
        ]

    def tell(self, actions: list[ev.OriginAction]) -> None:
        """The core answers these to the next event, which comes at once."""
        self.core.answers = [actions]
        self.first.send(wire.Credit(1))


@pytest.fixture
async def opened() -> AsyncIterator[tuple[Opened, Ring]]:
    parts = Opened()
    engine: Any = parts.engine
    journal = Journal("origin", {})
    ring = Ring(parts.core, journal, engine, parts.stages, parts.links, Board(), on_lossy=parts.lossy.append)
    async with asyncio.timeout(LIMIT_S), ring:
        yield parts, ring


IN = [
    ("first", wire.Credit(2), ev.CreditArrived(2)),
    ("control", wire.SessionOpened(3), ev.StageReady(3, 1)),
    ("control", wire.SessionOpened(3, 7), ev.StageReady(3, 1, 7)),
]


@pytest.mark.parametrize(("sender", "message", "event"), IN)
async def test_what_comes_is_told_to_the_core(
    opened: tuple[Opened, Ring], sender: str, message: wire.Message, event: ev.OriginEvent
) -> None:
    parts, _ = opened
    (parts.controls[1] if sender == "control" else parts.first).send(message)
    assert await parts.core.next_told() == event


async def test_rows_that_come_are_told_with_all_that_belongs_to_them(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    chunk = Chunk(3, ROWS, 1, HIDDEN, 2, PASSAGES)
    parts.last.send(wire.ChunkMessage(0, chunk))
    returned = await parts.core.next_told()
    assert isinstance(returned, ev.ChunkReturned) and returned.chunk is chunk
    parts.controls[0].send(wire.TappedRows(3, 2, (0,), HIDDEN))
    tapped = await parts.core.next_told()
    assert isinstance(tapped, ev.TappedArrived) and tapped.hidden is HIDDEN
    assert (tapped.session, tapped.layer, tapped.ids) == (3, 2, (0,))


SPEC = SessionSpec(1, 100, False, True, 7)
BROADCAST: list[tuple[ev.OriginAction, wire.Message, list[tuple[Any, ...]]]] = [
    (ev.OpenSessions(SPEC), wire.OpenSession(SPEC), [("open", 1, 100)]),
    (ev.BroadcastAdvance(1, 4, 5), wire.AdvanceSession(1, 4, 5), []),
    (ev.BroadcastTurn(1, 3), wire.BeginTurn(1, 3), []),
    (ev.CloseSessions(1), wire.CloseSession(1), [("close", 1)]),
]
TAKEN_OVER = SessionSpec(2, 100, num_prompt=9, kept=1, num_kept=7)


@pytest.mark.parametrize(("action", "message", "done"), BROADCAST)
async def test_what_concerns_all_stages_is_told_to_all_directly(
    opened: tuple[Opened, Ring], action: ev.OriginAction, message: wire.Message, done: list[tuple[Any, ...]]
) -> None:
    parts, _ = opened
    parts.tell([action])
    assert [await control.receive() for control in parts.controls] == [message, message]
    assert parts.engine.done == done and not parts.first.received()


async def test_chunks_go_to_the_first_stage_in_numbers_and_credits_to_the_last(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    chunks = [Chunk(8, ROWS, 1, None, 4), Chunk(9, ROWS, 1)]
    parts.tell([*(ev.SendChunk(chunk) for chunk in chunks), ev.GrantCredit(2)])
    for number, chunk in enumerate(chunks):
        message = await parts.first.receive()
        assert isinstance(message, wire.ChunkMessage)
        assert message.number == number and message.chunk is chunk
    assert await parts.last.receive() == wire.Credit(2)


async def test_what_the_core_wants_computed_is_told_when_it_is_done(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    parts.tell([ev.RunHead(1, ROWS[:1], (0,), HIDDEN, OPTIONS)])
    assert await parts.core.next_told() == ev.CreditArrived(1)
    assert isinstance(await parts.core.next_told(), ev.HeadFinished)


LOST = [
    ("control", wire.StageFailure("out of memory"), r"node hall, layers \[4, 8\): out of memory; see that all"),
    ("control", wire.Credit(1), "peer hall: Credit came on a control link"),
    ("first", wire.CloseSession(1), "peer attic: CloseSession came where Credit was expected"),
    ("last", wire.Credit(1), "peer hall: hidden rows were expected, not Credit"),
    ("last", wire.ChunkMessage(0, Chunk(3, ROWS, 1)), "peer hall: hidden rows were expected, not ChunkMessage"),
    (
        "last",
        wire.ChunkMessage(0, Chunk(3, ROWS, 1, narrow(HIDDEN, "float16"))),
        "peer hall: rows in float16 came, and float32 was asked for",
    ),
    ("last", None, "peer origin: the data link was lost|peer hall: the data link was lost"),
]


@pytest.mark.parametrize(("sender", "message", "said"), LOST)
async def test_what_breaks_it_is_told_once_and_no_request_is_taken_any_more(
    opened: tuple[Opened, Ring], sender: str, message: wire.Message | None, said: str
) -> None:
    parts, ring = opened
    link = {"control": parts.controls[1], "first": parts.first, "last": parts.last}[sender]
    if message is None:
        link.cut()
    else:
        link.send(message)
    lost = await parts.core.next_told()
    assert isinstance(lost, ev.RingLost) and not ring.is_open
    answer = ring.write(await ring.begin([1, 2], OPTIONS))
    with pytest.raises(StageFailedError, match=said):
        await anext(answer)
    parts.first.send(wire.Credit(1))
    await settle()
    assert parts.core.told.empty(), "nobody reads any more"


async def test_energy_of_stages_and_of_the_origin_is_that_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "NOTE_ENERGY_S", 0.001)
    monkeypatch.setattr(energy_shares, "SILENT_S", 3600.0)  # however slow this machine is
    parts, own = Opened(), list[wire.EnergyTaken]()
    engine: Any = parts.engine

    def own_energy() -> wire.EnergyTaken:
        own.append(wire.EnergyTaken("desk", 100.0 + len(own), 0.0))
        return own[-1]

    ring = Ring(parts.core, Journal("origin", {}), engine, parts.stages, parts.links, Board(), energy=own_energy)
    async with asyncio.timeout(LIMIT_S), ring, contextlib.aclosing(ring.generate([1, 2], OPTIONS)) as pieces:
        parts.core.answers = [[ev.EmitTokens(1, (5, 6))]]
        await anext(pieces)
        for joules in (7.0, 9.5):
            parts.controls[0].send(wire.EnergyTaken("pi", joules, 0.0))
            await settle()
        num_read = len(own)
        while len(own) < num_read + 2:
            await asyncio.sleep(0.001)
        parts.tell([ev.FinishGeneration(1, "length")])
        found = present((await anext(pieces)).statistics)
    assert (found["metered_nodes"], found["unmetered_nodes"]) == (["attic", "origin"], ["hall"])
    assert found["joules"] > 2.5 and found["joules"] % 1 == 0.5


async def test_packets_that_the_origin_and_its_stages_lose_are_counted_by_way(
    opened: tuple[Opened, Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[tuple[str, str, int, int]] = []

    def count(core: PacketLoss, near: str, far: str, num_sent: int, num_lost: int, now: float) -> Lossy | None:
        if num_sent:
            counted.append((near, far, num_sent, num_lost))
        return Lossy(far, 0.5) if num_lost > 4 else None

    monkeypatch.setattr(PacketLoss, "count", count)
    parts, ring = opened
    parts.controls[0].send(wire.PacketsSent(100, 3, 20, 1))
    parts.controls[1].send(wire.PacketsSent(50, 2, 10, 0))
    for number, link in enumerate((*parts.links.controls, parts.links.ahead, parts.links.behind)):
        link.packets = Packets(number + 1, 0)  # type: ignore[attr-defined]
    async with asyncio.timeout(LIMIT_S):
        while len(counted) < 8:
            await asyncio.sleep(0.01)
    assert counted[:4] == [
        ("attic", "hall", 100, 3),
        ("attic", "origin", 20, 1),
        ("hall", "origin", 50, 2),
        ("hall", "attic", 10, 0),
    ]
    assert counted[4:] == [("origin", node, n + 1, 0) for n, node in enumerate(("attic", "hall", "attic", "hall"))]
    assert parts.lossy == []
    parts.controls[0].send(wire.PacketsSent(100, 5, 20, 1))
    await settle()
    assert parts.lossy == [Lossy("hall", 0.5)] and ring.is_open


async def test_a_lossy_node_is_not_said_goodbye_to_when_the_ring_is_left(opened: tuple[Opened, Ring]) -> None:
    parts, ring = opened
    ring.leave("hall")
    ends = [link.is_open for link in (*parts.links.controls, parts.links.ahead, parts.links.behind)]
    assert ends == [True, False, True, False]


async def test_a_link_that_is_gone_is_not_sent_to(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    await parts.controls[0].close()
    parts.tell([ev.BroadcastTurn(1, 3)])
    assert await parts.controls[1].receive() == wire.BeginTurn(1, 3)


async def test_whoever_leaves_it_ends_its_readers_and_its_timer() -> None:
    parts = Opened()
    engine: Any = parts.engine
    parts.core.deadline = time.monotonic() + 0.01
    async with Ring(parts.core, Journal("origin", {}), engine, parts.stages, parts.links, Board()):
        parts.first.send(wire.Credit(1))
        await parts.core.next_told()
    while not parts.core.told.empty():  # on a slow machine the deadline has passed within the context
        parts.core.told.get_nowait()
    parts.first.send(wire.Credit(1))
    await asyncio.sleep(0.02)
    assert parts.core.told.empty()


async def test_a_ring_that_is_left_says_no_last_piece(opened: tuple[Opened, Ring]) -> None:
    parts, ring = opened
    parts.core.answers = [[], [ev.FinishGeneration(1, "cancelled")]]

    async def write() -> list[Any]:
        async with contextlib.aclosing(ring.write(await ring.begin([1, 2], OPTIONS))) as pieces:
            return [piece async for piece in pieces]

    writing = asyncio.create_task(write())
    assert await parts.core.next_told() == ev.PromptSubmitted(1, (1, 2), OPTIONS)
    ring.leave()
    assert await writing == [] and not ring.is_open
    assert await parts.core.next_told() == ev.GenerationCancelled(1)


async def test_a_ring_that_is_lost_says_whom_it_lost_and_does_not_wait_for_them(opened: tuple[Opened, Ring]) -> None:
    """A neighbour told of it first; the link of the one that was lost ends a moment later."""
    parts, ring = opened
    near_attic = instance(parts.links.controls[0], FakeLink)
    near_attic.is_silent = True
    parts.controls[1].send(wire.StageFailure("peer attic: the data link was lost", "attic"))
    await settle()
    assert not ring.is_open and ring.loss is None
    parts.controls[0].cut()
    await ring.wait_ended()
    loss: RingLostError = present(ring.loss)
    assert (loss.lost, loss.failed, loss.cut) == (("attic",), None, None)
    assert not parts.links.ahead.is_open and parts.links.behind.is_open


async def test_a_stage_that_failed_by_itself_is_named(opened: tuple[Opened, Ring]) -> None:
    parts, ring = opened
    parts.controls[1].send(wire.StageFailure("out of memory"))
    await ring.wait_ended()
    loss: RingLostError = present(ring.loss)
    assert (loss.lost, loss.failed, loss.cut) == ((), "hall", None)


async def test_a_node_that_answers_nobody_is_lost_whether_its_link_has_ended_or_not(
    opened: tuple[Opened, Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "ANSWER_S", 0.01)
    parts, ring = opened
    instance(parts.links.controls[0], FakeLink).is_silent = True
    parts.controls[1].send(wire.StageFailure("peer attic: the data link was lost", "attic"))
    await ring.wait_ended()
    loss: RingLostError = present(ring.loss)
    assert (loss.lost, loss.failed, loss.cut) == (("attic",), None, None)
    assert not parts.links.controls[0].is_open


async def test_a_way_is_cut_where_both_ends_answer(opened: tuple[Opened, Ring]) -> None:
    parts, ring = opened
    parts.controls[1].send(wire.StageFailure("peer attic: the data link was lost", "attic"))
    await ring.wait_ended()
    loss: RingLostError = present(ring.loss)
    assert (loss.lost, loss.failed, loss.cut) == ((), None, ("hall", "attic"))


async def test_a_way_to_the_origin_is_cut_too(opened: tuple[Opened, Ring]) -> None:
    parts, ring = opened
    instance(parts.links.behind, FakeLink).cut()
    await ring.wait_ended()
    loss: RingLostError = present(ring.loss)
    assert (loss.lost, loss.failed, loss.cut) == ((), None, ("origin", "hall"))


async def test_a_text_that_begins_asks_whether_all_stages_are_there(
    opened: tuple[Opened, Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blame, "ANSWER_S", 0.01)
    parts, ring = opened
    instance(parts.links.controls[1], FakeLink).is_silent = True
    await asyncio.sleep(0.05)
    assert ring.is_open, "nobody has asked"
    parts.core.answers = [[]]
    writing = asyncio.ensure_future(anext(ring.write(await ring.begin([1, 2], OPTIONS))))
    await ring.wait_ended()
    assert present(ring.loss).lost == ("hall",)
    writing.cancel()


async def test_a_ring_that_is_closed_before_it_knows_whom_it_lost_ends_its_texts() -> None:
    parts = Opened()
    engine: Any = parts.engine
    async with asyncio.timeout(LIMIT_S):
        async with Ring(parts.core, Journal("origin", {}), engine, parts.stages, parts.links, Board()) as ring:
            parts.core.answers = [[], [ev.FinishGeneration(1, "failed", "the ring was closed")]]
            writing = asyncio.ensure_future(anext(ring.write(await ring.begin([1, 2], OPTIONS))))
            await parts.core.next_told()
            instance(parts.links.controls[0], FakeLink).is_silent = True
            parts.controls[1].send(wire.StageFailure("out of memory"))
            await settle()
        with pytest.raises(RingLostError, match="the ring was closed"):
            await writing


async def test_a_bug_of_the_origin_is_no_loss(opened: tuple[Opened, Ring], monkeypatch: pytest.MonkeyPatch) -> None:
    parts, ring = opened

    def fail(job: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(parts.engine, "run", fail)
    parts.tell([ev.RunHead(1, ROWS[:1], (0,), HIDDEN, OPTIONS)])
    await ring.wait_ended()
    assert ring.loss is None and not ring.is_open
    with pytest.raises(StageFailedError, match="a bug in flowspec-edge"):
        await anext(ring.write(await ring.begin([1, 2], OPTIONS)))


# ---------------------------------------------------------------------- the timer


async def test_a_deadline_is_told_when_it_has_passed(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    parts.core.deadline = deadline = time.monotonic() + 0.002
    parts.first.send(wire.Credit(1))
    assert await parts.core.next_told() == ev.CreditArrived(1)
    event, now = await parts.core.told.get()
    assert event == ev.DeadlinePassed()
    assert now >= deadline


async def test_a_deadline_that_has_passed_and_stands_is_told_once(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    parts.core.deadline = time.monotonic() - 1
    for _ in range(3):
        parts.first.send(wire.Credit(1))
    told = [await parts.core.next_told() for _ in range(4)]
    assert told.count(ev.DeadlinePassed()) == 1 and told.count(ev.CreditArrived(1)) == 3
    await settle()
    assert parts.core.told.empty()


async def test_a_deadline_that_was_taken_back_is_not_told(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    parts.core.deadline = time.monotonic() + 0.01
    parts.first.send(wire.Credit(1))
    assert await parts.core.next_told() == ev.CreditArrived(1)
    parts.core.deadline = None
    parts.first.send(wire.Credit(2))
    assert await parts.core.next_told() == ev.CreditArrived(2)
    await asyncio.sleep(0.02)
    assert parts.core.told.empty()


async def test_a_new_deadline_takes_the_place_of_the_last(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    parts.core.deadline = time.monotonic() + 1000
    parts.first.send(wire.Credit(1))
    await parts.core.next_told()
    parts.core.deadline = time.monotonic()
    parts.first.send(wire.Credit(1))
    await parts.core.next_told()
    assert await parts.core.next_told() == ev.DeadlinePassed()


async def test_the_drafters_rows_are_kept_and_taken_over_behind_its_passes(opened: tuple[Opened, Ring]) -> None:
    parts, _ = opened
    job = ev.RunDraft(1, ROWS, np.zeros(1, np.int64), HIDDEN, ())
    keep = ev.CloseSessions(1, is_kept=True, taken=(3, 4))
    parts.tell([job, keep, ev.OpenSessions(TAKEN_OVER), ev.RunHead(2, ROWS[:1], (0,), HIDDEN, OPTIONS)])
    for control in parts.controls:
        assert [await control.receive() for _ in range(2)] == [wire.CloseSession(1, True), wire.OpenSession(TAKEN_OVER)]
    assert await parts.core.next_told() == ev.CreditArrived(1)
    for kind in (ev.DraftFinished, ev.HeadFinished):
        assert isinstance(await parts.core.next_told(), kind)
    done, opened_at = parts.engine.done, parts.engine.done.index(("open", 2, 100))  # at once, whatever runs
    assert opened_at < done.index(("take over", 2, 1, 7))
    del done[opened_at]
    assert done == [("run", 1), ("keep", 1, (3, 4)), ("take over", 2, 1, 7), ("run", 2)]
