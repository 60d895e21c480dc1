"""The event loop is never blocked: not by texts that are written, and not by clients that misbehave.

One process has it all on one loop: three nodes, the origin and the HTTP interface. Each callback is timed. What the
loop's thread waited for a processor meanwhile is taken off, or what another thread did, which may have had the GIL; so
are pauses of the whole machine, which another process notes. The GIL counts that another thread holds and runs. A core
that is slower than usual has as many times longer.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.server import serve_app
from flowspec_edge.node.node import Node
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.web.app import build_app
from tests.narrowing import present
from tests.ring.conftest import found_of, nodes_of, unsplit_tokens
from tests.slowness import slowness

LIMIT_S = 0.1
NUM_CLIENTS = 8
CONTROL = """
import json, sys, time
last, pauses = time.monotonic(), []
print("ready", flush=True)
while time.monotonic() < last + 600:
    time.sleep(0.005)
    now = time.monotonic()
    if now - last > 0.02:
        print(json.dumps([last, now]), flush=True)
    last = now
"""


def waited_ns() -> dict[str, int]:
    """Nanoseconds that each thread of this process was ready to run and had no processor."""
    waited = {"none": 0}
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{thread}/schedstat") as file:
            waited[thread] = int(file.read().split()[1])
    return waited


class Watchdog:
    """Times callbacks of the event loop. ``slow`` has those that took longer than allowed, with what they were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow: list[tuple[float, float, float, str]] = []
        self._slow: list[tuple[float, float, float, str]] = []
        self._waited_ns = waited_ns()
        self._slowness = slowness()
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            began = time.monotonic()
            run(handle)
            ended = time.monotonic()
            if ended - began > LIMIT_S:
                waited = max(ns - self._waited_ns.get(thread, ns) for thread, ns in waited_ns().items())
                self._slow.append((began, ended, waited / 1e9, repr(handle)))

        monkeypatch.setattr(asyncio.Handle, "_run", timed)

    async def __aenter__(self) -> Self:
        self._control: Process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CONTROL, stdout=asyncio.subprocess.PIPE, limit=2**24
        )
        await present(self._control.stdout).readline()
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._beating.cancel()
        self._control.kill()
        limit_s = LIMIT_S * max(self._slowness, slowness())
        lines = (await self._control.communicate())[0].splitlines()
        pauses = [json.loads(line) for line in lines if line.endswith(b"]")]
        for began, ended, waited_s, what in self._slow:
            paused_s = sum(max(min(ended, stop) - max(began, start), 0) for start, stop in pauses)
            if ended - began - max(waited_s, paused_s) > limit_s:
                self.slow.append((round(ended - began, 3), round(waited_s, 3), round(paused_s, 3), what))

    async def _beat(self) -> None:
        while True:
            self._waited_ns = waited_ns()
            await asyncio.sleep(0.01)


def with_longer_context(bundle: Bundle, directory: Path, max_context: int) -> Bundle:
    """The same model, which claims to read texts of that many tokens."""
    shutil.copytree(bundle.directory, directory)
    geometry = dataclasses.replace(bundle.manifest.geometry, max_context=max_context)
    dataclasses.replace(bundle.manifest, geometry=geometry).write(directory)
    return Bundle.load(directory)


@contextlib.asynccontextmanager
async def serving(bundle: Bundle) -> AsyncIterator[tuple[Sequence[Node], GenerationService, int]]:
    """A service over three nodes, and its HTTP port."""
    async with nodes_of(bundle) as (nodes, origin):

        async def search() -> list[Announcement]:
            return found_of(nodes)

        async with GenerationService(origin, bundle, search) as service:
            served = await serve_app(build_app(service), cancels_on_disconnect=True)
            try:
                yield nodes, service, served.port
            finally:
                await served.close()


async def misbehave(port: int, node_ports: Sequence[int], is_done: asyncio.Event) -> list[int]:
    """Until then: huge prompts, nested and broken bodies, garbage, half requests, and silence, one after the other."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    bodies = [
        json.dumps({"prompt": "The quick brown fox. " * 199_000}).encode(),
        json.dumps({"prompt": "a" * 30_000, "max_tokens": 4}).encode(),  # so long that it may fit
        json.dumps({"prompt": "x", "stop": ["y" * 100_000] * 4, "max_tokens": 4}).encode(),
        b"[" * 2_000_000,
        b'{"prompt": "' + b"\xff" * 2_000_000,
        json.dumps({"prompt": "\ud800"}).encode(),
        b'{"prompt": "x", "max_tokens": 4, "other": [' + b"[]," * 1_300_000 + b"0]}",
        b'{"prompt": [' + b"[]," * 1_300_000 + b"0]}",
        b'{"prompt": "x", "max_tokens": 4, "flowspec": {"other": [' + b"[]," * 1_300_000 + b"0]}}",
    ]
    asked = [b"[" + b"[]," * 300_000 + b"0]", json.dumps(["0" * 64] * 4096).encode()]
    statuses: list[int] = []
    async with aiohttp.ClientSession() as session:
        while not is_done.is_set():
            for body in bodies:
                async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
                    statuses.append(response.status)
            for node_port, body in zip(node_ports, asked, strict=False):
                async with session.post(f"http://127.0.0.1:{node_port}/weights/have", data=body) as response:
                    statuses.append(response.status)
            for target in (port, *node_ports):
                for said in (b"", b"\x16\x03\x01garbage" * 100, b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"):
                    with contextlib.suppress(OSError):
                        one = socket.socket()
                        one.setblocking(False)
                        await asyncio.get_running_loop().sock_connect(one, ("127.0.0.1", target))
                        one.send(said)
                        await asyncio.sleep(0.002)
                        one.close()
    return statuses


@pytest.mark.slow
async def test_no_callback_is_long_while_clients_misbehave(
    int8_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        GenerateOptions(max_new_tokens=64, temperature=temperature, top_p=0.9, seed=seed)
        for seed, temperature in enumerate([0.0, 0.8] * (NUM_CLIENTS // 2))
    ]
    async with serving(int8_bundle) as (nodes, service, port), aiohttp.ClientSession() as session:

        async def ask(options: GenerateOptions) -> list[int]:
            body: dict[str, Any] = {
                "prompt": "def main(argv):",
                "max_tokens": options.max_new_tokens,
                "seed": options.seed,
            }
            body |= {"temperature": options.temperature, "top_p": options.top_p}
            async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
                tokens: list[int] = (await response.json())["choices"][0]["token_ids"]
                return tokens

        await ask(wanted[0])
        watchdog, is_done = Watchdog(monkeypatch), asyncio.Event()
        async with asyncio.timeout(120), watchdog:
            misbehaving = asyncio.create_task(misbehave(port, [node.port for node in nodes], is_done))
            texts = await asyncio.gather(*map(ask, wanted))
            is_done.set()
            statuses = await misbehaving
        prompt = present(service.ring)._engine.tokenizer.encode("def main(argv):")
    assert not watchdog.slow
    assert set(statuses) <= {200, 400} and statuses.count(400) >= 4
    assert texts == [unsplit_tokens(int8_bundle, prompt, options) for options in wanted]


@pytest.mark.slow
async def test_no_callback_is_long_while_a_prompt_of_a_megabyte_is_read(
    int8_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has 430,000 tokens. Its client leaves when a part of it has gone through the ring."""
    bundle = with_longer_context(int8_bundle, tmp_path / "long", 2**20)
    async with serving(bundle) as (_, service, port), aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{port}/v1/completions"

        async def ask(prompt: str, max_tokens: int) -> str:
            body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0.8}
            async with session.post(url, json=body) as response:
                return str((await response.json())["choices"][0]["text"])

        await ask("def main(argv):", 4)
        origin = present(service.ring)._core
        watchdog = Watchdog(monkeypatch)
        async with asyncio.timeout(120), watchdog:
            reading = asyncio.create_task(ask("import os\nx = 1\n" * 2**16, 2**20))
            while not origin._running or len(next(iter(origin._running.values())).generation.tree) < 2000:
                await asyncio.sleep(0.05)
            short = await ask("def main(argv):", 8)
            reading.cancel()
            await asyncio.wait({reading})
            while origin._running:
                await asyncio.sleep(0.01)
    assert short and not watchdog.slow


@pytest.mark.parametrize("holds_gil", [True, False])
async def test_the_watchdog_sees_a_callback_that_is_long(monkeypatch: pytest.MonkeyPatch, holds_gil: bool) -> None:
    def block() -> None:
        if holds_gil:
            sum(range(50_000_000))
        else:
            time.sleep(5 * LIMIT_S * slowness())

    watchdog = Watchdog(monkeypatch)
    async with watchdog:
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().call_soon(block)
        await asyncio.sleep(0.1)
    assert sum("block" in slow[-1] for slow in watchdog.slow) == 1  # beside others that a busy core holds up
