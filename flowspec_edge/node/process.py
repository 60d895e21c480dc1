"""``flowspec node`` in a process of its own on this machine, and several of them as a cluster."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.addresses import LOOPBACK

SEARCH_S = 15.0
"""How long to look for nodes of this machine that serve already; they answer within a second."""
START_S = 60.0
"""How long a node process may take to say that it serves: a Raspberry Pi imports ONNX Runtime in some three seconds."""
STOP_S = 5.0
"""How long a node process may take to end by itself."""


class NodeProcess:
    """``flowspec node`` in a process of its own. It ends when its standard input does, so it cannot outlive us."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process

    @classmethod
    async def start(cls, name: str, cluster: str, bundle: Path, *options: str) -> NodeProcess:
        """Start it and wait until it serves.

        Raises:
            NodeUnavailableError: it ended, or did not serve in time; with its last line.
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flowspec_edge", "node", "--name", name, "--cluster", cluster),
            *("--bundle", str(bundle), "--threads", "1", "--until-stdin-closes", "--json"),
            *("--host", LOOPBACK, *options),  # this machine only, so no key
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the process that started it, which ends it in order
        )
        node = cls(name, process)
        assert process.stdout is not None and process.stderr is not None
        try:
            async with asyncio.timeout(START_S):
                line = await process.stdout.readline()
        except BaseException as cause:
            await node.stop()
            if isinstance(cause, TimeoutError):
                raise NodeUnavailableError(f"node {name}: did not start within {START_S:.0f} s") from cause
            raise
        if not line or "error" in json.loads(line):
            errors = (await process.stderr.read()).decode(errors="replace").strip().splitlines()
            await node.stop()
            raise NodeUnavailableError(f"node {name}: ended at its start: {errors[-1] if errors else 'no message'}")
        return node

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    async def stop(self) -> None:
        """Let it end in order, or after STOP_S at once."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.communicate()
        except TimeoutError:
            self.kill()
            await self.process.wait()


@contextlib.asynccontextmanager
async def node_processes(num_nodes: int, bundle: Path, *options: str) -> AsyncIterator[tuple[str, list[NodeProcess]]]:
    """Start nodes in a cluster of their own; gives its label and the processes, and stops them in the end."""
    cluster = f"local-{secrets.token_hex(4)}"
    nodes: list[NodeProcess] = []

    async def start(number: int) -> None:
        nodes.append(await NodeProcess.start(f"{cluster}-node-{number:02}", cluster, bundle, *options))

    starts = [asyncio.create_task(start(number)) for number in range(1, num_nodes + 1)]
    try:
        # Unlike gather this cancels nobody when it is cancelled. Who is cancelled twice does not stop its process.
        done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        yield cluster, sorted(nodes, key=lambda node: node.name)
    finally:
        for task in starts:
            task.cancel()
        await asyncio.wait(starts)
        await asyncio.gather(*(node.stop() for node in nodes))
