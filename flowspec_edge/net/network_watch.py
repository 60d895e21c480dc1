"""Notices that this machine's networks may have changed, or that it has slept."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time

from flowspec_edge.net import rtnetlink

WATCH_S = 5.0
"""How often to look, where the system tells of no change and for what it does not tell."""
SETTLE_S = 0.3
"""A change comes in pieces (link, address, routes). This long after the first one there is something to look at."""
SLEPT_S = 2.0
"""Longer than clocks drift apart between two looks; who was away for less is not missed yet."""

_log = logging.getLogger(__name__)


class NetworkWatch:
    """Waits for the next change. It is closed by ``close``."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._slept_s = _slept_s()
        self._events: socket.socket | None = None
        with contextlib.suppress(AttributeError, OSError):  # another system than Linux, or one that does not tell
            self._events = rtnetlink.open_socket(is_told_of_changes=True)
            self._events.setblocking(False)
            asyncio.get_running_loop().add_reader(self._events, self._take_events, self._events)

    def close(self) -> None:
        if self._events is not None:
            asyncio.get_running_loop().remove_reader(self._events)
            self._events.close()
            self._events = None

    async def wait(self) -> bool:
        """Until something may have changed, at most WATCH_S. Returns whether the machine has slept meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_S):
                await self._changed.wait()
        if self._changed.is_set():
            await asyncio.sleep(SETTLE_S)
        self._changed.clear()
        before, self._slept_s = self._slept_s, _slept_s()
        return self._slept_s - before > SLEPT_S

    def _take_events(self, events: socket.socket) -> None:
        self._changed.set()
        try:
            rtnetlink.drain(events)
        except OSError as cause:
            _log.warning("changes of the network are noticed within %g s only (%s)", WATCH_S, cause.strerror or cause)
            self.close()


def _slept_s() -> float:
    """Seconds since the start of the machine that the monotonic clock has not counted (clock_gettime(2))."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
