"""A stage's weights: taken from where they lie, fetched where they are missing, checked and held in either case."""

import asyncio
import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.errors import BundleError, CacheError, FetchError, StageFailedError
from flowspec_edge.manifest import FileEntry, describe_file, load_manifest
from flowspec_edge.weights import supply as weight_supply
from flowspec_edge.weights.cache import WeightCache
from flowspec_edge.weights.part import Part
from flowspec_edge.weights.supply import FetchProgress, StageRequest, WeightSupply
from tests.weights.peers import MakePeer, Peer

BLOCK_BYTES = 3000
NOWHERE = Source("nowhere", "127.0.0.1", 9)

Told = list[tuple[int, int]]
"""What was reported of fetches: bytes that came, and bytes that were missing."""
Entry = TypeVar("Entry", bound=FileEntry)


class MakeSupply(Protocol):
    def __call__(self, bundles: Sequence[Bundle] = (), cache: WeightCache | None = None) -> WeightSupply: ...


class GetStage(Protocol):
    async def __call__(
        self,
        supply: WeightSupply,
        bundle: Bundle,
        sources: Sequence[Source] = (),
        start: int = 2,
        stop: int = 4,
        precision: str | None = None,
    ) -> Bundle: ...


def make_bundle(directory: Path, blocks: Sequence[bytes] | None = None) -> Bundle:
    """A bundle of the demo model's shape whose files are a few random bytes; ``blocks`` are the bytes of its blocks."""
    manifest = load_manifest(DEMO_BUNDLE)
    blocks = blocks or [os.urandom(BLOCK_BYTES) for _ in manifest.blocks]
    halves = [data[: BLOCK_BYTES // 2] for data in blocks]

    def written(entry: Entry, data: bytes, folder: str = "") -> Entry:
        path = directory / folder / entry.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return dataclasses.replace(entry, **describe_file(directory, str(path.relative_to(directory))))

    dataclasses.replace(
        manifest,
        tokenizer=written(manifest.tokenizer, os.urandom(500)),
        embedding=written(manifest.embedding, os.urandom(500)),
        head=written(manifest.head, os.urandom(500)),
        final_norm=written(manifest.final_norm, os.urandom(100)),
        drafter=None,
        blocks=[written(entry, data) for entry, data in zip(manifest.blocks, blocks, strict=True)],
        alternatives={
            "half": [written(entry, data, "half") for entry, data in zip(manifest.blocks, halves, strict=True)]
        },
    ).write(directory)
    return Bundle.load(directory)


def blocks_of(bundle: Bundle) -> list[bytes]:
    return [(bundle.directory / entry.file).read_bytes() for entry in bundle.manifest.blocks]


def files_of(bundle: Bundle) -> list[bytes]:
    """The bytes of all its files, its manifest among them."""
    entries = bundle.manifest.files()
    return [*((bundle.directory / entry.file).read_bytes() for entry in entries), bundle.manifest.to_json().encode()]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def supply_of() -> Iterator[MakeSupply]:
    """Makes supplies."""
    with ThreadPoolExecutor(1) as executor:

        def make(bundles: Sequence[Bundle] = (), cache: WeightCache | None = None) -> WeightSupply:
            return WeightSupply(bundles, cache, executor)

        yield make


@pytest.fixture
async def origin(peers: MakePeer, bundle: Bundle) -> Peer:
    """A node that has the whole bundle."""
    return await peers("origin", files_of(bundle))


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as held:
        yield held


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def get_stage(held: contextlib.ExitStack, told: Told) -> GetStage:
    """Gives a stage of a bundle, once its files are here."""

    async def get(
        supply: WeightSupply,
        bundle: Bundle,
        sources: Sequence[Source] = (),
        start: int = 2,
        stop: int = 4,
        precision: str | None = None,
    ) -> Bundle:
        request = StageRequest(bundle.digest, start, stop, tuple(sources), precision)

        def report(progress: FetchProgress) -> None:
            told.append((progress.num_bytes, progress.total_bytes))

        async with asyncio.timeout(20):
            return await supply.stage(request, await supply.manifest(request), held, report)

    return get


def whole_files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def asked_files(peer: Peer) -> list[str]:
    """Which files the peer was asked for, each as often as it was."""
    return sorted(name for name, _ in peer.asked if name != "have")


def names_of(cache: WeightCache) -> set[str]:
    return {file.sha256 for file in cache.files()}


def file_in(cache: WeightCache, entry: FileEntry) -> Path:
    path = cache.find(entry.sha256)
    assert path is not None
    return path


def part_in(cache: WeightCache, entry: FileEntry) -> Part:
    part = cache.open_part(entry.sha256)
    assert part is not None
    return part


def fill(cache: WeightCache, entry: FileEntry, data: bytes, *, is_finished: bool = True) -> None:
    part = part_in(cache, entry)
    part.write(data)
    if is_finished:
        assert part.finish() == entry.sha256
    part.close()


async def test_an_own_bundle_is_used_as_it_is(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, told: Told
) -> None:
    supply = supply_of([bundle], cache)
    assert await get_stage(supply, bundle) is bundle
    assert told == [] and cache.files() == []
    assert supply.digests == [bundle.digest]
    assert supply.known(bundle.digest) == (bundle, bundle.manifest)
    assert supply.find(bundle.manifest.blocks[2].sha256) == bundle.directory / bundle.manifest.blocks[2].file
    assert supply.find(bundle.digest) == bundle.manifest.to_json().encode()


async def test_a_damaged_file_of_an_own_bundle_is_refused_where_a_stage_needs_it(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle
) -> None:
    supply = supply_of([bundle])
    (bundle.directory / bundle.manifest.blocks[5].file).write_bytes(bytes(BLOCK_BYTES))
    assert await get_stage(supply, bundle) is bundle
    with pytest.raises(BundleError, match=r"layers-005-006.onnx: sha256 is .* the file is damaged"):
        await get_stage(supply, bundle, start=4, stop=6)


async def test_what_is_missing_is_fetched_and_nothing_else(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer, told: Told
) -> None:
    supply = supply_of((), cache)
    assert supply.can_fetch and supply.digests == []
    stage = await get_stage(supply, bundle, [origin.source])
    blocks = bundle.manifest.blocks[2:4]
    assert whole_files(stage.directory) == {"manifest.json", *(entry.file for entry in blocks)}
    assert [(stage.directory / entry.file).read_bytes() for entry in blocks] == blocks_of(bundle)[2:4]
    assert (stage.manifest, stage.digest) == (bundle.manifest, bundle.digest)
    assert asked_files(origin) == sorted([bundle.digest, *(entry.sha256 for entry in blocks)])
    assert told[0] == (0, 2 * BLOCK_BYTES) and told[-1] == (2 * BLOCK_BYTES, 2 * BLOCK_BYTES)
    assert told == sorted(told)


async def test_what_was_fetched_once_is_asked_of_nobody_again_and_handed_out(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer, told: Told
) -> None:
    await get_stage(supply_of((), cache), bundle, [origin.source])
    asked, again = list(origin.asked), supply_of((), cache)
    told.clear()
    await get_stage(again, bundle, [NOWHERE])
    assert told == [] and origin.asked == asked
    assert again.find(bundle.manifest.blocks[2].sha256) == file_in(cache, bundle.manifest.blocks[2])
    assert again.find(bundle.digest) == bundle.manifest.to_json().encode()
    assert again.find(bundle.manifest.blocks[0].sha256) is None
    assert again.known(bundle.digest) == (None, bundle.manifest)


async def test_a_manifest_is_kept_before_any_file_is_fetched(
    supply_of: MakeSupply, bundle: Bundle, cache: WeightCache, origin: Peer
) -> None:
    supply = supply_of((), cache)
    assert await supply.manifest(StageRequest(bundle.digest, 2, 4, (origin.source,))) == bundle.manifest
    assert await supply.manifest(StageRequest(bundle.digest, 2, 4, (NOWHERE,))) == bundle.manifest
    assert asked_files(origin) == [bundle.digest] and cache.files() == []


async def test_first_and_last_stage_get_what_they_need_besides(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer
) -> None:
    stage = await get_stage(supply_of((), cache), bundle, [origin.source], start=0, stop=8)
    manifest = bundle.manifest
    entries = [*manifest.blocks, manifest.embedding, manifest.final_norm]
    assert whole_files(stage.directory) == {"manifest.json", *(entry.file for entry in entries)}


async def test_only_the_precision_that_is_asked_for_is_fetched(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer, told: Told
) -> None:
    await get_stage(supply_of((), cache), bundle, [origin.source], precision="half")
    assert names_of(cache) == {entry.sha256 for entry in bundle.manifest.alternatives["half"][2:4]}
    assert told[-1] == (BLOCK_BYTES, BLOCK_BYTES)


async def test_what_is_loaded_already_is_neither_fetched_nor_read(
    supply_of: MakeSupply, bundle: Bundle, cache: WeightCache, origin: Peer
) -> None:
    blocks, wanted = bundle.manifest.blocks[2:5], StageRequest(bundle.digest, 2, 5, (origin.source,))

    async def gather(supply: WeightSupply, held: contextlib.ExitStack, *loaded: str) -> set[str]:
        manifest = await supply.manifest(wanted)
        stage = await supply.stage(wanted, manifest, held, lambda progress: None, loaded=loaded)
        return whole_files(stage.directory) - {"manifest.json"}

    with contextlib.ExitStack() as held:
        here = await gather(supply_of((), cache), held, blocks[0].sha256)
        assert here == {blocks[1].file, blocks[2].file}, "the first one lies nowhere"
    damaged = file_in(cache, blocks[1])
    damaged.write_bytes(bytes(BLOCK_BYTES))
    with contextlib.ExitStack() as held:
        await gather(supply_of((), cache), held, blocks[0].sha256, blocks[1].sha256)
        assert damaged.read_bytes() == bytes(BLOCK_BYTES)
        assert {file.sha256 for file in cache.files() if file.is_in_use} == names_of(cache), "held all the same"
    (bundle.directory / blocks[0].file).write_bytes(bytes(BLOCK_BYTES))
    with contextlib.ExitStack() as held:
        await gather(supply_of([bundle]), held, blocks[0].sha256)
        with pytest.raises(BundleError):
            await gather(supply_of([bundle]), held)


async def test_a_file_that_two_layers_share_is_fetched_once(
    supply_of: MakeSupply, get_stage: GetStage, cache: WeightCache, peers: MakePeer, tmp_path: Path, told: Told
) -> None:
    bundle = make_bundle(tmp_path / "same", [bytes([number // 2]) * BLOCK_BYTES for number in range(8)])
    origin = await peers("origin", files_of(bundle))
    stage = await get_stage(supply_of((), cache), bundle, [origin.source])
    assert told[-1] == (BLOCK_BYTES, BLOCK_BYTES)
    assert len(whole_files(stage.directory)) == 3


async def test_files_of_another_own_bundle_are_used_where_they_lie(
    supply_of: MakeSupply,
    get_stage: GetStage,
    bundle: Bundle,
    cache: WeightCache,
    peers: MakePeer,
    tmp_path: Path,
    told: Told,
) -> None:
    other = make_bundle(tmp_path / "other", [*blocks_of(bundle)[:3], *(os.urandom(BLOCK_BYTES) for _ in range(5))])
    origin = await peers("origin", files_of(other))
    stage = await get_stage(supply_of([bundle], cache), other, [origin.source])
    assert told[-1] == (BLOCK_BYTES, BLOCK_BYTES)
    assert names_of(cache) == {other.manifest.blocks[3].sha256}
    assert (stage.directory / other.manifest.blocks[2].file).samefile(bundle.directory / bundle.manifest.blocks[2].file)


async def test_a_damaged_file_of_another_own_bundle_is_fetched_and_left_as_it_is(
    supply_of: MakeSupply,
    get_stage: GetStage,
    bundle: Bundle,
    cache: WeightCache,
    peers: MakePeer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    blocks, path = blocks_of(bundle), bundle.directory / bundle.manifest.blocks[2].file
    other = make_bundle(tmp_path / "other", blocks)
    origin = await peers("origin", files_of(other))
    supply = supply_of([bundle], cache)
    path.write_bytes(b"damaged")
    stage = await get_stage(supply, other, [origin.source])
    assert (stage.directory / other.manifest.blocks[2].file).read_bytes() == blocks[2]
    assert path.read_bytes() == b"damaged"
    assert "layers-002-003.onnx: damaged; blocks/layers-002-003.onnx is fetched from another node" in caplog.text


async def test_a_damaged_file_in_the_cache_is_fetched_anew(
    supply_of: MakeSupply,
    get_stage: GetStage,
    bundle: Bundle,
    cache: WeightCache,
    origin: Peer,
    told: Told,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second = bundle.manifest.blocks[2:4]
    fill(cache, first, blocks_of(bundle)[2])
    fill(cache, second, blocks_of(bundle)[3])
    file_in(cache, first).write_bytes(bytes(BLOCK_BYTES))
    stage = await get_stage(supply_of((), cache), bundle, [origin.source])
    assert told[-1] == (BLOCK_BYTES, BLOCK_BYTES)
    assert (stage.directory / first.file).read_bytes() == blocks_of(bundle)[2]
    assert "blocks/layers-002-003.onnx: damaged on this disk, and fetched anew" in caplog.text


async def test_a_part_is_gone_on_with(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer, told: Told
) -> None:
    entry = bundle.manifest.blocks[2]
    fill(cache, entry, blocks_of(bundle)[2][:1000], is_finished=False)
    stage = await get_stage(supply_of((), cache), bundle, [origin.source], stop=3)
    assert told[0] == (0, BLOCK_BYTES - 1000)
    assert (entry.sha256, "bytes=1000-") in origin.asked
    assert (stage.directory / entry.file).read_bytes() == blocks_of(bundle)[2]


async def test_a_part_that_had_all_its_bytes_is_finished_without_a_fetch(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, peers: MakePeer, told: Told
) -> None:
    origin = await peers("origin", [bundle.manifest.to_json().encode()])
    fill(cache, bundle.manifest.blocks[2], blocks_of(bundle)[2], is_finished=False)
    await get_stage(supply_of((), cache), bundle, [origin.source], stop=3)
    assert told == []
    assert names_of(cache) == {bundle.manifest.blocks[2].sha256}


async def test_a_part_that_had_as_many_wrong_bytes_is_fetched_whole(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer, told: Told
) -> None:
    fill(cache, bundle.manifest.blocks[2], bytes(BLOCK_BYTES), is_finished=False)
    await get_stage(supply_of((), cache), bundle, [origin.source], stop=3)
    assert told[0] == (0, BLOCK_BYTES)
    assert file_in(cache, bundle.manifest.blocks[2]).read_bytes() == blocks_of(bundle)[2]


async def test_what_another_process_fetches_is_waited_for(
    supply_of: MakeSupply,
    get_stage: GetStage,
    bundle: Bundle,
    cache: WeightCache,
    origin: Peer,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_supply, "BUSY_S", 0.001)
    entry = bundle.manifest.blocks[2]
    part = part_in(cache, entry)  # locks belong to an opened file, so this is as good as another process
    looked, part_bytes = asyncio.Event(), cache.part_bytes

    def tell_and_look(sha256: str) -> int:
        looked.set()
        return part_bytes(sha256)

    monkeypatch.setattr(cache, "part_bytes", tell_and_look)
    waiting = asyncio.create_task(get_stage(supply_of((), cache), bundle, [origin.source], stop=3))
    await looked.wait()
    part.write(blocks_of(bundle)[2])
    part.finish()
    assert not waiting.done()
    part.close()
    await waiting
    assert told == [] and asked_files(origin) == [bundle.digest]


async def test_another_process_that_stands_still_is_not_waited_for_forever(
    supply_of: MakeSupply,
    get_stage: GetStage,
    bundle: Bundle,
    cache: WeightCache,
    origin: Peer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weight_supply, "BUSY_S", 0.001)
    monkeypatch.setattr(weight_supply, "BUSY_LIMIT_S", 0.02)
    part = part_in(cache, bundle.manifest.blocks[2])
    part.write(b"x" * 77)
    with contextlib.closing(part), pytest.raises(FetchError, match=r"stands still at 77 bytes; .* --cache DIR"):
        await get_stage(supply_of((), cache), bundle, [origin.source])


async def test_what_nobody_has_is_told_with_every_source_and_can_be_tried_again(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer, peers: MakePeer
) -> None:
    poor = await peers("poor", [bundle.manifest.to_json().encode()])
    supply = supply_of((), cache)
    with pytest.raises(FetchError, match=r"the manifest of bundle .* nowhere at 127.0.0.1:9 cannot be reached"):
        await get_stage(supply, bundle, [NOWHERE])
    with pytest.raises(
        FetchError, match=r"layers-00\d-00\d.onnx .*: poor at .* does not have it; nowhere at .* cannot be"
    ):
        await get_stage(supply, bundle, [poor.source, NOWHERE])
    assert cache.files() == [], "parts without bytes leave no files"
    await get_stage(supply, bundle, [poor.source, origin.source])


async def test_a_node_without_a_cache_fetches_nothing(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, origin: Peer
) -> None:
    supply = supply_of()
    assert not supply.can_fetch
    assert supply.find(bundle.digest) is None and supply.known(bundle.digest) == (None, None)
    with pytest.raises(StageFailedError, match=r"has no bundle .*; start it with --bundle .* or without --no-cache"):
        await get_stage(supply, bundle, [origin.source])
    assert origin.asked == []


async def test_files_are_held_as_long_as_the_stage_wants(
    supply_of: MakeSupply,
    get_stage: GetStage,
    bundle: Bundle,
    cache: WeightCache,
    origin: Peer,
    held: contextlib.ExitStack,
) -> None:
    await get_stage(supply_of((), cache), bundle, [origin.source])
    assert [file.is_in_use for file in cache.files()] == [True, True]
    cache.limit_bytes = 2 * BLOCK_BYTES
    with pytest.raises(CacheError, match="6000 of them are in use"):
        cache.make_room(1)
    held.close()
    assert [file.is_in_use for file in cache.files()] == [False, False]


async def test_what_does_not_fit_is_refused_before_a_byte_is_fetched(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, origin: Peer, told: Told
) -> None:
    cache.limit_bytes = 2 * BLOCK_BYTES - 1
    with pytest.raises(CacheError, match="1 are missing"):
        await get_stage(supply_of((), cache), bundle, [origin.source])
    assert told == [] and asked_files(origin) == [bundle.digest]
    assert cache.files() == []


async def test_room_is_made_by_evicting_what_nobody_holds(
    supply_of: MakeSupply,
    get_stage: GetStage,
    bundle: Bundle,
    cache: WeightCache,
    origin: Peer,
    held: contextlib.ExitStack,
) -> None:
    supply = supply_of((), cache)
    await get_stage(supply, bundle, [origin.source], start=0, stop=1)
    held.close()
    cache.limit_bytes = 2 * BLOCK_BYTES
    await get_stage(supply, bundle, [origin.source])
    assert names_of(cache) == {entry.sha256 for entry in bundle.manifest.blocks[2:4]}


async def test_a_manifest_that_leads_outside_is_refused(
    supply_of: MakeSupply, get_stage: GetStage, bundle: Bundle, cache: WeightCache, peers: MakePeer
) -> None:
    data = json.loads(bundle.manifest.to_json())
    data["blocks"][2]["file"] = "../outside.onnx"
    text = json.dumps(data).encode()
    liar = await peers("liar", [text])
    digest = next(iter(liar.files))
    request = StageRequest(digest, 2, 4, (liar.source,))
    with pytest.raises(BundleError, match=rf"{digest[:12]}/manifest.json: names the file '../outside.onnx'"):
        await supply_of((), cache).manifest(request)
    assert cache.manifests() == {}
