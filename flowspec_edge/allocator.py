"""The C library keeps what a program frees, until it is told to give it back to the system.

Here nothing happens where the C library is not glibc.
"""

from __future__ import annotations

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc
NUM_ARENAS = 2
"""Separate heaps of a process. glibc makes up to eight per core, one for each thread that allocates, and each keeps
what its threads have freed."""


@cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


def give_back_freed() -> None:
    """Return what has been freed to the system. Takes about 0.1 ms per MB, in which other threads run."""
    if (glibc := _glibc()) is not None:
        glibc.malloc_trim(0)


def use_few_arenas() -> None:
    """From now on have at most NUM_ARENAS heaps. For a process that is to run for weeks, before its threads begin."""
    if (glibc := _glibc()) is not None:
        glibc.mallopt(_M_ARENA_MAX, NUM_ARENAS)


def set_thresholds(*, mapped_from_bytes: int, trimmed_from_bytes: int) -> None:
    """Pieces of memory from a size on are mappings of their own, which go back to the system when they are freed.

    So does the free end of a heap from ``trimmed_from_bytes`` on, whenever a piece before it is freed; that of a heap
    other than the first goes back in no other way.
    """
    if (glibc := _glibc()) is not None:
        glibc.mallopt(_M_MMAP_THRESHOLD, mapped_from_bytes)
        glibc.mallopt(_M_TRIM_THRESHOLD, trimmed_from_bytes)
