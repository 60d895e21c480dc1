"""How a stage comes to be on a node, and what becomes of it: messages in, messages out. No sockets, no ONNX."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.device.caps import Caps
from flowspec_edge.core.planning.placement import stage_memory_bytes
from flowspec_edge.core.rows import NO_PARENT, Chunk, Row, SessionSpec
from flowspec_edge.engine.kept_caches import KeptCaches
from flowspec_edge.engine.stage_runner import Parts, StageRunner
from flowspec_edge.errors import FetchError, LinkLostError, NodeUnavailableError, StageFailedError
from flowspec_edge.manifest import Manifest, load_manifest
from flowspec_edge.net.connection import Link
from flowspec_edge.node import layer_loading, stage_opening
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.arrivals import Arrivals
from flowspec_edge.node.curves import Measurements
from flowspec_edge.node.kept_layers import KeptLayers, LoadedStage
from flowspec_edge.node.pacing import Board, Runner
from flowspec_edge.node.precision_choice import PrecisionChoice
from flowspec_edge.node.resources import MAX_STAGES_PER_PEER, MemoryAccount, NodeSettings, OpenStages
from flowspec_edge.node.sensor_watch import SensorWatch
from flowspec_edge.node.stage_opening import StageOpener, stage_in_use
from flowspec_edge.weights.download import FetchReport
from flowspec_edge.weights.supply import FetchProgress, OnFetch, StageRequest
from tests.fake_links import LIMIT_S, FakeLink, fake_pair, settle

GIB = 2**30
CHUNK = Chunk(1, (Row(0, NO_PARENT, 5),), 1, np.ones((1, 256), np.float32))


class FakeRunner(StageRunner):
    """Notes what it would load; ``fails`` is raised by the next forward."""

    made: list[tuple[Any, ...]]
    loaded: list[tuple[int, int]]
    fails: Exception | None

    def __init__(
        self, directory: Any, manifest: Manifest, start: int, stop: int, *, loaded: Parts, **options: Any
    ) -> None:
        self.made.append((start, stop, options))
        self.parts = dict(loaded)
        for block in manifest.blocks_of(start, stop):
            if block.sha256 not in loaded:
                self.loaded.append((block.start, block.stop))
                self.parts[block.sha256] = object()
        self.caches: set[int] = set()
        self.is_closed = False

    def open_cache(self, session: int, capacity: int) -> None:
        self.caches.add(session)

    def free_cache(self, session: int) -> None:
        self.caches.discard(session)

    def free_caches(self) -> None:
        self.caches.clear()

    def close(self) -> None:
        self.is_closed, self.parts = True, {}

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool] = lambda: False) -> ev.ForwardFinished:
        if self.fails is not None:
            raise self.fails
        return ev.ForwardFinished(np.ones((len(forward.rows), 4), np.float32))


class FakeSupply:
    """Gives a bundle, after what a test wants to happen before."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.wanted: list[StageRequest] = []
        self.loaded: set[str] = set()
        self.files_closed = 0
        self.before: Callable[[OnFetch], Any] | None = None

    async def manifest(self, wanted: StageRequest) -> Manifest:
        self.wanted.append(wanted)
        return self.bundle.manifest

    async def stage(
        self,
        wanted: StageRequest,
        manifest: Manifest,
        files: contextlib.ExitStack,
        on_fetch: OnFetch,
        *,
        loaded: Collection[str] = (),
    ) -> Bundle:
        self.loaded = set(loaded)
        files.callback(self._close)
        if self.before is not None:
            await self.before(on_fetch)
        return self.bundle

    def _close(self) -> None:
        self.files_closed += 1


class SlowedBoard(Board):
    """Notes which stage it is."""

    is_measured = False

    def __init__(self) -> None:
        self.stages: list[int] = []

    def pace(self, runner: Runner, stage: int) -> Runner:
        self.stages.append(stage)
        if stage > 2:
            raise StageFailedError("this testbed has 3 stages")
        return runner


class Opened:
    """A node that opens stages, an origin that asks for them, and the nodes before and behind."""

    def __init__(self, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bundle, self.supply, self.board = bundle, FakeSupply(bundle), SlowedBoard()
        self.memory, self.arrivals, self.kept = MemoryAccount(GIB), Arrivals(), KeptLayers()
        self.precisions, self.fetched, self.activity = PrecisionChoice(), list[FetchProgress](), Activity()
        self.hellos: list[tuple[Any, ...]] = []
        self.after: FakeLink | None = None
        self.is_next_gone = False
        monkeypatch.setattr(FakeRunner, "made", [], raising=False)
        monkeypatch.setattr(FakeRunner, "loaded", [], raising=False)
        monkeypatch.setattr(FakeRunner, "fails", None, raising=False)
        monkeypatch.setattr(layer_loading, "StageRunner", FakeRunner)
        monkeypatch.setattr(stage_opening, "open_link", self._open_link)
        monkeypatch.setattr(SensorWatch, "duty", property(self._duty))
        self.num_asked_for_rest = 0
        settings = NodeSettings(name="hall", cluster="test", num_threads=3, caps=Caps(max_temperature_c=70.0))
        self.opener = StageOpener(
            settings=settings,
            precisions=self.precisions,
            open_stages=OpenStages(),
            memory=self.memory,
            arrivals=self.arrivals,
            kept=self.kept,
            caches=KeptCaches(),
            measurements=Measurements(1),
            supply=self.supply,  # type: ignore[arg-type]
            board=self.board,
            watch=SensorWatch(settings, self.activity),
            activity=self.activity,
            on_fetch=self.fetched.append,
        )
        self.before, self.behind = fake_pair("attic", "hall", wire.DATA, "ring-1/1")

    def _duty(self, watch: SensorWatch) -> float:
        self.num_asked_for_rest += 1
        return 1.0

    async def _open_link(self, host: str, port: int, hello: wire.Hello, **options: Any) -> tuple[Link, wire.Welcome]:
        self.hellos.append((host, port, hello.purpose, hello.ring, options["node"]))
        if self.is_next_gone:
            raise NodeUnavailableError("peer cellar cannot be reached")
        ahead, self.after = fake_pair("hall", "cellar", wire.DATA, hello.ring)
        return ahead, wire.Welcome("cellar", "0.1.0", 0, [])

    def request(self, start: int = 2, stop: int = 4, hop: int = 1, precision: str = "") -> wire.OpenStage:
        layers = (self.bundle.digest, start, stop)
        return wire.OpenStage("ring-1", hop, *layers, "cellar", "192.0.2.5", 7361, [], precision)

    @contextlib.asynccontextmanager
    async def ask(self, request: wire.OpenStage | None = None) -> Any:
        """The origin's end of a control link on which it has asked; it is closed at the end, which ends the stage."""
        origin, control = fake_pair("origin", "hall")
        async with asyncio.timeout(LIMIT_S):
            serving = asyncio.create_task(self.opener.serve(control, request or self.request()))
            try:
                yield origin
            finally:
                await origin.close()
                await serving

    @contextlib.asynccontextmanager
    async def connected(self) -> Any:
        """The same, once the node before has opened its link."""
        async with self.ask() as origin:
            assert isinstance(await origin.receive(), wire.StageOpened)
            arriving = asyncio.create_task(self.arrivals.serve(self.behind))
            await settle()
            yield origin
        await arriving

    @property
    def kept_runner(self) -> FakeRunner | None:
        runners = [stage.runner for stage in self.kept._kept]
        assert len(runners) < 2
        return next((runner for runner in runners if isinstance(runner, FakeRunner)), None)


@pytest.fixture
async def node(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    opened = Opened(bundle, monkeypatch)
    yield opened
    await opened.kept.close()


async def test_a_stage_is_loaded_connected_and_told_before_the_node_before_has_come(node: Opened) -> None:
    memory_bytes = stage_memory_bytes(node.bundle.manifest.blocks_of(2, 4))
    async with node.ask() as origin:
        opened = await origin.receive()
        assert isinstance(opened, wire.StageOpened)
        assert (opened.ring, opened.memory_bytes, opened.fetched_bytes) == ("ring-1", memory_bytes, 0)
        assert node.memory.free_bytes == GIB - memory_bytes
        assert node.hellos == [("192.0.2.5", 7361, wire.DATA, "ring-1/2", "cellar")]
    options = {"num_threads": 3, "precision": None, "has_half_cache": False, "kept": node.opener.caches}
    assert FakeRunner.made == [(2, 4, options)]
    assert node.board.stages == [1]
    assert node.memory.free_bytes == GIB and node.after is not None and not node.after.is_open


async def test_it_works_between_its_links_and_stays_loaded_when_the_origin_has_left(node: Opened) -> None:
    async with node.connected() as origin:
        origin.send(wire.OpenSession(SessionSpec(1, 100)))
        assert await origin.receive() == wire.SessionOpened(1)
        node.before.send(wire.ChunkMessage(0, CHUNK))
        assert node.after is not None
        assert isinstance(await node.after.receive(), wire.ChunkMessage)
        assert node.num_asked_for_rest, "its board is to be kept under a cap"
        assert node.kept_runner is None, "it is in use"
    runner = node.kept_runner
    assert runner is not None and not runner.caches and not runner.is_closed
    async with node.ask() as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
        assert len(node.supply.loaded) == 2, "nothing is read again"
    assert FakeRunner.loaded == [(2, 3), (3, 4)] and node.supply.files_closed == 1 and runner.is_closed


async def test_when_the_origin_has_left_lost_neighbours_are_not_waited_for(
    node: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their links are given up, for a goodbye would take a second that whoever asks for the layers next must wait."""
    given_up: list[str] = []

    def abort(link: FakeLink) -> None:
        given_up.append(link.peer)
        real(link)

    real = FakeLink.abort
    monkeypatch.setattr(FakeLink, "abort", abort)
    async with node.connected():
        pass
    assert sorted(given_up) == ["attic", "cellar"]


@pytest.mark.parametrize(
    ("changes", "loaded"),
    [
        ({"start": 0}, [(0, 1), (1, 2)]),
        ({"stop": 3}, []),
        ({"start": 3, "stop": 5}, [(4, 5)]),
        ({"start": 4, "stop": 5}, [(4, 5)]),
    ],
)
async def test_of_other_layers_those_are_loaded_that_are_not_yet(
    node: Opened, changes: dict[str, Any], loaded: list[tuple[int, int]]
) -> None:
    async with node.ask() as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
    FakeRunner.loaded.clear()
    async with node.ask(node.request(**changes)) as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
        assert not node.kept._kept and node.supply.files_closed == 1, "the first gave way"
    assert FakeRunner.loaded == loaded
    assert FakeRunner.made[-1][:2] == (changes.get("start", 2), changes.get("stop", 4))


async def test_a_precision_set_by_hand_goes_before_a_planned_one(node: Opened) -> None:
    node.precisions.by_hand = "int8"
    async with node.ask(node.request(precision="w8a8")) as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
    assert FakeRunner.made[0][2]["precision"] == node.supply.wanted[0].precision == "int8"


async def test_a_forward_that_fails_is_told_while_the_data_links_stand_and_the_stage_is_freed(node: Opened) -> None:
    FakeRunner.fails = StageFailedError("out of memory")
    async with node.connected() as origin:
        origin.send(wire.OpenSession(SessionSpec(1, 100)))
        assert await origin.receive() == wire.SessionOpened(1)
        node.before.send(wire.ChunkMessage(0, CHUNK))
        assert await origin.receive() == wire.StageFailure("out of memory")
        await settle()
        assert node.before.is_open and node.after is not None and node.after.is_open
    await node.kept.freed()
    assert node.kept_runner is None and node.supply.files_closed == 1
    assert not node.after.is_open and node.memory.free_bytes == GIB


async def test_an_origin_that_does_not_end_the_ring_is_waited_for_only_so_long(
    node: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_opening, "FAILURE_S", 0.01)
    async with node.connected() as origin:
        node.before.cut()
        assert isinstance(await origin.receive(), wire.StageFailure)
        assert node.after is not None
        await node.after.wait_closed()


@pytest.mark.parametrize("is_rule", [False, True])
async def test_a_peers_fault_is_told_and_the_stage_is_as_good_as_before(node: Opened, is_rule: bool) -> None:
    async with node.connected() as origin:
        if is_rule:
            node.before.send(wire.Credit(1))
        else:
            node.before.cut()
        failure = await origin.receive()
        assert isinstance(failure, wire.StageFailure) and "peer attic" in failure.reason
        assert failure.neighbour == ("" if is_rule else "attic")
    assert node.kept_runner is not None


async def test_the_neighbour_that_was_lost_is_named_whoever_noticed(node: Opened) -> None:
    """A chunk that has come cannot be sent on: it is the next node that was lost, not the one that sent it."""
    async with node.connected() as origin:
        assert node.after is not None
        node.after.cut()
        node.before.send(wire.ChunkMessage(0, CHUNK))
        failure = await origin.receive()
        assert isinstance(failure, wire.StageFailure) and failure.neighbour == "cellar"


async def test_a_next_node_that_cannot_be_reached_is_told(node: Opened) -> None:
    node.is_next_gone = True
    async with node.ask() as origin:
        assert await origin.receive() == wire.StageFailure("peer cellar cannot be reached", "cellar")
    assert node.memory.free_bytes == GIB


async def test_a_board_that_cannot_be_that_stage_says_so_before_it_counts_as_open(node: Opened) -> None:
    async with node.ask(node.request(hop=3)) as origin:
        assert await origin.receive() == wire.StageFailure("this testbed has 3 stages")
    assert not node.hellos


async def test_weights_that_cannot_be_had_are_told(node: Opened) -> None:
    async def fail(on_fetch: OnFetch) -> None:
        raise FetchError("no source has layers-002-003.onnx")

    node.supply.before = fail
    async with node.ask() as origin:
        assert await origin.receive() == wire.StageFailure("no source has layers-002-003.onnx")
    assert not FakeRunner.loaded and node.supply.files_closed == 1 and node.memory.free_bytes == GIB


async def test_stages_without_end_are_refused_before_they_take_anything(node: Opened) -> None:
    async def fetch_for_ever(on_fetch: OnFetch) -> None:
        await asyncio.Event().wait()

    node.supply.before = fetch_for_ever
    async with contextlib.AsyncExitStack() as asked:
        for hop in range(MAX_STAGES_PER_PEER):
            await asked.enter_async_context(node.ask(node.request(hop=hop)))
        await settle()
        taken = node.memory.free_bytes
        origin = await asked.enter_async_context(node.ask())
        limit = "has 8 stages of origin, the limit (MAX_STAGES_PER_PEER)"
        assert await origin.receive() == wire.StageFailure(limit)
        assert len(node.supply.wanted) == MAX_STAGES_PER_PEER and node.memory.free_bytes == taken
    node.supply.before = None
    async with node.ask() as origin:
        assert isinstance(await origin.receive(), wire.StageOpened), "they have ended"


async def test_layers_for_which_there_is_no_memory_are_not_loaded(node: Opened) -> None:
    node.memory.offered_bytes = 2**20
    async with node.ask() as origin:
        failure = await origin.receive()
        assert isinstance(failure, wire.StageFailure) and "has 1 MiB free of the 1 that it offers" in failure.reason
    assert not FakeRunner.loaded and node.supply.files_closed == 0


async def test_a_kept_stage_for_which_there_is_no_memory_any_more_is_freed(node: Opened) -> None:
    async with node.ask() as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
    assert node.kept_runner is not None
    node.memory.offered_bytes = 2**20
    async with node.ask() as origin:
        assert isinstance(await origin.receive(), wire.StageFailure)
    await node.kept.freed()
    assert node.kept_runner is None and node.supply.files_closed == 1


async def test_an_origin_that_leaves_ends_the_fetch(node: Opened) -> None:
    ended = asyncio.Event()

    async def fetch_for_ever(on_fetch: OnFetch) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    node.supply.before = fetch_for_ever
    async with node.ask():
        await settle()
        assert node.memory.free_bytes < GIB, "reserved before anything is fetched"
    assert ended.is_set() and not FakeRunner.loaded and node.memory.free_bytes == GIB


async def test_an_origin_that_leaves_ends_the_wait_for_the_node_before(node: Opened) -> None:
    async with node.ask() as origin:
        assert isinstance(await origin.receive(), wire.StageOpened)
        await settle()
    assert node.kept_runner is not None


async def test_a_fetch_is_told_to_the_origin_now_and_then_and_to_the_nodes_user_always(node: Opened) -> None:
    async def fetch(on_fetch: OnFetch) -> None:
        progress = FetchProgress("model", 2, 4, total_bytes=100)
        for num_bytes in (0, 10, 100):
            progress.num_bytes = num_bytes
            on_fetch(progress)
        progress.report = FetchReport({}, [])
        on_fetch(progress)

    node.supply.before = fetch
    async with node.ask() as origin:
        assert await origin.receive() == wire.StageProgress("ring-1", 0, 100)
        assert await origin.receive() == wire.StageProgress("ring-1", 100, 100)
        opened = await origin.receive()
    assert isinstance(opened, wire.StageOpened) and opened.fetched_bytes == 100
    assert len(node.fetched) == 4


async def test_a_link_that_came_before_its_stage_was_loaded_is_not_refused(node: Opened) -> None:
    node.arrivals.limit_s = 0.01
    may_load = asyncio.Event()

    async def wait(on_fetch: OnFetch) -> None:
        await may_load.wait()

    node.supply.before = wait
    async with node.ask() as origin:
        await settle()
        arriving = asyncio.create_task(node.arrivals.serve(node.behind))
        await asyncio.wait({arriving}, timeout=0.03)
        assert not arriving.done()
        may_load.set()
        assert isinstance(await origin.receive(), wire.StageOpened)
        origin.send(wire.OpenSession(SessionSpec(1, 100)))
        assert await origin.receive() == wire.SessionOpened(1)
    await arriving


# ---------------------------------------------------------------------- its end


def loaded_stage(closed: list[str]) -> LoadedStage:
    runner = FakeRunner(None, load_manifest(DEMO_BUNDLE), 0, 4, loaded={})
    files = contextlib.ExitStack()
    files.callback(closed.append, "files")
    return LoadedStage(None, runner, 0, files)  # type: ignore[arg-type]


async def test_a_stage_whose_end_is_cancelled_lets_go_of_its_files(node: Opened) -> None:
    kept, closed, may_end = KeptLayers(), list[str](), threading.Event()
    stage = loaded_stage(closed)

    async def use() -> None:
        async with stage_in_use(kept, stage, FakeLink("origin"), executor):
            pass

    with ThreadPoolExecutor(1) as executor:
        executor.submit(may_end.wait)
        ending = asyncio.create_task(use())
        await settle()
        ending.cancel()
        await asyncio.wait({ending})
        may_end.set()
    assert ending.cancelled() and not kept._kept
    await kept.freed()
    assert closed == ["files"] and stage.runner.is_closed  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [(LinkLostError("lost"), True), (StageFailedError("failed"), False), (ValueError("bug"), False)],
)
async def test_only_a_sound_stage_is_kept(node: Opened, error: Exception, is_kept: bool) -> None:
    kept, closed = KeptLayers(), list[str]()
    with ThreadPoolExecutor(1) as executor, pytest.raises(type(error)):
        async with stage_in_use(kept, loaded_stage(closed), FakeLink("origin"), executor):
            raise error
    assert bool(kept._kept) == is_kept
    await kept.close()
    assert closed == ["files"]


async def test_what_nobody_foresaw_reaches_the_origin_with_its_reason(
    node: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    FakeRunner.fails = IndexError("row 5 is out of bounds")
    async with node.connected() as origin:
        origin.send(wire.OpenSession(SessionSpec(1, 100)))
        assert await origin.receive() == wire.SessionOpened(1)
        node.before.send(wire.ChunkMessage(0, CHUNK))
        failure = await origin.receive()
        assert isinstance(failure, wire.StageFailure)
        assert "a bug in flowspec-edge (IndexError: row 5 is out of bounds)" in failure.reason
    assert node.kept_runner is None and node.memory.free_bytes == GIB
    assert "Traceback" in caplog.text


async def test_a_neighbour_that_breaks_the_rules_is_told_why_after_the_origin(node: Opened) -> None:
    async with node.connected() as origin:
        node.before.send(wire.ChunkMessage(0, replace(CHUNK, hidden=np.ones((1, 3), np.float32))))
        failure = await origin.receive()
        said = "peer attic: hidden rows of 3 values came where the model has 256"
        assert failure == wire.StageFailure(said)
        assert node.before.is_open, "or the origin might blame another one"
    await settle()
    assert node.before.closed_by is not None and str(node.before.closed_by) == said
