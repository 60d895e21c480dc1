"""The cache on a real disk: nothing half-written is found, nothing in use goes, and processes share it."""

import asyncio
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.engine.embedding import Embedding
from flowspec_edge.errors import BundleError, CacheError
from flowspec_edge.manifest import Manifest, load_manifest, parse_manifest
from flowspec_edge.weights.cache import WeightCache, find_damaged
from tests.narrowing import present

DATA = bytes(range(256)) * 8
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return load_manifest(DEMO_BUNDLE)


def put(cache: WeightCache, data: bytes, used_at: int | None = None) -> str:
    """Keep these bytes; their sha256."""
    sha256 = hashlib.sha256(data).hexdigest()
    part = present(cache.open_part(sha256))
    part.write(data)
    assert part.finish() == sha256
    part.close()
    if used_at is not None:
        os.utime(present(cache.find(sha256)), (used_at, used_at))
    return sha256


def names(cache: WeightCache) -> set[str]:
    return {file.sha256 for file in cache.files()}


def test_a_file_is_found_when_it_is_whole_and_not_before(cache: WeightCache) -> None:
    part = present(cache.open_part(SHA256))
    part.write(DATA[:100])
    assert cache.find(SHA256) is None
    part.close()
    part = present(cache.open_part(SHA256))
    assert part.num_bytes == 100
    part.write(DATA[100:])
    assert cache.find(SHA256) is None
    assert part.finish() == SHA256
    part.close()
    assert present(cache.find(SHA256)).read_bytes() == DATA
    assert names(cache) == {SHA256}


def test_wrong_bytes_never_get_a_files_name(cache: WeightCache) -> None:
    part = present(cache.open_part(SHA256))
    part.write(DATA[:-1] + b"?")
    assert part.finish() != SHA256
    assert cache.find(SHA256) is None
    part.drop()
    part.write(DATA)
    assert part.finish() == SHA256
    part.close()


def test_a_part_without_bytes_leaves_no_file(cache: WeightCache) -> None:
    present(cache.open_part(SHA256)).close()
    assert cache.files() == []


def test_a_part_has_one_writer(cache: WeightCache) -> None:
    part = present(cache.open_part(SHA256))
    assert cache.open_part(SHA256) is None
    part.write(DATA)
    part.finish()
    part.close()
    again = present(cache.open_part(SHA256))
    assert again.num_bytes == 0  # a part of its own, not the finished file
    again.close()
    assert present(cache.find(SHA256)).read_bytes() == DATA


def test_eviction_takes_the_longest_unused_that_nobody_holds(cache: WeightCache) -> None:
    old, middle, new = (put(cache, bytes([i]) * 100, used_at=1000 + i) for i in range(3))
    cache.limit_bytes = 300
    lease = cache.lease()
    assert lease.take(old) == cache.find(old)
    assert [file.sha256 for file in cache.make_room(100)] == [middle]
    assert names(cache) == {old, new}
    with pytest.raises(CacheError, match="201 bytes .* 100 of them are in use"):
        cache.make_room(201)
    assert names(cache) == {old, new}
    lease.close()
    assert {file.sha256 for file in cache.make_room(300)} == {old, new}


def test_what_is_used_counts_as_new(cache: WeightCache) -> None:
    first, second = put(cache, b"a" * 100, used_at=1000), put(cache, b"b" * 100, used_at=2000)
    lease = cache.lease()
    lease.take(first)
    lease.close()
    cache.limit_bytes = 200
    assert [file.sha256 for file in cache.make_room(100)] == [second]


def test_an_embedding_that_another_stage_takes_is_read_on(cache: WeightCache) -> None:
    table = np.arange(12, dtype=np.float32).reshape(3, 4)
    file = io.BytesIO()
    np.save(file, table)
    sha256 = put(cache, file.getvalue(), used_at=1000)
    lease = cache.lease()
    embedding = Embedding(present(lease.take(sha256)))
    assert present(lease.take(sha256))
    assert (embedding.rows([2, 0]) == table[[2, 0]]).all()
    lease.close()


def test_what_another_process_holds_stays(cache: WeightCache) -> None:
    held = put(cache, b"a" * 100)
    code = (
        "import sys; from pathlib import Path; from flowspec_edge.weights.cache import WeightCache\n"
        f"lease = WeightCache(Path({str(cache.directory)!r})).lease(); assert lease.take({held!r})\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert present(other.stdout).readline() == b"held\n"
        assert not cache.remove(held)
        assert [file.is_in_use for file in cache.files()] == [True]
        other.kill()
    assert cache.remove(held)


def test_parts_that_nobody_goes_on_with_are_evicted_too(cache: WeightCache) -> None:
    part = present(cache.open_part(SHA256))
    part.write(DATA)
    cache.limit_bytes = len(DATA)
    with pytest.raises(CacheError):
        cache.make_room(1)
    part.close()
    assert [file.sha256 for file in cache.make_room(1)] == [SHA256 + ".part"]


@pytest.mark.parametrize("name", ["", "..", "../objects", "a" * 63, "A" * 64, "a" * 64 + "/", "a" * 64 + ".part"])
def test_only_sums_are_found(cache: WeightCache, name: str) -> None:
    put(cache, DATA)
    (cache.directory / "objects" / ("a" * 64 + ".part")).write_bytes(b"x")
    assert cache.find(name) is None


def test_links_give_the_manifests_names_and_nothing_is_copied(cache: WeightCache, manifest: Manifest) -> None:
    entry = manifest.blocks[3]
    sha256 = put(cache, (DEMO_BUNDLE / entry.file).read_bytes())
    own = DEMO_BUNDLE / manifest.embedding.file
    directory = cache.link(manifest, {sha256: present(cache.find(sha256)), manifest.embedding.sha256: own})
    assert (directory / entry.file).samefile(present(cache.find(sha256)))
    assert (directory / "embedding.npy").samefile(own)
    assert not (directory / manifest.blocks[0].file).exists()
    assert cache.manifest(directory.name) == manifest
    assert cache.link(manifest, {sha256: present(cache.find(sha256))}) == directory
    cache.forget_empty_bundles()
    assert list(cache.manifests()) == [directory.name]
    cache.remove(sha256)
    cache.forget_empty_bundles()
    assert cache.manifests() == {}


def test_a_damaged_manifest_is_as_good_as_none(cache: WeightCache, manifest: Manifest) -> None:
    directory = cache.keep_manifest(manifest)
    path = directory / "manifest.json"
    for text in ("{", path.read_text().replace("demo", "else"), "\xff"):
        path.write_bytes(text.encode("latin-1"))
        assert cache.manifest(directory.name) is None


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "blocks/../../x", "", ".", "a\0b", "x" * 300, 7, None])
def test_a_manifest_that_names_what_lies_outside_is_refused(
    manifest: Manifest, name: str | int | None, tmp_path: Path
) -> None:
    data = json.loads(manifest.to_json())
    data["blocks"][1]["file"] = name
    with pytest.raises(BundleError, match="outside the bundle or is no file name"):
        parse_manifest(json.dumps(data), tmp_path)


@pytest.mark.parametrize(("field", "value"), [("sha256", "../x"), ("sha256", 5), ("num_bytes", -1), ("num_bytes", "9")])
def test_a_manifest_with_impossible_files_is_refused(
    manifest: Manifest, field: str, value: str | int, tmp_path: Path
) -> None:
    data = json.loads(manifest.to_json())
    data["embedding"][field] = value
    with pytest.raises(BundleError, match="embedding.npy has"):
        parse_manifest(json.dumps(data), tmp_path)


def test_a_stage_needs_its_own_files(manifest: Manifest) -> None:
    blocks = [block.sha256 for block in manifest.blocks]
    first, last = manifest.embedding.sha256, manifest.final_norm.sha256
    assert [file.sha256 for file in manifest.stage_files(0, 2)] == [*blocks[:2], first]
    assert [file.sha256 for file in manifest.stage_files(2, 6)] == blocks[2:6]
    assert [file.sha256 for file in manifest.stage_files(6, 8)] == [*blocks[6:], last]


def test_damage_is_found(cache: WeightCache) -> None:
    sha256, other = put(cache, DATA), put(cache, b"else")
    found, damaged = present(cache.find(sha256)), present(cache.find(other))
    paths = {sha256: found, other: damaged, "0" * 64: cache.directory / "missing"}
    damaged.write_bytes(b"elsf")
    assert find_damaged(paths) == [other, "0" * 64]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match=r"weight cache .*file/weights: .* --cache DIR"):
        WeightCache(tmp_path / "file/weights").open_part(SHA256)


def test_finishing_onto_a_broken_disk_is_named(cache: WeightCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    part = present(cache.open_part(SHA256))
    part.write(DATA)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(CacheError, match="Input/output error; see whether the disk is well"):
        part.finish()
    assert cache.find(SHA256) is None
    part.close()


async def command(*arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", "cache", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return present(process.returncode), out.decode(), err.decode()


@pytest.mark.slow
async def test_list_and_prune(cache: WeightCache, manifest: Manifest) -> None:
    where = ("--cache", str(cache.directory))
    assert (await command("list", *where))[1] == f"{cache.directory}: 0 files, 0.0 MB\n"
    cache.keep_manifest(dataclasses.replace(manifest, name="other"))
    directory = cache.keep_manifest(manifest)
    block, stray = put(cache, (DEMO_BUNDLE / manifest.blocks[0].file).read_bytes(), 1000), put(cache, b"stray", 2000)
    part = present(cache.open_part(manifest.blocks[1].sha256))
    part.write(DATA)
    with contextlib.closing(part):
        _, out, _ = await command("list", *where, "--json")
        listed = {file["sha256"]: file for file in json.loads(out)["files"]}
        assert set(listed) == {block, stray, manifest.blocks[1].sha256}
        assert listed[block]["bundles"] == ["demo-python-6m int8", "other int8"]
        assert listed[block]["file"] == "blocks/layers-000-001.onnx"
        assert listed[manifest.blocks[1].sha256]["state"] == "being fetched, 0% of it"
        assert listed[stray]["bundles"] == []
        _, out, _ = await command("list", *where)
        assert "blocks/layers-000-001.onnx" in out and "3 files, " in out
        status, out, _ = await command("prune", *where, "--limit", "0.0001", "--dry-run", "--json")
        assert [file["sha256"] for file in json.loads(out)["removed"]] == [block]
        assert cache.find(block) is not None
        status, out, _ = await command("prune", *where, "--json")
        assert (status, json.loads(out)["left_bytes"]) == (0, len(DATA))
    assert names(cache) == {manifest.blocks[1].sha256 + ".part"}
    assert not directory.exists()
    status, _, err = await command("prune", *where, "--limit", "-1")
    assert (status, "--limit is -1.0" in err) == (1, True)
