"""What befalls a node: each fault strikes at once and can be healed."""

import asyncio
import contextlib
import signal
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from tests.lan import Lan, ip

START_S = 60


class Boards:
    """Nodes 0, 1, ... of a LAN, as processes, and the state directory of each."""

    def __init__(self, lan: Lan, states: list[Path]) -> None:
        self.lan = lan
        self.states = states
        self.processes: dict[int, Process] = {}

    async def start(self, number: int) -> None:
        env = {"FLOWSPEC_HOME": str(self.states[number])}
        async with asyncio.timeout(START_S):
            self.processes[number], _ = await self.lan.start_node(number, env=env)

    async def kill(self, number: int) -> None:
        process = self.processes.pop(number)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
        self.lan.processes.remove(process)

    def freeze(self, number: int) -> None:
        self.processes[number].send_signal(signal.SIGSTOP)

    def thaw(self, number: int) -> None:
        self.processes[number].send_signal(signal.SIGCONT)

    def cut(self, number: int) -> None:
        """The cable is out."""
        ip("link", "set", f"port{number}", "down", inside=self.lan.switch)

    def plug(self, number: int) -> None:
        ip("link", "set", f"port{number}", "up", inside=self.lan.switch)

    def swallow(self, number: int) -> None:
        """What comes in vanishes, though the link is up."""
        host = self.lan.host(number)
        ip("rule", "add", "pref", "2", "table", "local", inside=host)
        ip("rule", "add", "pref", "1", "iif", "eth0", "blackhole", inside=host)
        ip("rule", "del", "pref", "0", inside=host)

    def let_through(self, number: int) -> None:
        host = self.lan.host(number)
        ip("rule", "add", "pref", "0", "table", "local", inside=host)
        ip("rule", "del", "pref", "1", inside=host)
        ip("rule", "del", "pref", "2", inside=host)


async def _kill(boards: Boards, number: int) -> None:
    await boards.kill(number)


async def _restart(boards: Boards, number: int) -> None:
    await boards.kill(number)
    await boards.start(number)


async def _freeze(boards: Boards, number: int) -> None:
    boards.freeze(number)


async def _freeze_for_a_moment(boards: Boards, number: int) -> None:
    boards.freeze(number)
    await asyncio.sleep(0.5)
    boards.thaw(number)


async def _cut(boards: Boards, number: int) -> None:
    boards.cut(number)


async def _swallow(boards: Boards, number: int) -> None:
    boards.swallow(number)


async def _nothing(boards: Boards, number: int) -> None: ...


async def _start(boards: Boards, number: int) -> None:
    await boards.start(number)


async def _thaw(boards: Boards, number: int) -> None:
    boards.thaw(number)


async def _plug(boards: Boards, number: int) -> None:
    boards.plug(number)


async def _let_through(boards: Boards, number: int) -> None:
    boards.let_through(number)


Deed = Callable[[Boards, int], Awaitable[None]]
FAULTS: Mapping[str, tuple[Deed, Deed]] = {
    "killed": (_kill, _start),
    "restarted": (_restart, _nothing),
    "frozen": (_freeze, _thaw),
    "frozen for half a second": (_freeze_for_a_moment, _nothing),
    "cable out": (_cut, _plug),
    "blackholed": (_swallow, _let_through),
}
"""By name: how a fault strikes a node, and how it is healed afterwards."""
