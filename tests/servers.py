"""``flowspec serve`` as a process, for tests that end it, each in their way."""

import asyncio
import contextlib
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tests.narrowing import present

START_S, STOP_S = 60, 10


@dataclass(frozen=True, slots=True)
class Server:
    process: Process
    url: str

    async def kill(self) -> None:
        """As a power cut would."""
        if self.process.returncode is None:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        await self.process.wait()

    async def stop(self) -> int:
        """In order; its exit status."""
        self.process.terminate()
        async with asyncio.timeout(STOP_S):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def serve_process(*options: str, port: int = 0) -> AsyncIterator[Server]:
    """A server that answers by then, and is killed in the end where it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", "serve", "--port", str(port), *options), stdout=PIPE
    )
    server: Server | None = None
    try:
        async with asyncio.timeout(START_S):
            line = (await present(process.stdout).readline()).decode()
        server = Server(process, present(re.search(r"https?://[\d.]+:\d+", line)).group())
        yield server
    finally:
        await (server or Server(process, "")).kill()
