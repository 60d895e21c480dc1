"""Boards stand by for each other: when one is lost, the others have its layers already, and the text just goes on."""

import asyncio
import contextlib
import dataclasses
import logging
import socket
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.planning import preparing
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node import standing_by
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import NodeProcess
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.version import __version__
from flowspec_edge.weights.cache import WeightCache
from tests.bundles import unknown_bundle
from tests.narrowing import present
from tests.ring.conftest import GIB, tokens_of, unsplit_tokens
from tests.ring.test_rebalancing import Boards

LIMIT_S = 60
OPTIONS = GenerateOptions(max_new_tokens=60, temperature=0.8, seed=5)
NUM_BEFORE = 8
"""Tokens that are written before a node is lost."""


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "QUIET_S", 0.05)
    monkeypatch.setattr(standing_by, "QUIET_S", 0.0)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was loaded in this process, into ONNX Runtime."""
    count: Counter[str] = Counter()

    class Session(ort.InferenceSession):  # type: ignore[misc]  # the library has no types
        def __init__(self, path: str, *arguments: Any, **options: Any) -> None:
            count[Path(path).name] += 1
            super().__init__(path, *arguments, **options)

    monkeypatch.setattr(ort, "InferenceSession", Session)
    return count


@dataclass
class Ring:
    """A service over two nodes in this process, with a third one between them in a process of its own."""

    service: GenerationService
    nodes: list[Node]
    origin: Node
    victim: NodeProcess | None = None

    def num_bytes_sent(self) -> int:
        """The weights that any node here has sent."""
        return sum(node.weights.num_bytes_sent for node in [*self.nodes, self.origin])

    def layers(self) -> list[tuple[str, int, int]]:
        return [(stage.plan.node, stage.plan.start, stage.plan.stop) for stage in present(self.service.ring).stages]

    async def write(self, prompt: list[int], *, kills: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        async with asyncio.timeout(LIMIT_S), contextlib.aclosing(self.service.generate(prompt, OPTIONS)) as answer:
            async for piece in answer:
                is_now = len(tokens_of(pieces)) < NUM_BEFORE <= len(tokens_of([*pieces, piece]))
                pieces.append(piece)
                if kills and is_now:
                    present(self.victim).kill()
        return pieces

    async def until_ready(self, num_stages: int) -> None:
        async with asyncio.timeout(LIMIT_S):
            while len(self.service.standbys.ready) < num_stages:
                await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def nodes_in(directory: Path, bundle: Bundle) -> AsyncIterator[tuple[list[Node], Node]]:
    """Two nodes that have nothing, and an origin that has the bundle."""
    async with contextlib.AsyncExitStack() as closing:
        nodes = []
        for name in ("attic", "hall", "origin"):
            settings = NodeSettings(name=name, cluster="test", memory_bytes=GIB, is_announced=False)
            own = {"bundles": (bundle,)} if name == "origin" else {"cache": WeightCache(directory / name)}
            nodes.append(await Node.start(dataclasses.replace(settings, **own)))
            closing.push_async_callback(nodes[-1].close)
        yield nodes[:2], nodes[2]


@contextlib.asynccontextmanager
async def ring_of(bundle: Bundle, directory: Path) -> AsyncIterator[Ring]:
    """Nobody but the origin has any file of the bundle."""
    async with contextlib.AsyncExitStack() as closing:
        nodes, origin = await closing.enter_async_context(nodes_in(directory, bundle))
        with socket.create_server((LOOPBACK, 0)) as free:
            port = free.getsockname()[1]
        options = ("--port", str(port), "--cache", str(directory / "cellar"))
        victim = await NodeProcess.start("cellar", "test", DEMO_BUNDLE, *options)
        closing.push_async_callback(victim.stop)
        boards = Boards(nodes)
        cellar = Announcement(node="cellar", host=LOOPBACK, port=port, cluster="test", version=__version__)
        boards.found.insert(1, cellar)
        service = GenerationService(origin, bundle, boards.search, boards=boards, moves=False, has_standbys=True)
        yield Ring(await closing.enter_async_context(service), nodes, origin, victim)


@pytest.mark.slow
async def test_when_a_node_is_killed_nothing_is_fetched_and_nothing_loaded(
    int8_bundle: Bundle, prompts: list[list[int]], tmp_path: Path, loaded: Counter[str]
) -> None:
    bundle = unknown_bundle(int8_bundle, tmp_path / "bundle")
    blocks = [block.file.rpartition("/")[2] for block in bundle.manifest.blocks]
    async with ring_of(bundle, tmp_path) as ring:
        await ring.write(prompts[1])
        assert ring.layers() == [("attic", 0, 3), ("cellar", 3, 6), ("hall", 6, 8)]
        assert {name: loaded[name] for name in blocks} == dict(zip(blocks, (1, 1, 1, 0, 0, 0, 1, 1), strict=True))
        await ring.until_ready(3)
        assert {name: loaded[name] for name in blocks[3:6]} == dict.fromkeys(blocks[3:6], 1)
        expected = unsplit_tokens(bundle, prompts[0], OPTIONS)
        loaded.clear()
        num_bytes_sent = ring.num_bytes_sent()
        assert tokens_of(await ring.write(prompts[0], kills=True)) == expected
        assert ring.layers() == [("attic", 0, 4), ("hall", 4, 8)]
        assert not any(stage.fetched_bytes for stage in present(ring.service.ring).stages)
        assert not loaded and ring.num_bytes_sent() == num_bytes_sent
        await ring.until_ready(2)  # the two that are left stand by for each other
        assert ring.num_bytes_sent() > num_bytes_sent


async def test_a_text_that_begins_stops_what_is_being_prepared(
    int8_bundle: Bundle,
    prompts: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The fetch of a block hardly moves; the text is written meanwhile, and the fetch goes on after it."""
    caplog.set_level(logging.INFO, "flowspec_edge.origin.standby")
    monkeypatch.setattr(standing_by, "FETCH_BYTES_PER_S", 2**18)
    bundle = unknown_bundle(int8_bundle, tmp_path / "bundle")
    async with nodes_in(tmp_path, bundle) as (nodes, origin):
        boards = Boards(nodes)
        service = GenerationService(origin, bundle, boards.search, boards=boards, moves=False, has_standbys=True)
        async with service:
            ring = Ring(service, nodes, origin)
            await ring.write(prompts[1])
            fetching = asyncio.Event()
            for node in nodes:
                node.on_fetch = lambda progress: fetching.set()
            await asyncio.wait_for(fetching.wait(), LIMIT_S)
            assert tokens_of(await ring.write(prompts[0])) == unsplit_tokens(bundle, prompts[0], OPTIONS)
            assert not any(node.kept.standby_bytes for node in nodes)
            assert "the layers are not prepared: that was cancelled" in caplog.text
            monkeypatch.setattr(standing_by, "FETCH_BYTES_PER_S", 2**30)
            await ring.until_ready(2)
