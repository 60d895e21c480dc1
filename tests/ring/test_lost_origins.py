"""An origin dies while it has texts written: its stages free the sessions, and the memory goes back to the system."""

import asyncio
import contextlib
import dataclasses
import signal
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.client import Client
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import FlowspecError
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import node_processes
from flowspec_edge.origin.opening import open_ring
from tests.ring.conftest import nodes_of
from tests.servers import serve_process

FREED_S = 10.0
ENDLESS = GenerateOptions(max_new_tokens=900)


class Wire:
    """Carries what goes over connections to a port, until it no longer does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._is_vanishing = False
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> int:
        """The port at which it is entered."""
        self._server = await asyncio.start_server(self._carry, LOOPBACK, 0)
        return int(self._server.sockets[0].getsockname()[1])

    def freeze(self) -> None:
        """From now on nothing is taken: sockets stay open, and fill up."""
        self._flows.clear()

    def vanish(self) -> None:
        """From now on what is sent is taken and lost."""
        self._is_vanishing = True

    async def cut(self) -> None:
        """End every connection, and take no others."""
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry(self, reader: StreamReader, writer: StreamWriter) -> None:
        ahead_reader, ahead_writer = await asyncio.open_connection(LOOPBACK, self._port)
        for source, sink in ((reader, ahead_writer), (ahead_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)

    async def _pump(self, source: StreamReader, sink: StreamWriter) -> None:
        try:
            while piece := await source.read(65536):
                await self._flows.wait()
                if not self._is_vanishing:
                    sink.write(piece)
        finally:
            sink.close()


@contextlib.asynccontextmanager
async def wires_to(nodes: list[Node]) -> AsyncIterator[tuple[list[Wire], list[Announcement]]]:
    """A wire to each node, and the nodes as they are found behind them."""
    wires = [Wire(node.port) for node in nodes]
    ports = [await wire.open() for wire in wires]
    try:
        yield (
            wires,
            [dataclasses.replace(node.announcement, port=port) for node, port in zip(nodes, ports, strict=True)],
        )
    finally:
        for wire in wires:
            await wire.cut()


@pytest.mark.parametrize("fate", ["killed", "frozen", "vanished"])
async def test_stages_free_the_sessions_of_an_origin_that_is_gone(
    int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    freed: asyncio.Queue[int] = asyncio.Queue()
    free_caches = StageRunner.free_caches
    loop = asyncio.get_running_loop()

    def free(runner: StageRunner) -> None:
        num = len(runner._sessions)
        free_caches(runner)
        loop.call_soon_threadsafe(freed.put_nowait, num)

    monkeypatch.setattr(StageRunner, "free_caches", free)
    async with nodes_of(int8_bundle, ("attic", "cellar")) as (nodes, origin), wires_to(nodes) as (wires, found):
        offered = [node.memory.free_bytes for node in nodes]
        with contextlib.suppress(FlowspecError):
            async with open_ring(origin, int8_bundle, found) as ring:
                answers = [ring.generate("x = 1\n", ENDLESS) for _ in range(2)]
                for answer in answers:
                    await anext(answer)
                assert [node.memory.free_bytes < offered[0] for node in nodes] == [True, True]
                for wire in wires:
                    match fate:
                        case "killed":
                            await wire.cut()
                        case "frozen":
                            wire.freeze()
                        case "vanished":
                            wire.vanish()
                async with asyncio.timeout(FREED_S):
                    assert [await freed.get() for _ in nodes] == [2, 2]
                assert [node.memory.free_bytes for node in nodes] == offered
                for answer in answers:
                    await answer.aclose()


def anonymous_kib(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1])


@pytest.mark.slow
async def test_the_memory_of_a_killed_and_of_a_frozen_origins_sessions_goes_back() -> None:
    """Each text of a thousand tokens takes 4 MB of a node that serves half of the demo model's layers.

    An idle node's own memory is not the same to the last megabyte each time, so two thirds of theirs are waited for.
    """
    prompt = "x = 1\n" * 150
    async with node_processes(2, DEMO_BUNDLE) as (cluster, nodes):
        pids = [node.process.pid for node in nodes]
        for ending in (signal.SIGKILL, signal.SIGSTOP):
            arguments = ("--cluster", cluster, "--no-layers", "--equal-split", "--wait", "5", "--nodes", "2")
            async with serve_process(*arguments) as server, Client(server.url) as client:
                await asyncio.gather(*(client.complete(prompt, max_new_tokens=8) for _ in range(4)))
                idle = [anonymous_kib(pid) for pid in pids]
                answers = [client.generate(prompt, seed=seed, max_new_tokens=400, temperature=0.8) for seed in range(4)]
                for answer in answers:
                    async for _ in answer:
                        if len(answer.token_ids) > 100:
                            break
                used = [anonymous_kib(pid) for pid in pids]
                assert all(after - before > 4096 for before, after in zip(idle, used, strict=True))
                server.process.send_signal(ending)
                async with asyncio.timeout(FREED_S):
                    while any(
                        3 * (anonymous_kib(pid) - before) > after - before
                        for pid, before, after in zip(pids, idle, used, strict=True)
                    ):
                        await asyncio.sleep(0.05)
