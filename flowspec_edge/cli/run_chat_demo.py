"""``flowspec demo --chat``: nodes on this machine and a server over them, to chat with at its page."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import webbrowser
from collections.abc import AsyncIterator

from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.show_ring import print_statistics
from flowspec_edge.client import Client
from flowspec_edge.config import GenerateOptions
from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.node.process import node_processes
from flowspec_edge.tasks import run_until_first_ends, until_interrupted

STOP_S = 15.0
"""How long the server may take to end: texts that are written are given some seconds."""
_URL = re.compile(r"chat with it.* (http://127\.0\.0\.1:\d+)")


async def run_chat_demo(
    *, num_nodes: int, bundle: Bundle, prompt: str | None, options: GenerateOptions, port: int
) -> int:
    """Serve until the user ends it, or with a ``prompt`` until that is answered, with ``options``.

    Returns an exit status.

    Raises:
        NodeUnavailableError: the server ended by itself, which has said why.
    """
    print(f"starting {num_nodes} nodes on this machine ...", flush=True)
    async with (
        node_processes(num_nodes, bundle.directory) as (cluster, _),
        _server(cluster, bundle, num_nodes, port) as lines,
    ):
        url = await _url(lines)
        talk = _serve(url) if prompt is None else _ask(url, prompt, options)
        await run_until_first_ends(_show(lines), talk)
    return 0


async def _serve(url: str) -> None:
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        await asyncio.to_thread(webbrowser.open, url)
    await until_interrupted()


async def _ask(url: str, prompt: str, options: GenerateOptions) -> None:
    print(f"\n{prompt}\n", flush=True)
    async with Client(url) as client:
        answer = client.chat(
            prompt,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
            stop=options.stop,
            schedule=options.schedule,
        )
        async for piece in answer:
            print(piece.text, end="", flush=True)
    print("\n")
    if answer.statistics is not None:
        print_statistics(answer.statistics)


async def _url(lines: asyncio.StreamReader) -> str:
    """Where the server serves, as soon as it says so."""
    async for line in lines:
        print(text := line.decode(), end="", flush=True)
        if (found := _URL.search(text)) is not None:
            return found[1]
    raise _ended()


async def _show(lines: asyncio.StreamReader) -> None:
    async for line in lines:
        print(line.decode(), end="", flush=True)
    raise _ended()


def _ended() -> NodeUnavailableError:
    return NodeUnavailableError("the server has ended; why stands above")


@contextlib.asynccontextmanager
async def _server(cluster: str, bundle: Bundle, num_nodes: int, port: int) -> AsyncIterator[asyncio.StreamReader]:
    """``flowspec serve`` over the nodes; gives what it prints. It ends in order when it is left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "flowspec_edge", "serve", "--cluster", cluster, "--bundle", str(bundle.directory)),
        *("--host", LOOPBACK, "--port", str(port), "--nodes", str(num_nodes), "--no-layers", "--equal-split"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for this process, which ends it in order
    )
    assert process.stdout is not None
    try:
        yield process.stdout
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.communicate()
        except TimeoutError:
            process.kill()
            await process.communicate()
