"""Disks that are full, small or read-only: a named error, and what was there stays."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from flowspec_edge.core.weights.cache_room import Disk, choose_evictions, describe_room, room_bytes
from flowspec_edge.errors import CacheError
from flowspec_edge.weights.server import WeightServer

MIB = 2**20
PRELUDE = """
import errno, hashlib, subprocess, sys
from pathlib import Path
from flowspec_edge.errors import CacheError, StateError
from flowspec_edge.files import read_private, write_private
from flowspec_edge.manifest import load_manifest
from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.weights.cache import WeightCache
disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
cache = WeightCache(disk / "weights", 2**30)
data = bytes(range(256)) * 64
sha256 = hashlib.sha256(data).hexdigest()
part = cache.open_part(sha256); part.write(data); assert part.finish() == sha256; part.close()
manifest = load_manifest(DEMO_BUNDLE)
def fill():
    try:
        with (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
    except OSError as full:
        assert full.errno == errno.ENOSPC
def refused(kind, call, *texts):
    try:
        call()
    except kind as error:
        assert all(text in str(error) for text in texts), error
    else:
        raise AssertionError(f"{call} was not refused")
def read_only():
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
"""


@pytest.fixture(scope="module")
def in_namespace() -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a disk of its own needs mount namespaces")


@pytest.mark.usefixtures("in_namespace")
@pytest.mark.parametrize(
    "script",
    [
        """
        fill()
        other = cache.open_part("0" * 64)
        refused(CacheError, lambda: other.write(data), "the disk is full", "--cache DIR", "cache prune")
        other.close()
        assert not cache.part_bytes("0" * 64)
        refused(CacheError, lambda: cache.keep_manifest(manifest), "No space left", "--cache DIR")
        assert not list((disk / "weights/bundles").rglob("*.json*")), "no half file"
        refused(StateError, lambda: write_private(disk / "key", "x" * 9999), "No space left", "FLOWSPEC_HOME")
        assert not (disk / "key").exists() and not list(disk.glob(".key*"))
        """,
        """
        write_private(disk / "key", "whole")
        half = cache.open_part("0" * 64); half.write(b"half")
        half.close()
        read_only()
        refused(CacheError, lambda: cache.open_part("1" * 64), "Read-only file system", "--cache DIR")
        refused(CacheError, lambda: cache.keep_manifest(manifest), "Read-only file system")
        refused(CacheError, lambda: cache.remove(sha256), "Read-only file system")
        refused(StateError, lambda: write_private(disk / "key", "other"), "Read-only file system")
        assert read_private(disk / "key") == "whole"
        """,
        """
        limited = WeightCache(disk / "weights")
        said = "MiB of the disk are free, of which 512 MiB are kept free"
        refused(CacheError, lambda: limited.make_room(10), "10 bytes", said, "--cache-limit")
        """,
    ],
    ids=["full", "read-only", "small"],
)
def test_what_a_disk_refuses_is_named_and_what_was_there_stays(script: str, tmp_path: object) -> None:
    checks = textwrap.dedent(script) + "\nassert cache.find(sha256).read_bytes() == data\n"
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", PRELUDE + checks, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_small_disk_says_what_is_kept_free() -> None:
    disk = Disk(1000 * MIB, 300 * MIB)
    assert room_bytes(disk, 0, None) == 0
    why = describe_room(disk, None)
    assert (
        why
        == "300 MiB of the disk are free, of which 512 MiB are kept free for the system unless --cache-limit is given"
    )
    with pytest.raises(CacheError, match="may hold 0 bytes .300 MiB of the disk are free, of which 512 MiB are kept"):
        choose_evictions([], 1, 0, why)
    assert describe_room(disk, 5 * MIB) == "--cache-limit allows 5 MiB, and 300 MiB of the disk are free"


def test_a_file_that_cannot_be_read_is_not_there_for_others(tmp_path: object) -> None:
    from pathlib import Path

    from aiohttp import web

    server = WeightServer(lambda sha256: Path(str(tmp_path)))  # a directory where a file was
    try:
        with pytest.raises(web.HTTPNotFound):
            server._open("0" * 64)
    finally:
        server.close()
