"""Processes of nodes are stopped in order by who was interrupted while they started."""

import asyncio
import sys
from asyncio.subprocess import Process
from typing import Any

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE
from flowspec_edge.node.process import NodeProcess, node_processes

NUM_NODES = 2
SILENT = "import sys; sys.stdin.read()"
LIMIT_S = 20.0


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The exit statuses of nodes that were stopped in order; these are processes that wait, and say nothing."""
    ended: list[int | None] = []
    create, stop = asyncio.create_subprocess_exec, NodeProcess.stop

    async def create_silent(*command: str, **options: Any) -> Process:
        return await create(sys.executable, "-c", SILENT, **options)

    async def stop_and_note(node: NodeProcess) -> None:
        await stop(node)
        ended.append(node.process.returncode)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", create_silent)
    monkeypatch.setattr(NodeProcess, "stop", stop_and_note)
    return ended


async def test_who_is_interrupted_while_nodes_start_stops_them_in_order(
    ended: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_waiting = 0
    readline = asyncio.StreamReader.readline
    all_wait = asyncio.Event()

    async def note(reader: asyncio.StreamReader) -> bytes:
        nonlocal num_waiting
        num_waiting += 1
        if num_waiting == NUM_NODES:
            all_wait.set()
        return await readline(reader)

    monkeypatch.setattr(asyncio.StreamReader, "readline", note)

    async def start() -> None:
        async with node_processes(NUM_NODES, DEMO_BUNDLE):
            raise AssertionError

    async with asyncio.timeout(LIMIT_S):
        starting = asyncio.create_task(start())
        await all_wait.wait()
        starting.cancel()
        await asyncio.wait({starting})
    assert starting.cancelled()
    assert ended == [0] * NUM_NODES
