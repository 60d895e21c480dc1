"""A slower core for this process's event loop: whatever runs there takes so many times as long."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from flowspec_edge.errors import RequestError

MOST = 20.0


@contextlib.contextmanager
def slow_core(times: float) -> Iterator[None]:
    """In the ``with`` block the core is kept busy behind each callback of the event loop, for as long as makes the
    callback ``times`` as long as the processor time that it took. Other threads and processes stay as fast as they are.

    Raises:
        RequestError: that is less than 1, or more than MOST.
    """
    if not 1 <= times <= MOST:
        raise RequestError(f"--slow-origin is {times:g}; it must lie between 1 and {MOST:g}")
    run = asyncio.Handle._run

    def run_slowly(handle: asyncio.Handle) -> None:
        began_s = time.thread_time()
        run(handle)
        until_s = time.monotonic() + (times - 1) * (time.thread_time() - began_s)
        while time.monotonic() < until_s:
            pass

    if times > 1:
        asyncio.Handle._run = run_slowly  # type: ignore  # there is no public place for it
    try:
        yield
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]
