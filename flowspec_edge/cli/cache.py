"""``flowspec cache``: what the weight cache of this machine holds, and how to make it smaller."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from flowspec_edge.cli.layout import table_lines
from flowspec_edge.cli.options import Commands, limit_bytes, set_command
from flowspec_edge.core.weights.cache_room import CachedFile
from flowspec_edge.files import cache_directory
from flowspec_edge.manifest import FileEntry
from flowspec_edge.weights.cache import WeightCache
from flowspec_edge.weights.part import PART_SUFFIX

EPILOG = """\
examples:
  flowspec cache list                    what is here, of which model, and what a running node needs
  flowspec cache prune                   remove all that no running node needs
  flowspec cache prune --limit 4         remove the longest unused until 4 GiB are left
  flowspec cache prune --dry-run --json  only say what would go

A node fetches the files of its own layers and keeps them here, so that its next start needs no network. \
What is removed is
fetched again when it is needed.
"""


@dataclass(frozen=True, kw_only=True)
class ListCommand:
    cache: Path | None
    json: bool


@dataclass(frozen=True, kw_only=True)
class PruneCommand(ListCommand):
    limit: float | None
    dry_run: bool


def add_cache(commands: Commands) -> None:
    cache = commands.add_parser(
        "cache",
        help="list or shrink what this machine keeps of fetched weights",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = cache.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="what is here, of which model, and whether a running node needs it")
    prune = actions.add_parser("prune", help="remove what no running node needs")
    prune.add_argument(
        "--limit", type=float, metavar="GIB", help="only until so much is left, the longest unused first"
    )
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    for parser in (listing, prune):
        parser.add_argument("--cache", type=Path, metavar="DIR", help="default: ~/.cache/flowspec/weights")
        parser.add_argument("--json", action="store_true", help="print one JSON object")
    set_command(listing, ListCommand, _list)
    set_command(prune, PruneCommand, _prune)


async def _list(options: ListCommand) -> int:
    cache = WeightCache(options.cache or cache_directory())
    files = [_describe(file, names) for names in [_names(cache)] for file in cache.files()]
    files.sort(key=lambda file: (file["bundles"], file["file"]))
    total = sum(file["num_bytes"] for file in files)
    if options.json:
        print(json.dumps({"directory": str(cache.directory), "num_bytes": total, "files": files}))
        return 0
    print(*_file_lines(files), f"{cache.directory}: {len(files)} files, {total / 1e6:.1f} MB", sep="\n")
    return 0


def _file_lines(files: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A table of files, with the bundles that they belong to above those of each."""
    if not files:
        return
    rows = [
        (
            f"  {file['file']}",
            f"{file['num_bytes'] / 1e6:.1f} MB",
            _age(time.time() - file["last_used"]),
            file["state"],
        )
        for file in files
    ]
    head, *lines = table_lines(("BUNDLE and files", "SIZE", "LAST USED", "STATE"), rows, ("SIZE", "LAST USED"))
    yield head
    for bundles, group in groupby(zip(files, lines, strict=True), lambda pair: pair[0]["bundles"]):
        yield ", ".join(bundles) or "no bundle that is known here"
        yield from (line for _, line in group)


async def _prune(options: PruneCommand) -> int:
    cache = WeightCache(options.cache or cache_directory())
    kept_bytes = limit_bytes(options.limit, "--limit") or 0
    names = _names(cache)
    files = cache.files()
    excess = sum(file.num_bytes for file in files) - kept_bytes
    removed: list[CachedFile] = []
    for file in sorted(files, key=lambda file: file.last_used):
        if excess > 0 and not file.is_in_use and (options.dry_run or cache.remove(file.sha256)):
            removed.append(file)
            excess -= file.num_bytes
    if not options.dry_run:
        cache.forget_empty_bundles()
    freed, left = sum(file.num_bytes for file in removed), sum(file.num_bytes for file in files)
    if options.json:
        report = {
            "directory": str(cache.directory),
            "is_dry_run": options.dry_run,
            "freed_bytes": freed,
            "left_bytes": left - freed,
            "removed": [_describe(file, names) for file in removed],
        }
        print(json.dumps(report))
        return 0
    for file in removed:
        print(f"{'would remove' if options.dry_run else 'removed'} {_describe(file, names)['file']}")
    print(f"{cache.directory}: {freed / 1e6:.1f} MB freed, {(left - freed) / 1e6:.1f} MB left")
    return 0


def _names(cache: WeightCache) -> dict[str, tuple[set[str], FileEntry]]:
    """By sha256: the bundles that a file belongs to, and what it is there."""
    names: dict[str, tuple[set[str], FileEntry]] = {}
    for manifest in cache.manifests().values():
        for entry in manifest.files():
            names.setdefault(entry.sha256, (set(), entry))[0].add(f"{manifest.name} {manifest.precision}")
    return names


def _describe(file: CachedFile, names: dict[str, tuple[set[str], FileEntry]]) -> dict[str, Any]:
    sha256 = file.sha256.removesuffix(PART_SUFFIX)
    bundles, entry = names.get(sha256, (set(), None))
    is_part = file.sha256.endswith(PART_SUFFIX)
    state = "in use" if file.is_in_use else "free"
    if is_part:
        share = f"{file.num_bytes / entry.num_bytes:.0%} of it" if entry is not None else "a part"
        state = f"{'being fetched' if file.is_in_use else 'not finished'}, {share}"
    return {
        "sha256": sha256,
        "file": entry.file if entry is not None else sha256[:12],
        "bundles": sorted(bundles),
        "num_bytes": file.num_bytes,
        "last_used": file.last_used,
        "is_in_use": file.is_in_use,
        "is_part": is_part,
        "state": state,
    }


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
