"""Weight files on this node's disk, each under its sha256.

A file is fetched into ``objects/SHA256.part``, checked, and renamed to ``objects/SHA256``: whatever has that name is whole.
``bundles/DIGEST`` holds a manifest and links named as the manifest names its files, so that layers load from there as they
do from an exported bundle.

Several processes may share a cache. Locks (flock) say what is in use, and end with their process: whoever fetches a file
holds its part, and an open stage holds its files. What is held is never evicted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from flowspec_edge.core.weights.cache_room import CachedFile, Disk, choose_evictions, room_bytes
from flowspec_edge.errors import BundleError, CacheError
from flowspec_edge.manifest import MANIFEST_NAME, Manifest, bundle_digest, parse_manifest, sha256_of

PART = ".part"
READ_BYTES = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")


def is_sha256(text: str) -> bool:
    return _SHA256.fullmatch(text) is not None


class WeightCache:
    """A cache in ``directory``, made when something is first kept; ``limit_bytes`` None leaves a tenth of the disk free."""

    def __init__(self, directory: Path, limit_bytes: int | None = None) -> None:
        self.directory = directory
        self.limit_bytes = limit_bytes
        self._objects = directory / "objects"
        self._bundles = directory / "bundles"

    def find(self, sha256: str) -> Path | None:
        """The file of that sha256, if it is here as a whole."""
        path = self._objects / sha256
        return path if is_sha256(sha256) and path.is_file() else None

    def files(self) -> list[CachedFile]:
        """All that takes room, parts included; these have a name that ends in ``.part``."""
        found = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._objects) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # evicted by another process meanwhile
                    stat = entry.stat(follow_symlinks=False)
                    is_in_use = _is_locked(Path(entry.path))
                    found.append(CachedFile(entry.name, stat.st_size, stat.st_mtime, is_in_use))
        return found

    def make_room(self, num_bytes: int) -> list[CachedFile]:
        """Evict until ``num_bytes`` more fit; what was evicted.

        Raises:
            CacheError: they do not fit, or nothing can be written here.
        """
        with self._writing():
            self._objects.mkdir(parents=True, exist_ok=True)
            files = self.files()
            disk = shutil.disk_usage(self._objects)
            cached_bytes = sum(file.num_bytes for file in files)
            room = room_bytes(Disk(disk.total, disk.free), cached_bytes, self.limit_bytes)
            return [file for file in choose_evictions(files, num_bytes, room) if self.remove(file.sha256)]

    def remove(self, name: str) -> bool:
        """Remove a file or part that nobody holds; whether that was so."""
        path = self._objects / name
        with _locked(path, fcntl.LOCK_EX) as is_held:
            if is_held:
                path.unlink()
            return is_held

    def forget_empty_bundles(self) -> None:
        """Remove the manifests of bundles of which no file is here any more."""
        for digest, manifest in self.manifests().items():
            if not any(self.find(entry.sha256) for entry in manifest.files()):
                shutil.rmtree(self._bundles / digest, ignore_errors=True)

    def lease(self) -> Lease:
        """Holds files for a stage; see :class:`Lease`."""
        return Lease(self)

    def open_part(self, sha256: str) -> Part | None:
        """The part of a file, to go on with; None while someone else is at it.

        Raises:
            CacheError: nothing can be written here.
        """
        path = self._objects / (sha256 + PART)
        with self._writing():
            self._objects.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
                if not _lock(descriptor, fcntl.LOCK_EX):
                    os.close(descriptor)
                    return None
                if _is_same(descriptor, path):
                    return Part(path, sha256, descriptor)
                os.close(descriptor)  # it was finished between our opening and our lock

    def part_bytes(self, sha256: str) -> int:
        """How many bytes of a file that is on its way are here."""
        try:
            return (self._objects / (sha256 + PART)).stat().st_size
        except FileNotFoundError:
            return 0

    def manifest(self, digest: str) -> Manifest | None:
        """The manifest of that digest, if it is here and undamaged."""
        path = self._bundles / digest / MANIFEST_NAME
        try:
            manifest = parse_manifest(path.read_text(encoding="utf-8"), path)
        except (OSError, UnicodeDecodeError, BundleError):
            return None
        return manifest if bundle_digest(manifest) == digest else None

    def manifests(self) -> dict[str, Manifest]:
        """All manifests that are here, by digest."""
        names = sorted(os.listdir(self._bundles)) if self._bundles.is_dir() else []
        found = {name: self.manifest(name) for name in names}
        return {digest: manifest for digest, manifest in found.items() if manifest is not None}

    def keep_manifest(self, manifest: Manifest) -> Path:
        """Write a manifest; the directory that its files may be linked into.

        Raises:
            CacheError: nothing can be written here.
        """
        directory = self._bundles / bundle_digest(manifest)
        with self._writing():
            directory.mkdir(parents=True, exist_ok=True)
            aside = directory / f"{MANIFEST_NAME}.{os.getpid()}"
            aside.write_text(manifest.to_json(), encoding="utf-8")
            aside.replace(directory / MANIFEST_NAME)
        return directory

    def link(self, manifest: Manifest, paths: Mapping[str, Path]) -> Path:
        """A directory in which each file of ``paths``, by sha256, has the names that the manifest gives it.

        Raises:
            CacheError: nothing can be written here.
        """
        directory = self.keep_manifest(manifest)
        with self._writing():
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
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as cause:
            raise CacheError(
                f"weight cache {self.directory}: {cause.strerror or cause}; free space there, or choose another place "
                "with --cache DIR"
            ) from cause


class Lease:
    """Keeps files of the cache from being evicted, as long as this process lives and the lease is not closed."""

    def __init__(self, cache: WeightCache) -> None:
        self._cache = cache
        self._held = contextlib.ExitStack()

    def take(self, sha256: str) -> Path | None:
        """Hold a file; None where it is not here. It counts as used now."""
        path = self._cache.find(sha256)
        # Whoever looks for something to evict has the lock for microseconds; only that is waited for.
        if path is None or not self._held.enter_context(_locked(path, fcntl.LOCK_SH, waits=True)):
            return None
        with contextlib.suppress(OSError):  # of another user: then it counts as used when it was fetched
            os.utime(path)
        return path

    def close(self) -> None:
        self._held.close()


class Part:
    """A file on its way, held by this process. Not safe for use from several threads at once."""

    def __init__(self, path: Path, sha256: str, descriptor: int) -> None:
        self._path, self._sha256 = path, sha256
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._sum = hashlib.sha256()
        while data := self._file.read(READ_BYTES):
            self._sum.update(data)
        self.num_bytes = self._file.tell()
        """How many bytes are here."""

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            CacheError: the disk is full or broken. What was written before stays, to go on with.
        """
        try:
            view = memoryview(data)
            while view:
                num_written = self._file.write(view)
                self._sum.update(view[:num_written])
                self.num_bytes += num_written
                view = view[num_written:]
        except OSError as cause:
            what = "the disk is full" if cause.errno == errno.ENOSPC else cause.strerror
            raise CacheError(
                f"weight cache {self._path.parent.parent}: {what} ({self.num_bytes} bytes of {self._sha256[:12]} are written); "
                "free space there (flowspec cache prune), or choose another place with --cache DIR"
            ) from cause

    def drop(self) -> None:
        """Forget all bytes."""
        self._file.seek(0)
        self._file.truncate()
        self._sum = hashlib.sha256()
        self.num_bytes = 0

    def finish(self) -> str:
        """Put the file in its place if its bytes are right; their sha256.

        Raises:
            CacheError: the disk is full or broken.
        """
        found = self._sum.hexdigest()
        if found != self._sha256:
            return found
        try:
            os.fsync(self._file.fileno())  # or a power cut leaves the right name on wrong bytes
            self._path.rename(self._path.with_suffix(""))
            fcntl.flock(self._file.fileno(), fcntl.LOCK_SH)  # a lease may now begin, an eviction may not
            directory = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as cause:
            raise CacheError(
                f"weight cache {self._path.parent.parent}: {cause.strerror}; see whether the disk is well"
            ) from cause
        return found

    def close(self) -> None:
        """Let others have it. A part without bytes leaves no file."""
        if not self.num_bytes and _is_same(self._file.fileno(), self._path):
            self._path.unlink()
        self._file.close()


def find_damaged(paths: Mapping[str, Path]) -> list[str]:
    """Which of these files, by sha256, are not what their names say. Reads them all."""
    damaged = []
    for sha256, path in paths.items():
        try:
            is_good = sha256_of(path) == sha256
        except OSError:
            is_good = False
        if not is_good:
            damaged.append(sha256)
    return damaged


def _lock(descriptor: int, kind: int, *, waits: bool = False) -> bool:
    try:
        fcntl.flock(descriptor, kind if waits else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path, kind: int, *, waits: bool = False) -> Iterator[bool]:
    """Whether the file is there and could be locked; if so, it is until the end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        yield _lock(descriptor, kind, waits=waits) and _is_same(descriptor, path)
    finally:
        os.close(descriptor)


def _is_locked(path: Path) -> bool:
    with _locked(path, fcntl.LOCK_EX) as is_free:
        return not is_free


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether the name still stands for the opened file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
