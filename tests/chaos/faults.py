"""What befalls a node: each fault strikes at once and can be healed."""

import asyncio
import contextlib
import random
import signal
from asyncio.subprocess import Process
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.lan import Lan

START_S = 60
AWAY_S = 3.0
"""For how long all nodes but one are away: longer than any pause, and shorter than a text waits for boards."""
LOSS_SHARES = (0.05, 0.3)
"""The least and the most of the packets, in either direction, that a bad link loses."""


class Boards:
    """Nodes 0, 1, ... of a LAN, as processes, and the state directory of each. ``memory_mib`` is what each may use for
    layers, where that is bounded.
    """

    def __init__(self, lan: Lan, states: list[Path], memory_mib: int | None) -> None:
        self.lan = lan
        self.states = states
        self.memory_mib = memory_mib
        self.processes: dict[int, Process] = {}
        self._coming: set[asyncio.Task[None]] = set()

    async def start(self, number: int) -> None:
        env = {"FLOWSPEC_HOME": str(self.states[number])}
        memory = ("--memory", str(self.memory_mib)) if self.memory_mib is not None else ()
        async with asyncio.timeout(START_S):
            self.processes[number], _ = await self.lan.start_node(number, *memory, env=env)

    async def kill(self, number: int) -> None:
        process = self.processes.pop(number)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
        self.lan.processes.remove(process)

    async def kill_all_but(self, number: int) -> None:
        """The others are gone at once, and started again after a while."""
        others = [other for other in self.processes if other != number]
        await asyncio.gather(*map(self.kill, others))
        self._coming = {asyncio.create_task(self._start_later(other)) for other in others}

    async def _start_later(self, number: int) -> None:
        await asyncio.sleep(AWAY_S)
        await self.start(number)

    async def all_started(self) -> None:
        await asyncio.gather(*self._coming)
        self._coming.clear()

    def freeze(self, number: int) -> None:
        self.processes[number].send_signal(signal.SIGSTOP)

    def thaw(self, number: int) -> None:
        self.processes[number].send_signal(signal.SIGCONT)


async def _nothing(boards: Boards, number: int, rng: random.Random) -> None: ...


async def _kill(boards: Boards, number: int, rng: random.Random) -> None:
    await boards.kill(number)


async def _start(boards: Boards, number: int, rng: random.Random) -> None:
    await boards.start(number)


async def _restart(boards: Boards, number: int, rng: random.Random) -> None:
    await boards.kill(number)
    await boards.start(number)


async def _restart_elsewhere(boards: Boards, number: int, rng: random.Random) -> None:
    await boards.kill(number)
    boards.lan.readdress(number)
    await boards.start(number)


async def _kill_all_but(boards: Boards, number: int, rng: random.Random) -> None:
    await boards.kill_all_but(number)


async def _all_started(boards: Boards, number: int, rng: random.Random) -> None:
    await boards.all_started()


async def _freeze(boards: Boards, number: int, rng: random.Random) -> None:
    boards.freeze(number)


async def _freeze_for_a_moment(boards: Boards, number: int, rng: random.Random) -> None:
    boards.freeze(number)
    await asyncio.sleep(0.5)
    boards.thaw(number)


async def _thaw(boards: Boards, number: int, rng: random.Random) -> None:
    boards.thaw(number)


async def _cut(boards: Boards, number: int, rng: random.Random) -> None:
    boards.lan.pull(number)


async def _plug(boards: Boards, number: int, rng: random.Random) -> None:
    boards.lan.plug(number)


async def _move(boards: Boards, number: int, rng: random.Random) -> None:
    boards.lan.readdress(number)


async def _swallow(boards: Boards, number: int, rng: random.Random) -> None:
    """What comes in vanishes, though the link is up."""
    boards.lan.swallow(number)


async def _let_through(boards: Boards, number: int, rng: random.Random) -> None:
    boards.lan.let_through(number)


async def _sever(boards: Boards, number: int, rng: random.Random) -> None:
    """It and another node hear nothing of each other; everybody else hears both."""
    other = rng.choice([other for other in boards.processes if other != number])
    boards.lan.swallow(number, boards.lan.address(other))
    boards.lan.swallow(other, boards.lan.address(number))


async def _join(boards: Boards, number: int, rng: random.Random) -> None:
    for host in range(boards.lan.num_hosts):
        if boards.lan.swallows(host):
            boards.lan.let_through(host)


async def _spoil(boards: Boards, number: int, rng: random.Random) -> None:
    boards.lan.lose_packets(number, rng.uniform(*LOSS_SHARES))


async def _mend(boards: Boards, number: int, rng: random.Random) -> None:
    boards.lan.lose_packets(number, 0.0)


Deed = Callable[[Boards, int, random.Random], Coroutine[None, None, None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """How it strikes a node, and how it is healed afterwards."""

    strike: Deed
    heal: Deed


FAULTS: Mapping[str, Fault] = {
    "killed": Fault(_kill, _start),
    "restarted": Fault(_restart, _nothing),
    "restarted at another address": Fault(_restart_elsewhere, _nothing),
    "the only one left for 3 s": Fault(_kill_all_but, _all_started),
    "frozen": Fault(_freeze, _thaw),
    "frozen for half a second": Fault(_freeze_for_a_moment, _nothing),
    "cable out": Fault(_cut, _plug),
    "at another address": Fault(_move, _nothing),
    "blackholed": Fault(_swallow, _let_through),
    "cut off from one other node": Fault(_sever, _join),
    "behind a link that loses 5 to 30 %": Fault(_spoil, _mend),
}
