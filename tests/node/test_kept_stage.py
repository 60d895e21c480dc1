"""A stage that stays loaded when its ring has ended: who gets it, who waits for it, and when it goes."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.node import kept_stage
from flowspec_edge.node.kept_stage import KeptStage, Key, LoadedStage
from tests.fake_links import FakeLink

KEY, OTHER = ("model", 0, 4, ""), ("model", 4, 8, "")


class NamedRunner(StageRunner):
    """Loads nothing, and says when it is closed."""

    def __init__(self, name: str, closed: list[str]) -> None:
        self.name, self.closed = name, closed

    def close(self) -> None:
        self.closed.append(self.name)


def stage_of(bundle: Bundle, name: str, closed: list[str]) -> LoadedStage:
    return LoadedStage(bundle, NamedRunner(name, closed), 0, contextlib.ExitStack())


OPEN, CLOSED = FakeLink("origin"), FakeLink("origin")
CLOSED.cut()


@pytest.mark.parametrize("wanted", [KEY, OTHER])
async def test_whoever_comes_while_a_stage_ends_waits_for_it_whatever_it_is(bundle: Bundle, wanted: Key) -> None:
    kept, closed = KeptStage(), list[str]()
    stage = stage_of(bundle, "a", closed)
    with kept.using(OPEN):
        assert await kept.take(KEY) is None, "one that serves is not waited for"
    with kept.using(CLOSED):
        taking = asyncio.create_task(kept.take(wanted))
        await asyncio.sleep(0)
        kept.keep(KEY, stage, CLOSED)
        assert not taking.done()
    assert await taking is (stage if wanted == KEY else None)
    assert closed == ([] if wanted == KEY else ["a"]), "it gives way"


async def test_a_stage_that_ends_too_late_is_not_kept_beside_the_one_that_came(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_stage, "ENDING_S", 0.0)
    kept, closed = KeptStage(), list[str]()
    with kept.using(CLOSED):
        assert await kept.take(OTHER) is None
        with kept.using(OPEN):
            kept.keep(KEY, stage_of(bundle, "a", closed), CLOSED)
            await kept.freed()
            assert closed == ["a"]
            kept.keep(
                OTHER, stage_of(bundle, "b", closed), OPEN
            )  # its data link was lost; the other's control link is closed
    assert closed == ["a"]
    await kept.close()
    assert closed == ["a", "b"]


async def test_a_node_that_has_ended_keeps_nothing(bundle: Bundle) -> None:
    kept, closed = KeptStage(), list[str]()
    kept.keep(KEY, stage_of(bundle, "a", closed), CLOSED)
    await kept.close()
    assert closed == ["a"]
    kept.keep(KEY, stage_of(bundle, "b", closed), CLOSED)
    assert await kept.take(KEY) is None and closed == ["a", "b"]


async def test_of_stages_that_end_at_once_one_is_kept_and_the_clock_of_the_other_stops(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, closed = KeptStage(), list[str]()
    monkeypatch.setattr(kept_stage, "KEEP_S", 0.0)
    kept.keep(KEY, stage_of(bundle, "a", closed), CLOSED)
    monkeypatch.setattr(kept_stage, "KEEP_S", 60.0)
    kept.keep(KEY, stage_of(bundle, "b", closed), CLOSED)
    for _ in range(3):
        await asyncio.sleep(0)
    await kept.freed()
    assert closed == ["a"]
    await kept.close()
    assert closed == ["a", "b"]


async def test_a_stage_is_freed_on_a_thread_and_whoever_wants_its_memory_waits(bundle: Bundle) -> None:
    may_end, closed = threading.Event(), list[str]()

    class SlowRunner(NamedRunner):
        def close(self) -> None:
            may_end.wait(30)
            super().close()

    kept = KeptStage()
    kept.keep(KEY, LoadedStage(bundle, SlowRunner("a", closed), 0, contextlib.ExitStack()), CLOSED)
    taking = asyncio.create_task(kept.take(OTHER))
    await asyncio.sleep(0.01)
    assert not taking.done() and not closed
    may_end.set()
    assert await taking is None and closed == ["a"]
