"""Memory of loading: what ONNX Runtime frees on the way goes back to the system at once.

It reads a file, copies its weights and packs them anew, one after the other. glibc keeps what is freed meanwhile for later
allocations (192 MB of float32 layers in four files: a peak of 1.7 times that, most of it kept); as mappings of their own these
pieces leave at once (1.1 times; x86, glibc 2.36, onnxruntime 1.32). Running graphs get the usual heap, since mapping a buffer
for each forward costs page faults.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LOADING_BYTES = 1 << 20
"""Smaller pieces than this are no weights."""
_RUNNING_BYTES = 32 << 20
"""glibc's own limit for what it takes from the heap, once it has seen large pieces come and go."""

_lock = threading.Lock()
_num_loading = 0


@contextlib.contextmanager
def frugal_allocation() -> Iterator[None]:
    """While this is entered, in any thread, large pieces of memory are mapped, and given back when they are freed.

    Does nothing where the C library is not glibc.
    """
    global _num_loading
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    with _lock:
        _num_loading += 1
        libc.mallopt(_M_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        with _lock:
            _num_loading -= 1
            if not _num_loading:
                libc.mallopt(_M_MMAP_THRESHOLD, _RUNNING_BYTES)
                libc.mallopt(_M_TRIM_THRESHOLD, 2 * _RUNNING_BYTES)
                libc.malloc_trim(0)
