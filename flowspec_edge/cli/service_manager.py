"""What a command that serves tells systemd, where it runs under it (sd_notify(3), Type=notify).

The address of the socket, and how often it wants a sign of life, come in the environment. Elsewhere nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Mapping

SOCKET_VARIABLE = "NOTIFY_SOCKET"
INTERVAL_VARIABLE, PROCESS_VARIABLE = "WATCHDOG_USEC", "WATCHDOG_PID"
SIGNS_PER_INTERVAL = 3
"""A sign of life comes from the event loop, so that a loop that stands still for the whole interval is restarted."""

_log = logging.getLogger(__name__)


class ServiceManager:
    """The service manager that started this process, or none."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get(SOCKET_VARIABLE, "")
        self._interval_s = 0.0
        if environment.get(PROCESS_VARIABLE, str(os.getpid())) == str(os.getpid()):
            with contextlib.suppress(ValueError):
                self._interval_s = int(environment.get(INTERVAL_VARIABLE, "0")) / 1e6

    @contextlib.asynccontextmanager
    async def serving(self, status: str) -> AsyncIterator[None]:
        """While this lasts the service counts as ready, and gives signs of life where they are wanted."""
        self._tell(f"READY=1\nSTATUS={status}")
        signs = asyncio.create_task(self._give_signs(), name="signs of life for the service manager")
        try:
            yield
        finally:
            self._tell("STOPPING=1")
            signs.cancel()
            await asyncio.wait({signs})

    async def _give_signs(self) -> None:
        while self._interval_s > 0 and self._address:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self._interval_s / SIGNS_PER_INTERVAL)

    def _tell(self, state: str) -> None:
        if not self._address.startswith(("/", "@")):
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as datagrams:
                datagrams.setblocking(False)
                datagrams.sendto(state.encode(), address)
        except OSError as cause:
            _log.warning("the service manager is not told %s (%s)", state.partition("\n")[0], cause.strerror or cause)
