"""Weight files on this node's disk, each under its sha256.

A file is fetched into ``objects/SHA256.part``, checked, and renamed to ``objects/SHA256``: whatever has that name is
whole. ``bundles/DIGEST`` holds a manifest and links named as the manifest names its files, so that layers load from
there as they do from an exported bundle.

Several processes may share a cache. Locks say what is in use and end with their process (``file_locks.py``): a fetch
holds the parts of its files, and an open stage holds its files. What is held is never evicted.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from flowspec_edge.core.weights.cache_room import CachedFile, Disk, choose_evictions, describe_room, room_bytes
from flowspec_edge.errors import BundleError, CacheError
from flowspec_edge.manifest import MANIFEST_NAME, Manifest, bundle_digest, parse_manifest, sha256_of
from flowspec_edge.weights.file_locks import EXCLUSIVE, SHARED, is_locked, locked
from flowspec_edge.weights.part import PART_SUFFIX, Part, open_part

_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


class WeightCache:
    """A cache in ``directory``, which is made when something is first kept there.

    It grows to ``limit_bytes``; with None a tenth of the disk stays free.
    """

    def __init__(self, directory: Path, limit_bytes: int | None = None) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._objects = directory / "objects"
        self._bundles = directory / "bundles"

    def find(self, sha256: str) -> Path | None:
        """Where the file of that sha256 lies; None where it is not here as a whole."""
        path = self._objects / sha256
        return path if is_sha256(sha256) and path.is_file() else None

    def discard(self, path: Path) -> None:
        """Remove a damaged file. Raises CacheError where it cannot be removed."""
        with self.using():
            path.unlink(missing_ok=True)

    def files(self) -> list[CachedFile]:
        """Everything that takes room. Parts are included; their names end in ``.part``.

        Raises:
            CacheError: the directory cannot be read.
        """
        found = []
        with self.using(), contextlib.suppress(FileNotFoundError), os.scandir(self._objects) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process evicted it meanwhile
                    stat = entry.stat(follow_symlinks=False)
                    is_in_use = is_locked(Path(entry.path))
                    used_at = max(stat.st_atime, stat.st_mtime)
                    found.append(CachedFile(entry.name, stat.st_size, used_at, is_in_use))
        return found

    def make_room(self, num_bytes: int) -> list[CachedFile]:
        """Evict files until ``num_bytes`` more fit, and return those that were evicted.

        Raises:
            CacheError: they do not fit even so, or nothing can be written here.
        """
        with self.using():
            self._objects.mkdir(parents=True, exist_ok=True)
            files = self.files()
            usage = shutil.disk_usage(self._objects)
            disk = Disk(usage.total, usage.free)
            room = room_bytes(disk, sum(file.num_bytes for file in files), self.limit_bytes)
            chosen = choose_evictions(files, num_bytes, room, describe_room(disk, self.limit_bytes))
            return [file for file in chosen if self.remove(file.sha256)]

    def remove(self, name: str) -> bool:
        """Remove a file or part; False where a process holds it, or it is not here.

        Raises:
            CacheError: it cannot be removed.
        """
        path = self._objects / name
        with self.using(), locked(path, EXCLUSIVE) as is_held:
            if is_held:
                path.unlink()
            return is_held

    def forget_empty_bundles(self) -> None:
        """Remove the manifests of bundles of which no file is here any more."""
        for digest, manifest in self.manifests().items():
            if not any(self.find(entry.sha256) for entry in manifest.files()):
                shutil.rmtree(self._bundles / digest, ignore_errors=True)

    def lease(self) -> Lease:
        """A new lease, which holds nothing yet."""
        return Lease(self)

    def open_part(self, sha256: str) -> Part | None:
        """The part of a file, with what earlier fetches left in it; None while another process fetches that file.

        Raises:
            CacheError: nothing can be written here.
        """
        with self.using():
            self._objects.mkdir(parents=True, exist_ok=True)
            return open_part(self._objects / sha256, sha256)

    def part_bytes(self, sha256: str) -> int:
        """How many bytes of a file are here while it is being fetched."""
        try:
            return (self._objects / (sha256 + PART_SUFFIX)).stat().st_size
        except FileNotFoundError:
            return 0

    def manifest(self, digest: str) -> Manifest | None:
        """The manifest of that digest, if it is here and undamaged."""
        if not is_sha256(digest):
            return None
        path = self._bundles / digest / MANIFEST_NAME
        try:
            manifest = parse_manifest(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError, BundleError):
            return None
        return manifest if bundle_digest(manifest) == digest else None

    def manifests(self) -> dict[str, Manifest]:
        """All manifests that are here, by digest."""
        with self.using():
            names = sorted(os.listdir(self._bundles)) if self._bundles.is_dir() else []
        found = {name: self.manifest(name) for name in names}
        return {digest: manifest for digest, manifest in found.items() if manifest is not None}

    def keep_manifest(self, manifest: Manifest) -> Path:
        """Write a manifest, and return the directory that the files of its bundle may be linked into.

        Raises:
            CacheError: nothing can be written here.
        """
        directory = self._bundles / bundle_digest(manifest)
        with self.using():
            directory.mkdir(parents=True, exist_ok=True)
            aside = directory / f"{MANIFEST_NAME}.{os.getpid()}"
            try:
                aside.write_text(manifest.to_json(), encoding="utf-8")
                aside.replace(directory / MANIFEST_NAME)
            except OSError:
                aside.unlink(missing_ok=True)
                raise
        return directory

    def link(self, manifest: Manifest, paths: Mapping[str, Path]) -> Path:
        """Make a directory in which the files of ``paths`` (by sha256) have the names that the manifest gives them.

        Raises:
            CacheError: nothing can be written here.
        """
        directory = self.keep_manifest(manifest)
        with self.using():
            for entry in manifest.files():
                if entry.sha256 in paths:
                    link = directory / entry.file
                    link.parent.mkdir(parents=True, exist_ok=True)
                    aside = link.with_name(f"{link.name}.{os.getpid()}")
                    aside.unlink(missing_ok=True)
                    aside.symlink_to(paths[entry.sha256].resolve())
                    aside.replace(link)
        return directory

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """What the disk refuses inside becomes a CacheError."""
        try:
            yield
        except OSError as cause:
            raise CacheError(
                f"weight cache {self.directory}: {cause.strerror or cause}; free space there, or choose another place "
                "with --cache DIR"
            ) from cause


class Lease:
    """Keeps files of the cache from being evicted until it is closed, or this process ends."""

    def __init__(self, cache: WeightCache) -> None:
        self._cache = cache
        self._held = contextlib.ExitStack()

    def take(self, sha256: str) -> Path | None:
        """Hold a file from now on, and return where it lies; None where it is not here. It counts as used now.

        Raises:
            CacheError: it is here, and cannot be read.
        """
        with self._cache.using():
            return self._take(sha256)

    def _take(self, sha256: str) -> Path | None:
        path = self._cache.find(sha256)
        # The only exclusive lock on a finished file is that of an eviction, which lasts for microseconds.
        if path is None or not self._held.enter_context(locked(path, SHARED, waits=True)):
            return None
        with contextlib.suppress(OSError):  # the file of another user counts as used when the system says so
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # whoever has it open sees that it is the same
        return path

    def close(self) -> None:
        self._held.close()


def find_damaged(paths: Mapping[str, Path]) -> list[str]:
    """The sha256 of those files that cannot be read or whose bytes have another sum. Reads all of them."""
    damaged = []
    for sha256, path in paths.items():
        try:
            is_good = sha256_of(path) == sha256
        except OSError:
            is_good = False
        if not is_good:
            damaged.append(sha256)
    return damaged
