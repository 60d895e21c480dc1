"""What a weight cache may take of its disk, and what goes when something new needs the room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowspec_edge.errors import CacheError

RESERVE_SHARE = 0.1
"""Of the disk, left to everyone else where no limit was asked for; ext4 keeps half of that for root by itself."""
RESERVE_BYTES = 512 * 2**20
"""At least: logs and updates of a small card."""


@dataclass(frozen=True, slots=True)
class CachedFile:
    """A file in the cache. ``last_used`` counts seconds; ``is_in_use`` where an open stage needs it."""

    sha256: str
    num_bytes: int
    last_used: float
    is_in_use: bool = False


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk that the cache lies on; ``free_bytes`` is what an ordinary user may still write."""

    total_bytes: int
    free_bytes: int


def room_bytes(disk: Disk, cached_bytes: int, limit_bytes: int | None) -> int:
    """How large the cache may grow: ``limit_bytes`` where one was asked for, but never beyond the disk's free space."""
    reserve = 0 if limit_bytes is not None else max(int(disk.total_bytes * RESERVE_SHARE), RESERVE_BYTES)
    possible = max(cached_bytes + disk.free_bytes - reserve, 0)
    return possible if limit_bytes is None else min(possible, limit_bytes)


def choose_evictions(files: Sequence[CachedFile], num_bytes: int, room: int) -> list[CachedFile]:
    """What to remove so that ``num_bytes`` more fit into ``room``: what nobody uses, the longest unused first.

    Raises:
        CacheError: they do not fit even so.
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
            f"{num_bytes} bytes of weights are to be fetched; the cache may hold {room} bytes, and {in_use} of them are in "
            f"use by open stages: {excess} are missing. Free disk space, or allow more with --cache-limit"
        )
    return chosen
