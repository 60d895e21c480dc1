"""Decides how much of its disk a weight cache may use, and which files are removed when new ones need room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowspec_edge.errors import CacheError

RESERVE_SHARE = 0.1
"""The share of the disk that is left free where no limit was set. Ext4 itself keeps half of that for root."""
RESERVE_BYTES = 512 * 2**20
"""The least that is left free, for logs and updates on a small card."""


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file in the cache. ``last_used`` is in seconds; ``is_in_use`` says whether an open stage needs it."""

    sha256: str
    num_bytes: int
    last_used: float
    is_in_use: bool = False


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of the cache. ``free_bytes`` is what an ordinary user may still write."""

    total_bytes: int
    free_bytes: int


def room_bytes(disk: Disk, cached_bytes: int, limit_bytes: int | None) -> int:
    """How large the cache may grow: up to ``limit_bytes`` if given, but never beyond the disk's free space.

    Without a limit it also leaves RESERVE_SHARE of the disk free, and RESERVE_BYTES at least.
    """
    reserve = 0 if limit_bytes is not None else reserve_bytes(disk)
    possible = max(cached_bytes + disk.free_bytes - reserve, 0)
    return possible if limit_bytes is None else min(possible, limit_bytes)


def describe_room(disk: Disk, limit_bytes: int | None) -> str:
    """Why the cache may not grow beyond its room, for the text of an error."""
    free = f"{disk.free_bytes / 2**20:.0f} MiB of the disk are free"
    if limit_bytes is not None:
        return f"--cache-limit allows {limit_bytes / 2**20:.0f} MiB, and {free}"
    reserve = reserve_bytes(disk)
    return f"{free}, of which {reserve / 2**20:.0f} MiB are kept free for the system unless --cache-limit is given"


def reserve_bytes(disk: Disk) -> int:
    """What is left free where no limit was set."""
    return max(int(disk.total_bytes * RESERVE_SHARE), RESERVE_BYTES)


def choose_evictions(
    files: Sequence[CachedFile], num_bytes: int, room: int, why: str = "its limit"
) -> list[CachedFile]:
    """Choose the files to remove so that ``num_bytes`` more fit into ``room``.

    Files in use stay. Of the others those go first that were not used for the longest time.

    Raises:
        CacheError: even without the files that are not in use there is no room; ``why`` says what bounds it.
    """
    excess = sum(file.num_bytes for file in files) + num_bytes - room
    chosen: list[CachedFile] = []
    for file in sorted(files, key=lambda file: (file.last_used, file.sha256)):
        if excess <= 0:
            break
        if not file.is_in_use:
            chosen.append(file)
            excess -= file.num_bytes
    if excess > 0:
        in_use = sum(file.num_bytes for file in files if file.is_in_use)
        raise CacheError(
            f"{num_bytes} bytes of weights are to be fetched; the cache may hold {room} bytes ({why}), and {in_use} of "
            f"them are in use by open stages: {excess} are missing. Free disk space, or allow more with --cache-limit"
        )
    return chosen
