"""A core's journal, written and run again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from flowspec_edge.bench import replay as replaying
from flowspec_edge.bench.replay import read_journal, replay
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core import journal as journals
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.membership import AddressLearned, Membership, MembershipEvent, PeerFailed, TimePassed
from flowspec_edge.core.cluster.membership import Failure as GreetingFailure
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning import preparing
from flowspec_edge.core.planning.losses import Losses, LossEvent, PartAnswered, PartSilent, PartsLost
from flowspec_edge.core.planning.preparing import Layers, Preparing, PreparingEvent
from flowspec_edge.core.planning.recovery import (
    Recovery,
    RecoveryEvent,
    RingFailed,
    RingOpened,
    RoomMissing,
)
from flowspec_edge.core.rows import NO_PARENT, Chunk, Row, SessionSpec
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.core.weights.fetching import Fetch, Source, SourceLost, WantedFile
from flowspec_edge.errors import JournalError, ProtocolError
from tests.fakes import FakeRing, unsplit

SECRET = (4, 7, 4, 9, 12, 7)


def record_ring(*, has_text: bool, options: GenerateOptions) -> tuple[bytes, list[bytes], list[int]]:
    """One generation during which the ring is lost: the journals of origin and stages, and what was written."""
    ring = FakeRing(3, random.Random(3))
    files = [bytearray() for _ in range(4)]
    told = {"num_stages": 3, "limits": ring.limits, "has_drafter": True}
    ring.record(
        Journal("origin", told, files[0].extend, has_text=has_text),
        [
            Journal("stage", {"is_last": number == 2}, file.extend, has_text=has_text)
            for number, file in enumerate(files[1:])
        ],
    )
    answer = ring.submit(1, SECRET, options)
    while len(answer.tokens) < 5:
        assert ring.step()
    ring.tell_origin(ev.RingLost("peer pi-hall: link lost"))
    ring.run_to_the_end()
    assert answer.reason == "failed"
    return bytes(files[0]), [bytes(file) for file in files[1:]], answer.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_lost_ring_runs_again_to_the_same_actions(temperature: float) -> None:
    options = GenerateOptions(
        max_new_tokens=60, temperature=temperature, repetition_penalty=1.2, logit_bias=((11, 0.5),), num_logprobs=3
    )
    origin, stages, tokens = record_ring(has_text=True, options=options)
    assert tokens == unsplit(SECRET, options)[: len(tokens)]
    for data in (origin, *stages):
        steps = list(replay(read_journal(data)))
        assert len(steps) > 10
        assert all(step.is_same for step in steps)
    assert any("FinishGeneration(1, 'failed', 'peer pi-hall: link lost')" in line for line in _actions(origin))


def _actions(data: bytes) -> list[str]:
    return [replaying.summary(action) for step in replay(read_journal(data)) for action in step.actions[1]]


def test_without_text_stages_run_again_and_nothing_tells_what_was_asked() -> None:
    options = GenerateOptions(
        max_new_tokens=60, stop=("hush",), frequency_penalty=0.5, logit_bias=((11, 0.5),), num_logprobs=3
    )
    origin, stages, tokens = record_ring(has_text=False, options=options)
    for data in stages:
        assert all(step.is_same for step in replay(read_journal(data)))
    found = read_journal(origin)
    (prompt,) = [e.event.prompt for e in found.entries if isinstance(e.event, ev.PromptSubmitted)]
    assert prompt == (0,) * len(SECRET)
    assert b"hush" not in origin
    rows = [
        row
        for e in read_journal(stages[0]).entries
        if isinstance(e.event, ev.ChunkArrived)
        for row in e.event.chunk.rows
    ]
    assert {row.token for row in rows if row.id < len(SECRET)} == {0}, "a chain has one child a row"
    heads = [e.event for e in read_journal(origin).entries if isinstance(e.event, ev.HeadFinished)]
    assert not any(head.logprobs for head in heads)
    actions = [action for e in read_journal(origin).entries for action in e.actions[1]]
    asked = [action for action in actions if action[0] in ("events.RunHead", "events.RunDraft")]
    assert asked and all(action[-1] is None for action in asked), "no job tells the paths to its rows"
    assert not any("11, 0.5" in replaying.summary(action) for action in asked)
    drawn = [token for head in heads for token in head.tokens]
    assert drawn and set(drawn) == {0}
    with pytest.raises(JournalError, match="FLOWSPEC_RECORD_TEXT=1"):
        next(replay(read_journal(origin)))
    assert tokens


def test_another_answer_than_the_recorded_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _, stages, _ = record_ring(has_text=False, options=GenerateOptions(max_new_tokens=60))
    monkeypatch.setattr("flowspec_edge.core.speculation.stage.CREDITS_PER_HOP", 3)
    assert not all(step.is_same for step in replay(read_journal(stages[0])))


def test_hidden_rows_leave_only_their_shape() -> None:
    data = bytearray()
    journal, stage = Journal("stage", {"is_last": False}, data.extend, has_text=True), Stage(is_last=False)
    hidden = np.full((1, 64), 3.25, np.float32)
    for event in (
        ev.SessionRequested(SessionSpec(1, 9)),
        ev.ChunkArrived(Chunk(1, (Row(0, NO_PARENT, 5),), 1, hidden)),
    ):
        journal.handle(stage, event, 1.0)
    assert hidden.tobytes()[:16] not in data
    _, arrived = read_journal(bytes(data)).entries
    assert arrived.event.chunk.hidden.shape == (1, 64) and not arrived.event.chunk.hidden.any()


def test_an_error_is_recorded_and_raised() -> None:
    data = bytearray()
    journal, stage = Journal("stage", {"is_last": False}, data.extend), Stage(is_last=False)
    journal.handle(stage, ev.SessionRequested(SessionSpec(1, 9)), 1.0)
    with pytest.raises(ProtocolError):
        journal.handle(stage, ev.SessionRequested(SessionSpec(1, 9)), 2.0)
    assert [(step.is_same, step.actions[0]) for step in replay(read_journal(bytes(data)))] == [
        (True, "=seq"),
        (True, "ProtocolError"),
    ]


def test_the_other_cores_run_again_too() -> None:
    data = bytearray()
    told: dict[str, Any] = {
        "node": "a",
        "cluster": "c",
        "fingerprint": "f",
        "began": 0.0,
        "own": frozenset({Address("10.0.0.1", 7361)}),
    }
    journal, members = Journal("membership", told, data.extend), Membership(**told)
    events: list[MembershipEvent] = [
        AddressLearned(Address("10.0.0.2", 7361), "typed"),
        TimePassed(),
        PeerFailed(Address("10.0.0.2", 7361), GreetingFailure("refused", "no")),
        TimePassed(),
    ]
    for now, event in enumerate(events):
        journal.handle(members, event, float(now))
    assert all(step.is_same for step in replay(read_journal(bytes(data))))
    data = bytearray()
    files, sources = (WantedFile("ab", "x", 10),), (Source("b", "10.0.0.2", 1), Source("c", "10.0.0.3", 1))
    fetch = Fetch(files, sources)
    fetch.begin()
    journal = Journal("fetch", {"files": files, "sources": sources}, data.extend)
    journal.handle(fetch, SourceLost(sources[0], "gone"), 1.0)
    (step,) = replay(read_journal(bytes(data)))
    assert step.is_same and "SourceLost" in step.event


def test_what_becomes_of_texts_runs_again_too() -> None:
    data = bytearray()
    lost = Losses()
    journal = Journal("losses", {}, data.extend)
    losses: list[LossEvent] = [PartsLost(frozenset({"a", ("b", "c")})), PartSilent("a"), PartAnswered(("b", "c"))]
    for now, loss in enumerate(losses):
        journal.handle(lost, loss, float(now))
    assert [step.is_same for step in replay(read_journal(bytes(data)))] == [True] * 3
    data = bytearray()
    text = Recovery(60.0)
    journal = Journal("recovery", {"wait_s": 60.0}, data.extend)
    events: list[RecoveryEvent] = [RingFailed(3, "gone"), RoomMissing("too small", True), RingOpened()]
    for now, event in enumerate(events):
        journal.handle(text, event, float(now))
    steps = list(replay(read_journal(bytes(data))))
    assert all(step.is_same for step in steps)
    assert [replaying.summary(step.actions) for step in steps] == ["[OpenRing()]", "[WaitForBoards(2.0)]", "[]"]


def test_what_is_prepared_runs_again_too() -> None:
    data = bytearray()
    journal, core = Journal("preparing", {}, data.extend), Preparing()
    layers = Layers("attic", 2, 3)
    events: list[PreparingEvent] = [
        preparing.RingOpened(),
        preparing.TimePassed(),
        preparing.StandbysPlanned((layers,)),
        preparing.LayersPrepared(layers),
        preparing.RingOpened(),
        preparing.TimePassed(),
        preparing.StandbysPlanned(()),
    ]
    for number, event in enumerate(events):
        journal.handle(core, event, 10.0 * number)
    steps = list(replay(read_journal(bytes(data))))
    assert all(step.is_same for step in steps)
    assert replaying.summary(steps[2].actions) == "[PrepareLayers(Layers('attic', 2, 3))]"
    assert replaying.summary(steps[-1].actions) == "[ReleaseNode('attic')]"


def test_a_full_journal_stops_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "MAX_BYTES", 2000)
    data = bytearray()
    journal, members = Journal("membership", {}, data.extend), Membership("a", "c", "f", 0.0)
    for now in range(200):
        journal.handle(members, TimePassed(), float(now))
    assert len(data) <= 2000 + 8
    recorded = read_journal(bytes(data))
    assert 10 < len(list(recorded.entries)) < 200 and recorded.is_full


def test_a_journal_that_was_cut_off_is_read_to_its_last_entry() -> None:
    data = bytearray()
    journal, members = Journal("membership", {}, data.extend), Membership("a", "c", "f", 0.0)
    for now in range(3):
        journal.handle(members, TimePassed(), float(now))
    assert len(list(read_journal(bytes(data[:-3])).entries)) == 2


def test_a_core_that_was_made_otherwise_is_refused() -> None:
    data = bytearray()
    Journal("stage", {"is_last": True, "has_wings": True}, data.extend)
    with pytest.raises(JournalError, match="made otherwise than this version's"):
        list(replay(read_journal(bytes(data))))


@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"kind": "stage"})])
def test_what_is_no_journal_is_refused(data: bytes) -> None:
    with pytest.raises(JournalError):
        read_journal(data)


def test_the_command_prints_events_with_their_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    origin, stages, _ = record_ring(has_text=False, options=GenerateOptions(max_new_tokens=60))
    file = tmp_path / "stage.journal"
    file.write_bytes(stages[1])
    assert replaying.main([str(file)]) == 0
    out = capsys.readouterr().out
    assert "ChunkArrived(Chunk(1, [Row(0, 4294967295, 0)" in out and "\n    GrantCredit(1)\n" in out
    assert out.endswith("0 answered otherwise than recorded\n")
    file.write_bytes(origin)
    assert replaying.main([str(file)]) == 1
    assert "FLOWSPEC_RECORD_TEXT=1" in capsys.readouterr().err
    assert replaying.main([str(file), "--as-recorded"]) == 0
    assert "RingLost('peer pi-hall: link lost')" in capsys.readouterr().out
