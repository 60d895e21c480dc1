"""Nodes that have nothing get what their layers need, from whoever has it, and nothing else."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import wire
from flowspec_edge.core.planning.placement import StagePlan
from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.errors import FetchError, NodeUnavailableError, StageFailedError
from flowspec_edge.net.auth import Credentials, derive_credentials
from flowspec_edge.net.link import open_link
from flowspec_edge.node import kept_layers
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import node_processes
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from flowspec_edge.weights.cache import WeightCache
from flowspec_edge.weights.download import fetch_manifest
from tests.bundles import other_bundle
from tests.cli.test_commands import run
from tests.narrowing import instance, present
from tests.ring.conftest import GIB, answer_of, tokens_of, unsplit_tokens

pytestmark = pytest.mark.slow

Start = Callable[..., Awaitable[Node]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts nodes, and ends them."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(
            name: str,
            cache: WeightCache | None = None,
            bundles: tuple[Bundle, ...] = (),
            credentials: Credentials | None = None,
        ) -> Node:
            settings = NodeSettings(
                name=name,
                cluster="test",
                bundles=bundles,
                memory_bytes=GIB,
                is_announced=False,
                cache=cache,
                credentials=credentials,
            )
            node = await Node.start(settings)
            stack.push_async_callback(node.close)
            return node

        yield start


@pytest.fixture(autouse=True)
def nothing_is_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_layers, "KEEP_S", 0.0)


@pytest.fixture
def caches(tmp_path: Path) -> list[WeightCache]:
    return [WeightCache(tmp_path / f"cache-{number}") for number in range(4)]


@contextlib.asynccontextmanager
async def ring_of(origin: Node, bundle: Bundle, nodes: Iterable[Node], **options: Any) -> AsyncIterator[Ring]:
    async with open_ring(origin, bundle, [node.announcement for node in nodes], **options) as ring:
        yield ring


def stage_bytes(bundle: Bundle, plan: StagePlan) -> int:
    return sum(entry.num_bytes for entry in bundle.manifest.stage_files(plan.start, plan.stop))


def held(cache: WeightCache) -> set[str]:
    return {file.sha256 for file in cache.files()}


async def test_each_node_fetches_its_own_layers_and_the_next_start_fetches_nothing(
    start: Start, caches: list[WeightCache], int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    origin = await start("origin", bundles=(int8_bundle,))
    nodes = [await start(f"node-{number}", cache) for number, cache in enumerate(caches)]
    options = GenerateOptions(max_new_tokens=12)
    told: dict[StagePlan, tuple[int, int]] = {}

    def on_fetch(plan: StagePlan, num_bytes: int, total_bytes: int) -> None:
        told[plan] = (num_bytes, total_bytes)

    async with ring_of(origin, int8_bundle, nodes, on_fetch=on_fetch) as ring:
        plans = [stage.plan for stage in ring.stages]
        pieces = await answer_of(ring, prompts[0], options)
        assert [stage.fetched_bytes for stage in ring.stages] == [stage_bytes(int8_bundle, plan) for plan in plans]
    assert tokens_of(pieces) == unsplit_tokens(int8_bundle, prompts[0], options)
    assert told == {plan: (stage_bytes(int8_bundle, plan),) * 2 for plan in plans}
    for plan, cache in zip(plans, caches, strict=True):
        assert held(cache) == {entry.sha256 for entry in int8_bundle.manifest.stage_files(plan.start, plan.stop)}
    sent = origin.weights.num_bytes_sent
    manifests = 4 * len(int8_bundle.manifest.to_json().encode())
    assert sent == manifests + sum(stage_bytes(int8_bundle, plan) for plan in plans)
    again = [await start(f"again-{number}", cache) for number, cache in enumerate(caches)]
    async with ring_of(origin, int8_bundle, again) as ring:
        assert [stage.fetched_bytes for stage in ring.stages] == [0, 0, 0, 0]
        assert tokens_of(await answer_of(ring, prompts[0], options)) == tokens_of(pieces)
    assert origin.weights.num_bytes_sent == sent


async def test_weights_are_for_holders_of_the_cluster_key_alone(
    start: Start, caches: list[WeightCache], int8_bundle: Bundle
) -> None:
    credentials, others = derive_credentials(bytes(20)), derive_credentials(bytes([1] * 20))
    origin = await start("origin", bundles=(int8_bundle,), credentials=credentials)
    node = await start("node", caches[0], credentials=credentials)
    async with ring_of(origin, int8_bundle, [node]) as ring:
        assert ring.stages[0].fetched_bytes == stage_bytes(int8_bundle, ring.stages[0].plan)
    sources = [Source("origin", "127.0.0.1", origin.port)]
    text = await fetch_manifest(int8_bundle.digest, sources, tls=credentials.client)
    assert text == int8_bundle.manifest.to_json()
    for tls in (None, others.client):
        with pytest.raises(FetchError, match="origin at 127.0.0.1"):
            await fetch_manifest(int8_bundle.digest, sources, tls=tls)


async def test_another_plan_fetches_what_is_missing_from_peers_and_origin(
    start: Start, caches: list[WeightCache], int8_bundle: Bundle
) -> None:
    origin = await start("origin", bundles=(int8_bundle,))
    nodes = [await start(f"node-{number}", cache) for number, cache in enumerate(caches[:2])]
    async with ring_of(origin, int8_bundle, nodes):
        pass
    sent = origin.weights.num_bytes_sent
    async with ring_of(origin, int8_bundle, nodes[::-1]) as ring:  # each gets the other's layers
        fetched = [stage.fetched_bytes for stage in ring.stages]
    assert fetched == [stage_bytes(int8_bundle, stage.plan) for stage in ring.stages]
    from_peers = [node.weights.num_bytes_sent for node in nodes]
    assert all(from_peers)
    assert origin.weights.num_bytes_sent - sent + sum(from_peers) == sum(fetched)


async def test_a_damaged_file_in_the_cache_is_fetched_anew(
    start: Start,
    caches: list[WeightCache],
    int8_bundle: Bundle,
    prompts: list[list[int]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    origin, node = await start("origin", bundles=(int8_bundle,)), await start("node", caches[0])
    async with ring_of(origin, int8_bundle, [node]):
        pass
    block = int8_bundle.manifest.blocks[5]
    path = present(caches[0].find(block.sha256))
    await until(lambda: not any(file.is_in_use for file in caches[0].files()))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    async with ring_of(origin, int8_bundle, [node]) as ring:
        assert ring.stages[0].fetched_bytes == block.num_bytes
        assert len(tokens_of(await answer_of(ring, prompts[0], GenerateOptions(max_new_tokens=4)))) == 4
    assert f"{block.file}: damaged on this disk" in caplog.text


async def test_the_files_of_an_own_bundle_are_used_where_they_lie(
    start: Start, caches: list[WeightCache], int8_bundle: Bundle, tmp_path: Path
) -> None:
    other = other_bundle(int8_bundle, tmp_path / "other", num_changed=1)
    origin, node = await start("origin", bundles=(other,)), await start("node", caches[0], bundles=(int8_bundle,))
    async with ring_of(origin, other, [node]) as ring:
        assert ring.stages[0].fetched_bytes == other.manifest.blocks[0].num_bytes
    assert held(caches[0]) == {other.manifest.blocks[0].sha256}


async def test_what_no_plan_uses_makes_room_and_what_does_not_fit_is_refused(
    start: Start, caches: list[WeightCache], int8_bundle: Bundle, tmp_path: Path
) -> None:
    other = other_bundle(int8_bundle, tmp_path / "other")
    origin = await start("origin", bundles=(int8_bundle, other))
    whole = stage_bytes(int8_bundle, StagePlan("node", 0, 8, 0))
    caches[0].limit_bytes = whole + 100_000
    node = await start("node", caches[0])
    async with ring_of(origin, int8_bundle, [node]):
        # All of it is in use: a second stage of another model finds no room, and says so.
        with pytest.raises(
            StageFailedError, match=r"node node, layers \[0, 8\): .* in use by open stages.*--cache-limit"
        ):
            async with ring_of(origin, other, [node]):
                pass
        assert len(held(caches[0])) == 10
    await until(lambda: not any(file.is_in_use for file in caches[0].files()))
    async with ring_of(origin, other, [node]):
        wanted = {entry.sha256 for entry in other.manifest.stage_files(0, 8)}
        assert wanted <= held(caches[0])
        assert sum(file.num_bytes for file in caches[0].files()) <= caches[0].limit_bytes


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_origin_that_leaves_ends_the_fetch_and_what_came_is_kept(
    start: Start, caches: list[WeightCache], int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, node = await start("origin", bundles=(int8_bundle,)), await start("node", caches[0])
    came = asyncio.Event()
    node.on_fetch = lambda progress: came.set() if progress.num_bytes else None
    link, _ = await open_link("127.0.0.1", node.port, origin.settings.hello(wire.CONTROL, "ring-1"), node="node")
    source = f"127.0.0.1:{origin.port}/origin"
    link.send(wire.OpenStage("ring-1", 0, int8_bundle.digest, 0, 8, "origin", "127.0.0.1", origin.port, [source]))
    await came.wait()
    await link.close()
    await until(lambda: not any(file.is_in_use for file in caches[0].files()))
    kept = sum(file.num_bytes for file in caches[0].files())
    assert 0 < kept < stage_bytes(int8_bundle, StagePlan("node", 0, 8, 0))
    async with ring_of(origin, int8_bundle, [node]) as ring:
        assert ring.stages[0].fetched_bytes == stage_bytes(int8_bundle, ring.stages[0].plan) - kept


async def test_a_source_that_is_none_and_a_bundle_that_nobody_has(
    start: Start, caches: list[WeightCache], int8_bundle: Bundle
) -> None:
    origin, node = await start("origin", bundles=(int8_bundle,)), await start("node", caches[0])

    async def answer(digest: str, sources: list[str]) -> str:
        link, _ = await open_link("127.0.0.1", node.port, origin.settings.hello(wire.CONTROL, "ring-1"), node="node")
        link.send(wire.OpenStage("ring-1", 0, digest, 0, 8, "origin", "127.0.0.1", origin.port, sources))
        message = await link.receive()
        await link.close()
        return instance(message, wire.StageFailure).reason

    assert "is not a source of weights" in await answer(int8_bundle.digest, ["nowhere"])
    assert "origin at 127.0.0.1" in await answer("0" * 64, [f"127.0.0.1:{origin.port}/origin"])
    assert "no node has it" in await answer("0" * 64, [])
    assert caches[0].files() == []


async def test_a_node_without_a_cache_serves_its_own_bundle_only(start: Start, int8_bundle: Bundle) -> None:
    origin, node = await start("origin", bundles=(int8_bundle,)), await start("node")
    with pytest.raises(NodeUnavailableError, match="may not fetch it; start it with --bundle"):
        async with ring_of(origin, int8_bundle, [node]):
            pass


async def test_node_processes_fetch_once_show_it_at_both_ends_and_start_again_without(
    int8_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As users see it: nodes that were started without a bundle's path answer for one that only the origin has."""
    other = other_bundle(int8_bundle, tmp_path / "other")
    monkeypatch.setenv("FLOWSPEC_HOME", str(tmp_path / "state"))
    asked = (
        "generate",
        "def main(",
        "--bundle",
        str(other.directory),
        "--max-new-tokens",
        "8",
        "--json",
        "--nodes",
        "1",
    )
    fetched = []
    for _ in range(2):
        async with node_processes(1, DEMO_BUNDLE) as (cluster, (node,)):
            status, out, err = await run(*asked, "--cluster", cluster)
            assert status == 0, err
            fetched.append(json.loads(out)["ring"][0]["fetched_bytes"])
            assert (f"fetching {node.name} layers [0, 8): [####" in err) == (len(fetched) == 1)
            present(node.process.stdin).close()
            shown = (await present(node.process.stderr).read()).decode()
            assert ("fetching demo-python-6m layers [0, 8): [####" in shown) == (len(fetched) == 1)
    assert fetched == [sum(block.num_bytes for block in other.manifest.blocks), 0]
    _, out, _ = await run("cache", "list", "--json")
    assert [(file["bundles"], file["state"]) for file in json.loads(out)["files"]] == [
        (["demo-python-6m int8"], "free")
    ] * 8
