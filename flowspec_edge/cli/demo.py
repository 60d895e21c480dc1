"""The demo, and what it stands on: nodes as processes of their own on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from flowspec_edge import __version__
from flowspec_edge.cli.show_ring import TripDisplay, print_ring, print_statistics, ring_table
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.directory import find_peers
from flowspec_edge.node.node import Bundle, Node, NodeSettings, unique_name
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring

DEMO_SEARCH_S = 15.0
"""How long the demo looks for the nodes it has started; they answer within a second."""
START_S = 60.0
"""How long a node process may take to say that it serves: a Raspberry Pi imports ONNX Runtime in about three seconds."""
STOP_S = 5.0
"""How long a node process may take to end by itself."""


class NodeProcess:
    """``flowspec node`` in a process of its own. It ends when its standard input does, so it cannot outlive this one."""

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
        if not line:
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
        await asyncio.gather(*starts)
        yield cluster, sorted(nodes, key=lambda node: node.name)
    finally:
        for task in starts:
            task.cancel()
        await asyncio.wait(starts)
        await asyncio.gather(*(node.stop() for node in nodes))


PROMPT = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self, items=()):
        self.items = list(items)

    def push(self, item):
'''


async def run_demo(
    *, num_nodes: int, bundle: Bundle, prompt: str | None, options: GenerateOptions, is_json: bool
) -> int:
    """Start nodes, find them, answer ``prompt``, compare with the unsplit model, stop the nodes. Returns an exit status."""
    prompt = prompt or PROMPT
    began = time.monotonic()

    def say(line: str) -> None:
        if not is_json:
            print(line, flush=True)

    say(f"starting {num_nodes} nodes on this machine ...")
    async with node_processes(num_nodes, bundle.directory) as (cluster, _):
        say(f"looking for them by mDNS (cluster {cluster}) ...")
        settings = NodeSettings(name=unique_name(), cluster=cluster, bundles=(bundle,), is_announced=False)
        found = await find_peers(
            settings.neighbourhood,
            node=settings.name,
            version=__version__,
            num_nodes=num_nodes,
            timeout_s=DEMO_SEARCH_S,
        )
        node = await Node.start(settings)
        try:
            async with open_ring(node, bundle, found) as ring:
                stages = ring_table(ring.stages)
                if not is_json:
                    print_ring(stages, bundle.manifest.drafts)
                    print(f"\nprompt:\n{prompt}\n")
                display = None if is_json else TripDisplay(began)
                pieces = await _answer(ring, prompt, options, display)
        finally:
            await node.close()
    return await _report(bundle, prompt, options, pieces, stages, display)


async def _report(
    bundle: Bundle,
    prompt: str,
    options: GenerateOptions,
    pieces: list[Piece],
    stages: list[dict[str, Any]],
    display: TripDisplay | None,
) -> int:
    """Print what was done, as JSON where there is no display; 1 where the text is not the unsplit model's."""
    text = "".join(piece.text for piece in pieces)
    tokens = [token for piece in pieces for token in piece.token_ids]
    statistics = pieces[-1].statistics
    assert statistics is not None, "the last piece of an answer has the statistics"
    unsplit = await asyncio.to_thread(_unsplit_tokens, bundle, prompt, options)
    if options.stop:  # the unsplit model knows no stop strings
        unsplit = unsplit[: len(tokens)]
    is_identical = tokens == unsplit
    if display is None:
        report = {
            "nodes": len(stages),
            "prompt": prompt,
            "text": text,
            "token_ids": tokens,
            "autoregressive_token_ids": unsplit,
            "identical": is_identical,
            "acceptance_length": statistics["acceptance_length"],
            "trips": statistics["trips"],
            "rows_sent": statistics["rows_sent"],
            "rows_useful": statistics["rows_useful"],
            "tokens_per_s": statistics["tokens_per_s"],
            "ring": stages,
        }
        print(json.dumps(report))
    else:
        print(f"\n{prompt}{text}\n")
        print_statistics(statistics)
        print(f"from the command to the first token {display.first_token_s:.1f} s, in all {display.total_s:.1f} s")
        print("identical to the unsplit model: " + ("yes, token for token" if is_identical else "NO"))
    return 0 if is_identical else 1


async def _answer(ring: Ring, prompt: str, options: GenerateOptions, display: TripDisplay | None) -> list[Piece]:
    pieces = []
    async with contextlib.aclosing(ring.generate(prompt, options, display.show_trip if display else None)) as answer:
        async for piece in answer:
            pieces.append(piece)
            if display is not None:
                display.take_text(piece.text)
    if display is not None:
        display.finish()
    return pieces


def _unsplit_tokens(bundle: Bundle, prompt: str, options: GenerateOptions) -> list[int]:
    """What the plain model writes in one process: the yardstick."""
    tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
    return list(UnsplitModel(bundle.directory, bundle.manifest).generate(tokenizer.encode(prompt), options))
