"""Layers that stay loaded beside stages: who gets them, who waits for them, and when they go."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.node import kept_layers
from flowspec_edge.node.kept_layers import KeptLayers, LoadedStage
from tests.fake_links import FakeLink


class NamedRunner(StageRunner):
    """Has loaded the files that its name is made of, and says when it is closed."""

    def __init__(self, name: str, closed: list[str]) -> None:
        self.name, self.closed = name, closed
        self.parts = {letter: f"loaded {letter}" for letter in name}

    def close(self) -> None:
        self.closed.append(self.name)
        self.parts = {}


def stage_of(bundle: Bundle, name: str, closed: list[str], memory_bytes: int = 0) -> LoadedStage:
    return LoadedStage(bundle, NamedRunner(name, closed), memory_bytes, contextlib.ExitStack())


OPEN, CLOSED = FakeLink("origin"), FakeLink("origin")
CLOSED.cut()


@pytest.mark.parametrize(("wanted", "found"), [("ab", "ab"), ("bc", "b"), ("c", "")])
async def test_whoever_comes_while_a_stage_ends_waits_for_it_and_gets_what_it_has_of_it(
    bundle: Bundle, wanted: str, found: str
) -> None:
    kept, closed = KeptLayers(), list[str]()
    with kept.using(OPEN):
        assert not (await kept.take(wanted)).parts, "one that serves is not waited for"
    with kept.using(CLOSED):
        taking = asyncio.create_task(kept.take(wanted))
        await asyncio.sleep(0)
        kept.keep(stage_of(bundle, "ab", closed), CLOSED)
        assert not taking.done()
    assert (await taking).parts == {letter: f"loaded {letter}" for letter in found}
    assert closed == ["ab"], "it gives way; what was taken of it is held by whoever took it"


async def test_a_stage_that_ends_too_late_is_not_kept_beside_the_one_that_came(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_layers, "ENDING_S", 0.0)
    kept, closed = KeptLayers(), list[str]()
    with kept.using(CLOSED):
        assert not (await kept.take("b")).parts
        with kept.using(OPEN):
            kept.keep(stage_of(bundle, "a", closed), CLOSED)
            await kept.freed()
            assert closed == ["a"]
            # Its data link was lost; the other's control link is closed.
            kept.keep(stage_of(bundle, "b", closed), OPEN)
    assert closed == ["a"]
    await kept.close()
    assert closed == ["a", "b"]


async def test_a_node_that_has_ended_keeps_nothing(bundle: Bundle) -> None:
    kept, closed = KeptLayers(), list[str]()
    standby = stage_of(bundle, "s", closed)
    kept.keep(stage_of(bundle, "a", closed), CLOSED)
    kept.stand_by(standby, lambda stage: None)
    await kept.close()
    assert sorted(closed) == ["a", "s"]
    kept.keep(stage_of(bundle, "b", closed), CLOSED)
    assert not (await kept.take("ab")).parts and sorted(closed) == ["a", "b", "s"]


async def test_each_has_a_clock_of_its_own(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, closed = KeptLayers(), list[str]()
    monkeypatch.setattr(kept_layers, "KEEP_S", 0.0)
    kept.keep(stage_of(bundle, "a", closed), CLOSED)
    monkeypatch.setattr(kept_layers, "KEEP_S", 60.0)
    kept.keep(stage_of(bundle, "b", closed), CLOSED)
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

    kept = KeptLayers()
    kept.keep(LoadedStage(bundle, SlowRunner("a", closed), 0, contextlib.ExitStack()), CLOSED)
    taking = asyncio.create_task(kept.take("b"))
    await asyncio.sleep(0.01)
    assert not taking.done() and not closed
    may_end.set()
    assert not (await taking).parts and closed == ["a"]


# ------------------------------------------------------------------------- standbys


class Standing:
    """Three standbys of ten bytes each; ``gone`` are those that were given back."""

    def __init__(self, bundle: Bundle) -> None:
        self.kept, self.closed, self.gone = KeptLayers(), list[str](), list[str]()
        self.stages = [stage_of(bundle, name, self.closed, 10) for name in ("ab", "cd", "e")]
        for stage in self.stages:
            self.kept.stand_by(stage, self._tell)

    def _tell(self, stage: LoadedStage) -> None:
        assert isinstance(stage.runner, NamedRunner)
        self.gone.append(stage.runner.name)


async def test_a_stage_takes_what_stands_by_and_the_rest_goes_on_standing_by(bundle: Bundle) -> None:
    standing = Standing(bundle)
    taken = await standing.kept.take("bde")
    assert taken.parts == {"b": "loaded b", "d": "loaded d", "e": "loaded e"}
    assert standing.gone == standing.closed == ["ab", "cd", "e"]
    standing = Standing(bundle)
    assert not (await standing.kept.take("xyz")).parts
    assert standing.gone == [] and standing.kept.standby_bytes == 30
    await standing.kept.close()


@pytest.mark.parametrize(("free_bytes", "gone"), [(30, []), (29, ["e"]), (19, ["e", "cd"]), (0, ["e", "cd", "ab"])])
async def test_standbys_give_way_to_stages_the_youngest_first(bundle: Bundle, free_bytes: int, gone: list[str]) -> None:
    standing = Standing(bundle)
    standing.kept.make_room(free_bytes)
    await standing.kept.freed()
    assert standing.gone == standing.closed == gone
    assert standing.kept.standby_bytes <= free_bytes
    await standing.kept.close()


async def test_standbys_that_nobody_asks_for_any_more_are_kept_like_stages(bundle: Bundle) -> None:
    standing = Standing(bundle)
    standing.kept.make_room(29)
    standing.kept.end_standbys(standing.stages)
    assert standing.gone == ["e"], "who has left is told nothing"
    assert standing.kept.standby_bytes == 0
    assert standing.kept.loaded("acx").parts == {"a": "loaded a", "c": "loaded c"}
    assert (await standing.kept.take("b")).parts == {"b": "loaded b"}
    assert sorted(standing.closed) == ["ab", "cd", "e"] and standing.gone == ["e"]
