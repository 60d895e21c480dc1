"""Where a stage's weights come from: a bundle on this node, the cache, or other nodes.

Whatever the way, a stage gets a directory that looks like a bundle, with exactly the files of its layers, each checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flowspec_edge.bundle import Bundle
from flowspec_edge.core.weights.fetching import Source, WantedFile
from flowspec_edge.errors import CacheError, FetchError, StageFailedError
from flowspec_edge.manifest import MANIFEST_NAME, FileEntry, Manifest, bundle_digest, parse_manifest, verify_digests
from flowspec_edge.weights.cache import Lease, WeightCache, find_damaged
from flowspec_edge.weights.download import FetchReport, fetch_files, fetch_manifest
from flowspec_edge.weights.part import Part

BUSY_S = 0.2
"""How often to look whether another process has finished a file that it is fetching."""
BUSY_LIMIT_S = 60.0
"""How long such a file may stand still; a fetch that stands still ends by itself sooner."""

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class FetchProgress:
    """How far the fetch for one stage is. ``num_bytes`` and ``total_bytes`` count what was missing here, no more."""

    bundle: str
    start: int
    stop: int
    num_bytes: int = 0
    total_bytes: int = 0
    report: FetchReport | None = None

    @property
    def name(self) -> str:
        return f"{self.bundle} layers [{self.start}, {self.stop})"


@dataclass(frozen=True, slots=True)
class StageRequest:
    """The weights of layers ``[start, stop)`` of the bundle of that digest; ``sources`` are nodes that may have them.

    They are of the bundle's own precision unless another one is asked for. What is fetched comes at a rate of
    ``max_bytes_per_s`` at most, where that is given.
    """

    digest: str
    start: int
    stop: int
    sources: tuple[Source, ...] = ()
    precision: str | None = None
    max_bytes_per_s: float | None = None


OnFetch = Callable[[FetchProgress], None]
"""Told whenever bytes came; it must return at once."""


class WeightSupply:
    """The weights that a node has, and those that it fetches. ``executor`` reads and checks files."""

    def __init__(
        self,
        bundles: Sequence[Bundle],
        cache: WeightCache | None,
        executor: Executor,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._bundles = {bundle.digest: bundle for bundle in bundles}
        self._cache = cache
        self._executor = executor
        self._tls = tls
        self._own_files = {
            entry.sha256: bundle.directory / entry.file for bundle in bundles for entry in bundle.manifest.files()
        }

    @property
    def digests(self) -> list[str]:
        """The digests of the bundles that are here as a whole."""
        return list(self._bundles)

    @property
    def can_fetch(self) -> bool:
        return self._cache is not None

    def known(self, digest: str) -> tuple[Bundle | None, Manifest | None]:
        """The bundle of that digest where it is here as a whole, and its manifest where at least that is here."""
        own = self._bundles.get(digest)
        if own is not None:
            return own, own.manifest
        return None, self._cache.manifest(digest) if self._cache is not None else None

    def find(self, sha256: str) -> Path | bytes | None:
        """A file that other nodes may have, by its sha256; a manifest is such a file too, by its bundle's digest."""
        if sha256 in self._own_files:
            return self._own_files[sha256]
        if sha256 in self._bundles:
            return self._bundles[sha256].manifest.to_json().encode()
        if self._cache is None:
            return None
        found = self._cache.find(sha256)
        if found is None and (manifest := self._cache.manifest(sha256)) is not None:
            return manifest.to_json().encode()
        return found

    async def manifest(self, request: StageRequest) -> Manifest:
        """The manifest of a bundle, fetched where it is not here.

        Raises:
            StageFailedError: the bundle is not here, and this node fetches nothing.
            FetchError: no source has the manifest.
            CacheError: it cannot be kept.
        """
        own = self._bundles.get(request.digest)
        if own is not None:
            return own.manifest
        cache = self._cache_for(request.digest)
        manifest = cache.manifest(request.digest)
        if manifest is None:
            text = await fetch_manifest(request.digest, request.sources, tls=self._tls)
            manifest = parse_manifest(text, Path(request.digest[:12]) / MANIFEST_NAME)
            if bundle_digest(manifest) != request.digest:
                raise FetchError(
                    f"the manifest of bundle {request.digest[:12]} was written by another flowspec version"
                )
            await _run_in(self._executor, cache.keep_manifest, manifest)
        return manifest

    async def stage(
        self,
        request: StageRequest,
        manifest: Manifest,
        held: contextlib.ExitStack,
        on_fetch: OnFetch,
        *,
        loaded: Collection[str] = (),
    ) -> Bundle:
        """A bundle with the files of these layers, each of them checked; they stay until ``held`` is closed.

        Files that are ``loaded`` already, by sha256, are neither read nor fetched.

        Raises:
            BundleError: a file of this node's own bundle is damaged.
            StageFailedError: the bundle is not here, and this node fetches nothing.
            FetchError: no source has a file that is missing here.
            CacheError: such a file cannot be kept.
        """
        own = self._bundles.get(request.digest)
        if own is not None:
            files = manifest.stage_files(request.start, request.stop, request.precision)
            unread = [entry for entry in files if entry.sha256 not in loaded]
            await _run_in(self._executor, verify_digests, own.directory, unread)
            return own
        cache = self._cache_for(request.digest)
        lease = held.enter_context(contextlib.closing(cache.lease()))
        gathering = _Gathering(
            self._own_files,
            cache,
            lease,
            self._executor,
            self._tls,
            request=request,
            name=manifest.name,
            report=on_fetch,
            loaded=loaded,
        )
        paths = await gathering.gather(manifest.stage_files(request.start, request.stop, request.precision))
        return Bundle(await _run_in(self._executor, cache.link, manifest, paths), manifest, request.digest)

    def _cache_for(self, digest: str) -> WeightCache:
        """The cache to fetch a bundle's files into."""
        if self._cache is None:
            raise StageFailedError(
                f"has no bundle {digest[:12]}; start it with --bundle and the same directory, or without --no-cache, "
                "so that it may fetch what it needs"
            )
        return self._cache


class _Gathering:
    """Brings the files of one stage together: those that lie here already, and those that have to be fetched."""

    def __init__(
        self,
        own_files: Mapping[str, Path],
        cache: WeightCache,
        lease: Lease,
        executor: Executor,
        tls: ssl.SSLContext | None,
        *,
        request: StageRequest,
        name: str,
        report: OnFetch,
        loaded: Collection[str],
    ) -> None:
        self._own_files = own_files
        self._cache = cache
        self._lease = lease
        self._executor = executor
        self._tls = tls
        self._request = request
        self._progress = FetchProgress(name, request.start, request.stop)
        self._report = report
        self._loaded = loaded
        self._paths: dict[str, Path] = {}

    async def gather(self, files: Sequence[FileEntry]) -> dict[str, Path]:
        """Where each of the files lies, by sha256. Those that are loaded may lie nowhere."""
        entries = {entry.sha256: entry for entry in files}
        for entry in entries.values():
            await self._take_if_here(entry)
        here = {*self._paths, *self._loaded}
        missing = [entry for sha256, entry in sorted(entries.items()) if sha256 not in here]
        if missing:
            await self._fetch(missing)
        return self._paths

    async def _take_if_here(self, entry: FileEntry) -> None:
        """Take a file from an own bundle or from the cache, unless it is damaged there."""
        own = self._own_files.get(entry.sha256)
        path = own if own is not None and own.is_file() else self._lease.take(entry.sha256)
        if path is None:
            return
        if entry.sha256 in self._loaded:
            self._paths[entry.sha256] = path
            return
        if not await _run_in(self._executor, find_damaged, {entry.sha256: path}):
            self._paths[entry.sha256] = path
        elif path == own:
            _log.warning("%s: damaged; %s is fetched from another node", path, entry.file)
        else:
            _log.warning("%s: damaged on this disk, and fetched anew; see whether the card is failing", entry.file)
            self._cache.discard(path)

    async def _fetch(self, missing: list[FileEntry]) -> None:
        with contextlib.ExitStack() as held:
            parts = await self._open_parts(missing, held)
            wanted = [
                WantedFile(entry.sha256, entry.file, entry.num_bytes, parts[entry.sha256].num_bytes)
                for entry in missing
                if entry.sha256 in parts
            ]
            left = sum(file.num_bytes - file.num_present for file in wanted)
            if not left:
                return
            await _run_in(self._executor, self._cache.make_room, left)
            self._progress.total_bytes = left
            self._report(self._progress)
            self._progress.report = await fetch_files(
                wanted,
                self._request.sources,
                parts,
                on_progress=self._count,
                tls=self._tls,
                max_bytes_per_s=self._request.max_bytes_per_s,
            )
            self._report(self._progress)
            for file in wanted:
                self._hold(file.sha256, file.name)
            # Parts are closed only now: a file is locked by its part until the lease holds it, so nobody can evict it.

    def _count(self, num_bytes: int) -> None:
        self._progress.num_bytes += num_bytes
        self._report(self._progress)

    def _hold(self, sha256: str, name: str) -> None:
        path = self._lease.take(sha256)
        if path is None:
            raise CacheError(f"weight cache {self._cache.directory}: {name} was removed as soon as it was fetched")
        self._paths[sha256] = path

    async def _open_parts(self, missing: list[FileEntry], held: contextlib.ExitStack) -> dict[str, Part]:
        """The parts of those files that are still to be fetched; ``held`` closes them.

        A file that another process fetches is waited for. Every process opens parts in the order of their sha256, so
        that no two wait for each other.
        """
        parts: dict[str, Part] = {}
        for entry in missing:
            part = await self._open_part(entry)
            if (found := self._lease.take(entry.sha256)) is not None:
                self._paths[entry.sha256] = found
                part.close()
                continue
            held.callback(part.close)
            if part.num_bytes >= entry.num_bytes:
                if await _run_in(self._executor, part.finish) == entry.sha256:
                    self._hold(entry.sha256, entry.file)
                    continue
                part.drop()
            parts[entry.sha256] = part
        return parts

    async def _open_part(self, entry: FileEntry) -> Part:
        loop = asyncio.get_running_loop()
        last, since = -1, loop.time()
        while (part := await _run_in(self._executor, self._cache.open_part, entry.sha256)) is None:
            size = self._cache.part_bytes(entry.sha256)
            if size != last:
                last, since = size, loop.time()
            if loop.time() - since > BUSY_LIMIT_S:
                raise FetchError(
                    f"{entry.file} is being fetched by another process on this machine, which stands still at {size} "
                    "bytes; end that process, or give this node a cache of its own with --cache DIR"
                )
            await asyncio.sleep(BUSY_S)
        return part


async def _run_in(executor: Executor, function: Callable[..., _T], *arguments: object) -> _T:
    return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
