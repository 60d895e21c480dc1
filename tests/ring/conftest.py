"""Whole rings over loopback sockets: real links, real ONNX Runtime, the demo model."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions, Piece, RowKind
from flowspec_edge.core import events as ev
from flowspec_edge.core.device import throttling
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.shared_cores import Cores
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node import curves
from flowspec_edge.node.node import Node
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.node.sensors import BoardPower
from flowspec_edge.origin import planning
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from tests.held_out import held_out_prompts

GIB = 2**30


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    return held_out_prompts()


@pytest.fixture(scope="session")
def int8_bundle() -> Bundle:
    return Bundle.load(DEMO_BUNDLE)


@pytest.fixture(scope="session")
def fp32_bundle(two_precisions: Bundle) -> Bundle:
    """Its own precision is float32, and rings that are not planned keep to it."""
    return two_precisions


@pytest.fixture(scope="session")
def two_precisions(demo_export: Callable[..., Path]) -> Bundle:
    return Bundle.load(demo_export("fp32", "int8"))


@pytest.fixture(scope="session", params=["int8", "fp32"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    found: Bundle = request.getfixturevalue(f"{request.param}_bundle")
    return found


_models: dict[str, UnsplitModel] = {}
_texts: dict[tuple[str, tuple[int, ...], GenerateOptions], list[int]] = {}


def unsplit_tokens(bundle: Bundle, prompt: list[int], options: GenerateOptions) -> list[int]:
    """What the unsplit model writes, computed once in this process."""
    key = bundle.digest, tuple(prompt), dataclasses.replace(options, schedule=GenerateOptions().schedule)  # it has none
    if key not in _texts:
        if bundle.digest not in _models:
            _models[bundle.digest] = UnsplitModel(bundle.directory, bundle.manifest)
        _texts[key] = list(_models[bundle.digest].generate(prompt, options))
    return _texts[key]


@contextlib.asynccontextmanager
async def ring_of(
    num_nodes: int, bundle: Bundle, power: BoardPower | None = None, row_kind: RowKind = "float32"
) -> AsyncIterator[Ring]:
    """A ring over that many nodes in this process, found by address; discovery has tests of its own. Those that serve
    have such ``power`` sensors. Hidden rows travel as ``row_kind``.
    """
    nodes: list[Node] = []

    async def start(name: str, power: BoardPower | None = None) -> Node:
        settings = NodeSettings(
            name=name,
            cluster="test",
            bundles=(bundle,),
            memory_bytes=GIB,
            is_announced=False,
            power=power,
            row_kind=row_kind,
        )
        nodes.append(await Node.start(settings))
        return nodes[-1]

    try:
        serving = [await start(f"node-{number}", power) for number in range(num_nodes)]
        origin = await start("origin")
        async with open_ring(origin, bundle, [node.announcement for node in serving]) as ring:
            yield ring
    finally:
        await asyncio.gather(*(node.close() for node in nodes))


async def answer_of(
    ring: Ring, prompt: list[int], options: GenerateOptions, on_trip: Callable[[ev.ReportTrip], None] | None = None
) -> list[Piece]:
    """All pieces of an answer."""
    async with contextlib.aclosing(ring.generate(prompt, options, on_trip)) as answer:
        return [piece async for piece in answer]


def tokens_of(pieces: Iterable[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


@contextlib.asynccontextmanager
async def nodes_of(
    bundle: Bundle,
    names: Sequence[str] = ("attic", "cellar", "hall"),
    *,
    memory_bytes: int = GIB,
    board: Callable[[], Board] | None = None,
    has_half_cache: bool = False,
    cores: Cores | None = None,
) -> AsyncIterator[tuple[list[Node], Node]]:
    """Serving nodes in this process, and an origin."""
    nodes: list[Node] = []
    try:
        for name in [*names, "origin"]:
            settings = NodeSettings(
                name=name,
                cluster="test",
                bundles=(bundle,),
                memory_bytes=memory_bytes,
                is_announced=False,
                has_half_cache=has_half_cache,
                cores=cores or Cores(),
            )
            nodes.append(await Node.start(settings, board() if board else None))
        yield nodes[:-1], nodes[-1]
    finally:
        await asyncio.gather(*(node.close() for node in nodes))


@pytest.fixture
def quick_curve(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each node says at once that a layer takes it 400 ms; how often is counted."""
    measured: list[str] = []

    def measure(self: curves.Measurements, bundle: Bundle, precision: str, free_bytes: int) -> Line:
        measured.append(bundle.manifest.name)
        return Line(400.0, 1.0)

    monkeypatch.setattr(curves.Measurements, "_measure", measure)
    monkeypatch.setattr(throttling, "QUICK", 0.0)  # or real forwards would correct it
    monkeypatch.setattr(planning, "origin_costs", lambda bundle, num_threads: (0.5, 1.0))
    return measured


def found_of(nodes: Iterable[Node]) -> list[Announcement]:
    return [node.announcement for node in nodes]
