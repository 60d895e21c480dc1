"""Makes memory that ONNX Runtime frees while it loads a graph go back to the system at once.

ONNX Runtime reads a file, copies its weights and packs them anew, one after the other. glibc keeps what is freed in
between for later allocations: 192 MB of float32 layers in four files reached a peak of 1.7 times that, most of which
was kept. When these pieces are mappings of their own they are given back at once, and the peak is 1.1 times (x86, glibc
2.36, onnxruntime 1.32). Running graphs use the usual heap, because mapping a buffer for each forward would cost page
faults.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from flowspec_edge.allocator import give_back_freed, set_thresholds

_LOADING_BYTES = 1 << 17
"""Pieces of memory below this size are not weights."""
_MANY_ROWS = 64
"""Chunks of more rows are those of prompts."""
_RUNNING_BYTES = 32 << 20
"""The limit below which glibc takes memory from the heap, as it sets it itself once large pieces have been freed."""

_lock = threading.Lock()
_num_loading = 0


@contextlib.contextmanager
def frugal_allocation() -> Iterator[None]:
    """Inside the ``with`` block, in every thread, large pieces of memory are mapped, and given back when they are
    freed. At its end all that is free goes back. So it is for loading graphs, and for freeing them.

    Nothing is changed where the C library is not glibc.
    """
    global _num_loading
    with _lock:
        _num_loading += 1
        set_thresholds(mapped_from_bytes=_LOADING_BYTES, trimmed_from_bytes=_LOADING_BYTES)
    try:
        yield
    finally:
        with _lock:
            _num_loading -= 1
            if not _num_loading:
                set_thresholds(mapped_from_bytes=_RUNNING_BYTES, trimmed_from_bytes=2 * _RUNNING_BYTES)
                give_back_freed()


def give_back_behind(num_rows: int) -> None:
    """Behind a run of so many rows: what a prompt's rows took between a graph's operators goes back to the system.

    Ten layers of a 135 M model keep 30 MB of it otherwise, in pieces that lie among others. What a draft tree's few
    rows take stays for the next ones.
    """
    if num_rows > _MANY_ROWS:
        give_back_freed()
