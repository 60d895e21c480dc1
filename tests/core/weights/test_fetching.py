"""Who is asked for what: events in, actions out, and a random world in which every fetch ends."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.events import DeadlinePassed
from flowspec_edge.core.weights import fetching as fe
from flowspec_edge.errors import FetchError
from tests.narrowing import instance, present

ORIGIN, HALL, ATTIC = (fe.Source(name, "10.0.0.1", port) for name, port in (("origin", 1), ("hall", 2), ("attic", 3)))
SIZE = 10 * fe.PROGRESS_BYTES


def wanted(name: str, num_present: int = 0) -> fe.WantedFile:
    return fe.WantedFile(name * 64, f"layer-{name}", SIZE, num_present)


A, B, C = "a" * 64, "b" * 64, "c" * 64


def begun(*files: fe.WantedFile, sources: tuple[fe.Source, ...] = (ORIGIN,)) -> fe.Fetch:
    fetch = fe.Fetch(files, sources)
    assert fetch.begin() == [fe.AskSource(source, tuple(file.sha256 for file in files)) for source in sources]
    return fetch


def told(
    fetch: fe.Fetch, event: fe.FetchEvent, now: float = 1.0
) -> list[fe.StartTransfer | fe.CompleteFetch | fe.FailFetch | fe.FetchAction]:
    actions = fetch.handle(event, now)
    fetch.check()
    return actions


def answers(source: fe.Source, *held: str) -> fe.SourceAnswered:
    return fe.SourceAnswered(source, frozenset(held))


def test_files_come_one_after_another_from_a_single_source() -> None:
    fetch = begun(wanted("a"), wanted("b"), wanted("c"))
    assert told(fetch, answers(ORIGIN, A, B, C)) == [fe.StartTransfer(A, ORIGIN, 0), fe.StartTransfer(B, ORIGIN, 0)]
    assert told(fetch, fe.FileArrived(A, ORIGIN)) == [fe.StartTransfer(C, ORIGIN, 0)]
    assert told(fetch, fe.FileArrived(B, ORIGIN)) == []
    assert told(fetch, fe.FileArrived(C, ORIGIN)) == [fe.CompleteFetch()]


def test_the_load_is_shared_among_the_sources_that_have_a_file() -> None:
    fetch = begun(wanted("a"), wanted("b"), wanted("c"), sources=(ORIGIN, HALL))
    assert len(told(fetch, answers(ORIGIN, A, B, C))) == 2
    assert told(fetch, answers(HALL, B, C)) == [fe.StartTransfer(C, HALL, 0)]


def test_nothing_to_fetch_is_complete_at_once() -> None:
    assert fe.Fetch((), (ORIGIN,)).begin() == [fe.CompleteFetch()]


def test_an_earlier_fetch_is_resumed() -> None:
    fetch = begun(wanted("a", num_present=1234))
    assert told(fetch, answers(ORIGIN, A)) == [fe.StartTransfer(A, ORIGIN, 1234)]


def test_a_source_lost_in_the_middle_is_replaced_and_its_bytes_are_kept() -> None:
    fetch = begun(wanted("a"), sources=(ORIGIN, HALL))
    told(fetch, answers(ORIGIN, A))
    told(fetch, answers(HALL, A))
    broke = fe.TransferBroke(A, ORIGIN, SIZE // 2, "was lost")
    assert told(fetch, broke) == [fe.StartTransfer(A, HALL, SIZE // 2)]


def test_an_only_source_is_tried_again_after_a_growing_delay_and_given_up_in_the_end() -> None:
    fetch, now = begun(wanted("a")), 5.0
    assert told(fetch, answers(ORIGIN, A), now) == [fe.StartTransfer(A, ORIGIN, 0)]
    for failure in range(fe.MAX_FAILURES - 1):
        assert told(fetch, fe.TransferBroke(A, ORIGIN, 0, "was lost"), now) == []
        assert fetch.next_deadline() == now + fe.FIRST_DELAY_S * 2**failure
        now = present(fetch.next_deadline())
        assert told(fetch, DeadlinePassed(), now) == [fe.StartTransfer(A, ORIGIN, 0)]
        assert fetch.next_deadline() is None
    (failed,) = told(fetch, fe.TransferBroke(A, ORIGIN, 0, "was lost"), now)
    assert failed == fe.FailFetch(f"layer-a ({SIZE} bytes) cannot be fetched: origin at 10.0.0.1:1 was lost")
    assert told(fetch, answers(HALL, A)) == []


def test_progress_forgives_failures() -> None:
    fetch, present = begun(wanted("a")), 0
    told(fetch, answers(ORIGIN, A))
    for _ in range(fe.MAX_FAILURES + 2):
        present += fe.PROGRESS_BYTES
        assert told(fetch, fe.TransferBroke(A, ORIGIN, present, "was lost")) == []
        assert told(fetch, DeadlinePassed(), now=2.0) == [fe.StartTransfer(A, ORIGIN, present)]
        fetch._now = 1.0


def test_a_liar_is_named_and_its_file_comes_from_another() -> None:
    fetch = begun(wanted("a"), sources=(HALL, ORIGIN))
    told(fetch, answers(HALL, A))
    told(fetch, answers(ORIGIN, A))
    reason = f"sent layer-a with sha256 {'f' * 12} instead of {'a' * 12}"
    assert told(fetch, fe.FileDiffered(A, HALL, "f" * 64)) == [
        fe.AccuseSource(HALL, reason),
        fe.DropPart(A),
        fe.StartTransfer(A, ORIGIN, 0),
    ]
    assert told(fetch, fe.FileArrived(A, ORIGIN)) == [fe.CompleteFetch()]


def test_when_several_gave_bytes_nobody_is_accused_before_one_gave_all() -> None:
    fetch = begun(wanted("a"), sources=(HALL, ORIGIN))
    told(fetch, answers(HALL, A))
    told(fetch, answers(ORIGIN, A))
    assert told(fetch, fe.TransferBroke(A, HALL, SIZE // 2, "was lost")) == [fe.StartTransfer(A, ORIGIN, SIZE // 2)]
    assert told(fetch, fe.FileDiffered(A, ORIGIN, "f" * 64)) == [fe.DropPart(A), fe.StartTransfer(A, ORIGIN, 0)]
    # A disputed file is not resumed from someone else.
    actions = told(fetch, fe.TransferBroke(A, ORIGIN, 100_000, "was lost"), now=9.0)
    assert actions == [fe.DropPart(A), fe.StartTransfer(A, HALL, 0)]
    (accused, *_) = told(fetch, fe.FileDiffered(A, HALL, "f" * 64), now=9.0)
    assert isinstance(accused, fe.AccuseSource) and accused.source == HALL


def test_a_part_of_an_earlier_fetch_accuses_nobody() -> None:
    fetch = begun(wanted("a", num_present=100))
    told(fetch, answers(ORIGIN, A))
    assert told(fetch, fe.FileDiffered(A, ORIGIN, "f" * 64)) == [fe.DropPart(A), fe.StartTransfer(A, ORIGIN, 0)]


def test_what_a_liar_has_given_to_other_files_is_dropped_too() -> None:
    fetch = begun(wanted("a"), wanted("b"), sources=(HALL,))
    told(fetch, answers(HALL, A, B))
    told(fetch, fe.TransferBroke(B, HALL, SIZE // 2, "was lost"))
    actions = told(fetch, fe.TransferBroke(A, HALL, 0, "offered 7 bytes", is_fault=True))
    assert actions[:2] == [fe.AccuseSource(HALL, "offered 7 bytes"), fe.DropPart(B)]
    assert isinstance(actions[2], fe.FailFetch)


def test_a_fetch_waits_for_sources_that_have_not_answered_and_then_names_them_all() -> None:
    fetch = begun(wanted("a"), sources=(ORIGIN, HALL, ATTIC))
    assert told(fetch, answers(ORIGIN)) == []
    assert told(fetch, fe.SourceLost(HALL, "cannot be reached")) == []
    (failed,) = told(fetch, fe.SourceLost(ATTIC, "did not answer"))
    for text in (
        "origin at 10.0.0.1:1 does not have it",
        "hall at 10.0.0.1:2 cannot be",
        "attic at 10.0.0.1:3 did not",
    ):
        assert text in instance(failed, fe.FailFetch).reason


def test_without_any_source_a_fetch_fails_at_once() -> None:
    (failed,) = fe.Fetch((wanted("a"),), ()).begin()
    assert "no node that might have it" in instance(failed, fe.FailFetch).reason


def test_sources_in_messages() -> None:
    for source in (ORIGIN, fe.Source("pi/hall 2", "fe80::1", 65535)):
        assert fe.Source.from_text(source.to_text()) == source
    for text in ("", "host:1", "host/pi", ":1/pi", "host:0/pi", "host:65536/pi", "host:-1/pi", "host:x/pi"):
        with pytest.raises(FetchError, match="host:port/node"):
            fe.Source.from_text(text)


class World:
    """Sources that lie, break off and come back at random."""

    def __init__(self, seed: int, honest: bool) -> None:
        self.random = random.Random(seed)
        self.sources = {ORIGIN: honest, HALL: False, ATTIC: False}
        self.files = [wanted(name, self.random.choice((0, 0, 777))) for name in "abcdef"]
        self.present = {file.sha256: file.num_present for file in self.files}
        self.good = {file.sha256: True for file in self.files}

    def answer(self, action: fe.FetchAction) -> fe.FetchEvent:
        if isinstance(action, fe.AskSource):
            if self.sources[action.source] or self.random.random() < 0.7:
                return answers(
                    action.source,
                    *(f for f in action.files if self.sources[action.source] or self.random.random() < 0.8),
                )
            return fe.SourceLost(action.source, "cannot be reached")
        assert isinstance(action, fe.StartTransfer)
        sha256, source = action.sha256, action.source
        assert action.offset == self.present[sha256]
        fate = "good" if self.sources[source] else self.random.choice(("good", "lie", "break", "fault"))
        if fate in ("break", "fault"):
            self.present[sha256] = self.random.randrange(action.offset, SIZE)
            return fe.TransferBroke(sha256, source, self.present[sha256], "was lost", is_fault=fate == "fault")
        self.present[sha256], self.good[sha256] = SIZE, self.good[sha256] and fate == "good"
        return fe.FileArrived(sha256, source) if self.good[sha256] else fe.FileDiffered(sha256, source, "f" * 64)

    def drop(self, sha256: str) -> None:
        self.present[sha256], self.good[sha256] = 0, True


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), honest=st.booleans())
def test_every_fetch_ends_and_one_honest_source_is_enough(seed: int, honest: bool) -> None:
    world, now = World(seed, honest), 0.0
    fetch = fe.Fetch(world.files, tuple(world.sources))
    todo, accused = fetch.begin(), set()
    for _ in range(2000):
        pending = []
        for action in todo:
            match action:
                case fe.DropPart(sha256):
                    world.drop(sha256)
                case fe.AccuseSource(source):
                    accused.add(source)
                case fe.CompleteFetch():
                    assert all(world.present[file.sha256] == SIZE and world.good[file.sha256] for file in world.files)
                    assert ORIGIN not in accused or not honest
                    return
                case fe.FailFetch(reason):
                    assert not honest, reason
                    return
                case _:
                    pending.append(action)
        if pending:
            chosen = pending.pop(world.random.randrange(len(pending)))
            event = world.answer(chosen)
        else:
            deadline = fetch.next_deadline()
            assert deadline is not None, "it neither ends nor waits for anything"
            now = deadline
            event = DeadlinePassed()
        todo = pending + fetch.handle(event, now)
        fetch.check()
    raise AssertionError("a fetch without an end")
