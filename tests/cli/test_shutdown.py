"""Ctrl-C and SIGTERM in the middle of everything: in bounded time no process, port, task or half file is left."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.cli.test_commands import COMMAND_S, children_of
from tests.narrowing import present

pytestmark = pytest.mark.slow

IN_ORDER_S = 6.0
"""Links and requests get some two seconds each; the rest is for this machine's other tests."""
LEFT = (b"Traceback", b"never awaited", b"was destroyed", b"never retrieved", b"unclosed", b"<ssl.", b" object at 0x")
SLOW = re.compile(rb"Executing <.* took [0-9.]+ seconds")
"""In development mode asyncio tells of these, which are not what this is about."""
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@contextlib.asynccontextmanager
async def started(
    *arguments: str, stdin: int = asyncio.subprocess.DEVNULL
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A command in Python's development mode, which tells of whatever is left behind."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-W", "ignore::DeprecationWarning", "-m", "flowspec_edge", *arguments),
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def ended(process: asyncio.subprocess.Process, ending: signal.Signals) -> tuple[int, bytes]:
    """End it; its status, and what it said on standard error, which tells of nothing left behind."""
    began = time.monotonic()
    process.send_signal(ending)
    async with asyncio.timeout(COMMAND_S):
        _, err = await process.communicate()
    assert time.monotonic() - began < IN_ORDER_S
    said = b"".join(line for line in err.splitlines(keepends=True) if not SLOW.search(line))
    assert not [text for text in LEFT if text in said], said.decode()
    return present(process.returncode), said


async def line_with(process: asyncio.subprocess.Process, text: bytes) -> bytes:
    async with asyncio.timeout(COMMAND_S):
        while text not in (line := await present(process.stdout).readline()):
            assert line, (await present(process.stderr).read()).decode()
    return line


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize("ending", SIGNALS)
async def test_a_ring_in_the_middle_of_a_text_ends_in_order_at_both_ends(ending: signal.Signals) -> None:
    place = ("--cluster", f"ending-{secrets.token_hex(4)}", "--host", "127.0.0.1")
    async with started("node", *place) as node, started("serve", *place, "--port", "0", "--nodes", "2") as serve:
        node_port = int((await line_with(node, b"serves on")).split(b"127.0.0.1:")[1].split(b",")[0])
        url = (await line_with(serve, b"/v1,")).split(b" at ")[1].split(b",")[0].decode()
        body = {"prompt": "def main(", "max_tokens": 900, "stream": True}
        async with aiohttp.ClientSession() as session, session.post(f"{url}/completions", json=body) as answer:
            while not (await answer.content.readline()).startswith(
                b"data:"
            ):  # comments tell that it waits for the ring
                pass
            first = asyncio.create_task(ended(serve, ending))
            with contextlib.suppress(aiohttp.ClientError):
                await answer.content.read()
            status, err = await first
        assert (status, err) == (0, b"")
        assert await ended(node, ending) == (0, b"")
        assert is_free(node_port) and is_free(int(url.split(":")[2].split("/")[0]))


@pytest.mark.parametrize("ending", SIGNALS)
@pytest.mark.parametrize("command", [("generate", "x"), ("doctor",), ("plan",), ("devices",)])
async def test_a_command_that_waits_ends_in_order(command: tuple[str, ...], ending: signal.Signals) -> None:
    cluster = f"ending-{secrets.token_hex(4)}"
    async with started(*command, "--cluster", cluster, "--host", "127.0.0.1", "--wait", "60") as process:
        pid = process.pid
        async with asyncio.timeout(COMMAND_S):
            while not any("udp" in line for line in sockets_of(pid)):  # until it listens for mDNS
                await asyncio.sleep(0.05)
        status, err = await ended(process, ending)
    assert status == 130 and err.strip().endswith(b"interrupted")


@pytest.mark.parametrize(
    ("command", "ending"),
    [(("generate", "-", "--host", "127.0.0.1"), signal.SIGTERM), (("key", "set"), signal.SIGINT)],
)
async def test_a_command_that_reads_standard_input_ends_at_once(
    command: tuple[str, ...], ending: signal.Signals
) -> None:
    async with started(*command, stdin=asyncio.subprocess.PIPE) as process:
        async with asyncio.timeout(COMMAND_S):
            while not reads_standard_input(process.pid):
                await asyncio.sleep(0.05)
        process.send_signal(ending)
        async with asyncio.timeout(COMMAND_S):  # standard input stays open meanwhile
            err = await present(process.stderr).read()
            assert await process.wait() == 130
    assert err == f"\nflowspec {command[0]}: interrupted\n".encode()


def reads_standard_input(pid: int) -> bool:
    number, first, *_ = [*Path(f"/proc/{pid}/syscall").read_text().split(), "", ""]
    return number in ("0", "63") and first == "0x0"  # read(0, ...) on x86-64 and on aarch64


def sockets_of(pid: int) -> list[str]:
    """The UDP sockets that a process has open."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    return [f"udp {row[1]}" for row in rows if row[9] in inodes]


@pytest.mark.parametrize("ending", SIGNALS)
async def test_the_demo_leaves_no_node_behind(ending: signal.Signals) -> None:
    async with started("demo", "--nodes", "2", "--max-new-tokens", "400") as demo:
        await line_with(demo, b"accepted")
        children = children_of(demo.pid)
        assert len(children) == 2
        status, err = await ended(demo, ending)
    assert status == 130 and err.strip().endswith(b"interrupted")
    assert not [child for child in children if child.exists()]


async def test_the_demo_of_a_chat_leaves_nothing_behind() -> None:
    async with started("demo", "--chat", "--nodes", "1", "--port", "0") as demo:
        port = int((await line_with(demo, b"chat with it")).rstrip(b"/\n").rpartition(b":")[2])
        children = children_of(demo.pid)
        assert len(children) == 2
        status, _ = await ended(demo, signal.SIGINT)
    assert status == 0
    assert not [child for child in children if child.exists()] and is_free(port)


def test_whoever_cannot_end_in_order_is_ended_and_whoever_asks_twice_at_once() -> None:
    """A thread that runs on, as in a forward, would keep a process for as long as it likes."""
    code = """
import asyncio, sys, time
from flowspec_edge.cli import main
main.STOP_S = float(sys.argv[1])
async def stuck():
    work = asyncio.get_running_loop().run_in_executor(None, time.sleep, 60)
    print("begun", flush=True)
    await work
    return 0
main._run(stuck())
"""
    for stop_s, num_signals in ((0.3, 1), (60.0, 2)):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(stop_s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert present(process.stdout).readline() == b"begun\n"
            began = time.monotonic()
            for _ in range(num_signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.2)
            _, err = process.communicate(timeout=30)
        assert process.returncode == 130 and b"ended at once" in err
        assert time.monotonic() - began < 5
