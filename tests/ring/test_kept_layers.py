"""Layers of a ring that has ended are there for the next one, and in nobody's way."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import ForwardFinished, RunForward
from flowspec_edge.engine import stage_runner
from flowspec_edge.engine.graphs import CachedGraph
from flowspec_edge.engine.stage_runner import Parts, StageRunner
from flowspec_edge.errors import StageFailedError
from flowspec_edge.manifest import Manifest
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node import kept_layers, layer_loading
from flowspec_edge.node.node import Node
from flowspec_edge.origin.opening import open_ring
from tests.ring.conftest import GIB, answer_of, found_of, nodes_of, tokens_of, unsplit_tokens

OPTIONS = GenerateOptions(max_new_tokens=12)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The layer ranges that were loaded, in order: of stages where they were loaded as a whole, else block by block."""
    ranges: list[tuple[int, int]] = []

    class Runner(StageRunner):
        def __init__(
            self, directory: Path, manifest: Manifest, start: int, stop: int, *, loaded: Parts, **options: Any
        ) -> None:
            super().__init__(directory, manifest, start, stop, loaded=loaded, **options)
            blocks = manifest.blocks_of(start, stop)
            new = [(block.start, block.stop) for block in blocks if block.sha256 not in loaded]
            ranges.extend([(start, stop)] if len(new) == len(blocks) else new)
            self.with_cache: set[int] = set()

        def open_cache(self, session: int, capacity: int) -> None:
            self.with_cache.add(session)
            super().open_cache(session, capacity)

        def free_cache(self, session: int) -> None:
            self.with_cache.discard(session)
            super().free_cache(session)

    monkeypatch.setattr(layer_loading, "StageRunner", Runner)
    return ranges


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Weak references to all graphs that were loaded."""
    references: list[weakref.ref[Any]] = []

    class Graph(CachedGraph):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            references.append(weakref.ref(self))

    monkeypatch.setattr(stage_runner, "CachedGraph", Graph)
    return references


async def text_of(origin: Node, bundle: Bundle, found: list[Announcement], prompt: list[int]) -> list[int]:
    async with open_ring(origin, bundle, found) as ring:
        return tokens_of(await answer_of(ring, prompt, OPTIONS))


async def test_the_next_ring_takes_what_is_loaded_and_writes_the_same(
    int8_bundle: Bundle, prompts: list[list[int]], loaded: list[tuple[int, int]]
) -> None:
    async with nodes_of(int8_bundle, ("attic", "cellar")) as (serving, origin):
        found = found_of(serving)
        for _ in range(3):
            tokens = await text_of(origin, int8_bundle, found, prompts[0])
            assert tokens == unsplit_tokens(int8_bundle, prompts[0], OPTIONS)
        assert sorted(loaded) == [(0, 4), (4, 8)]
        await until(lambda: all(node.kept._kept for node in serving))
        assert [node.memory.free_bytes for node in serving] == [GIB, GIB], "what is kept counts as free"
        runners: list[Any] = [stage.runner for node in serving for stage in node.kept._kept]
        assert not any(runner.with_cache for runner in runners)


async def test_only_what_moves_is_loaded(
    int8_bundle: Bundle, prompts: list[list[int]], loaded: list[tuple[int, int]]
) -> None:
    """Of three equal shares the first stays as it is when the other two become one."""
    async with nodes_of(int8_bundle, ("attic", "cellar", "hall")) as (serving, origin):
        first, second, third = found_of(serving)
        await text_of(origin, int8_bundle, [first, second, third], prompts[0])
        assert sorted(loaded) == [(0, 3), (3, 6), (6, 8)]
        loaded.clear()
        await text_of(origin, int8_bundle, [first, third, second], prompts[0])
        assert sorted(loaded) == [(3, 6), (6, 8)]


async def test_of_a_stage_that_grows_only_what_is_new_is_loaded(
    int8_bundle: Bundle, prompts: list[list[int]], loaded: list[tuple[int, int]]
) -> None:
    async with nodes_of(int8_bundle, ("attic", "cellar", "hall")) as (serving, origin):
        first, second, third = found_of(serving)
        expected = unsplit_tokens(int8_bundle, prompts[0], OPTIONS)
        assert await text_of(origin, int8_bundle, [first, second, third], prompts[0]) == expected
        loaded.clear()
        assert await text_of(origin, int8_bundle, [first, third], prompts[0]) == expected
        assert sorted(loaded) == [(3, 4), (4, 5), (5, 6)], "[0, 3) and [6, 8) were there"


async def test_it_goes_after_a_while(
    int8_bundle: Bundle, prompts: list[list[int]], loaded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_layers, "KEEP_S", 0.0)
    async with nodes_of(int8_bundle, ("attic",)) as (serving, origin):
        for _ in range(2):
            await text_of(origin, int8_bundle, found_of(serving), prompts[0])
            await until(lambda: not serving[0].kept._kept and not serving[0].kept._uses)
    assert loaded == [(0, 8), (0, 8)]


async def test_a_stage_that_is_ending_is_in_nobodys_way(
    int8_bundle: Bundle, prompts: list[list[int]], loaded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its last forward runs its memory counts as free, and the next ring waits for it."""
    begun, may_end = threading.Event(), threading.Event()

    def run_long(self: StageRunner, forward: RunForward, *arguments: Any) -> ForwardFinished:
        begun.set()
        may_end.wait(30)
        return run(self, forward, *arguments)

    run = StageRunner.run
    async with nodes_of(int8_bundle, ("attic",)) as (serving, origin):
        found = found_of(serving)
        async with open_ring(origin, int8_bundle, found) as ring:
            monkeypatch.setattr(StageRunner, "run", run_long)
            answer = asyncio.create_task(answer_of(ring, prompts[0], OPTIONS))
            await until(begun.is_set)
            answer.cancel()
            await asyncio.wait({answer})
        monkeypatch.setattr(StageRunner, "run", run)
        await until(lambda: serving[0].memory.free_bytes == GIB)
        assert not serving[0].kept._kept, "its last forward has not ended"
        asyncio.get_running_loop().call_soon(may_end.set)
        assert len(await text_of(origin, int8_bundle, found, prompts[0])) == 12
    assert loaded == [(0, 8)]


@pytest.mark.parametrize("is_failed", [False, True])
async def test_its_memory_goes_with_it_whatever_still_refers_to_it(
    int8_bundle: Bundle,
    prompts: list[list[int]],
    graphs: list[weakref.ref[Any]],
    monkeypatch: pytest.MonkeyPatch,
    is_failed: bool,
) -> None:
    monkeypatch.setattr(kept_layers, "KEEP_S", 0.0)
    gc.disable()
    try:
        async with nodes_of(int8_bundle, ("attic",)) as (serving, origin):
            if is_failed:
                monkeypatch.setattr(StageRunner, "run", refuse)
            with contextlib.suppress(StageFailedError):
                await text_of(origin, int8_bundle, found_of(serving), prompts[0])
            assert len(graphs) == 8
            await until(lambda: not any(graph() for graph in graphs))
    finally:
        gc.enable()


async def test_a_stage_that_failed_is_not_used_again(
    int8_bundle: Bundle, prompts: list[list[int]], loaded: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes_of(int8_bundle, ("attic",)) as (serving, origin):
        with monkeypatch.context() as broken:
            broken.setattr(StageRunner, "run", refuse)
            with pytest.raises(StageFailedError, match="out of memory"):
                await text_of(origin, int8_bundle, found_of(serving), prompts[0])
        assert len(await text_of(origin, int8_bundle, found_of(serving), prompts[0])) == 12
    assert loaded == [(0, 8), (0, 8)]


def refuse(*arguments: object) -> None:
    raise StageFailedError("out of memory")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
