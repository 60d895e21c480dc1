"""What encryption costs on a ring of boards: laps of a chunk over real links, with and without the cluster key in
turns.

Five hosts in network namespaces, each link shaped to 150 Mbit/s. Needs root and iproute2:

    python -m benchmarks.encryption
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np

from flowspec_edge.core import wire
from flowspec_edge.core.rows import Chunk, Row
from flowspec_edge.net.auth import Credentials, derive_credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import LinkServer, open_link
from tests.lan import Lan, lan_of, why_not

PLAIN_PORT, SECURE_PORT = 7001, 7002
CONNECT_S = 20.0
SECRET = bytes(range(20))


class Station:
    """One host's part in one ring: it sends on to the next host what comes in."""

    def __init__(self, number: int, addresses: list[str], port: int, credentials: Credentials | None) -> None:
        self.number, self.addresses, self.port, self.credentials = number, addresses, port, credentials
        self.incoming: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[tuple[Link, Link]]:
        """The links from the host behind and to the host ahead."""
        server = await LinkServer.start(
            self.addresses[self.number], self.port, self._welcome, self._take, credentials=self.credentials
        )
        ahead = await self._connect()
        try:
            yield await self.incoming, ahead
        finally:
            self._closed.set()
            await ahead.close()
            await server.close()

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(f"pi-{self.number}", "0", 0, [])

    async def _take(self, link: Link) -> None:
        self.incoming.set_result(link)
        await self._closed.wait()

    async def _connect(self) -> Link:
        host = self.addresses[(self.number + 1) % len(self.addresses)]
        hello = wire.Hello(f"pi-{self.number}", "0", wire.PROTOCOL_VERSION, wire.DATA, "")
        async with asyncio.timeout(CONNECT_S):
            while True:
                try:
                    link, _ = await open_link(host, self.port, hello, credentials=self.credentials)
                    return link
                except Exception:
                    await asyncio.sleep(0.1)  # the next host has not started yet


async def relay(behind: Link, ahead: Link) -> None:
    async for message in behind:
        ahead.send(message)


async def run_station(number: int, addresses: list[str], num_laps: int, num_bytes: int) -> None:
    credentials = derive_credentials(SECRET)
    plain = Station(number, addresses, PLAIN_PORT, None)
    secure = Station(number, addresses, SECURE_PORT, credentials)
    async with plain.open() as (plain_behind, plain_ahead), secure.open() as (secure_behind, secure_ahead):
        if number:
            await asyncio.gather(relay(plain_behind, plain_ahead), relay(secure_behind, secure_ahead))
            return
        rows = tuple(Row(i, max(i - 1, 0), 7) for i in range(64))
        hidden = np.random.default_rng(0).standard_normal((64, num_bytes // 256), np.float32)
        laps: dict[str, list[float]] = {"plain": [], "encrypted": []}
        for lap in range(num_laps + 2):
            for name, behind, ahead in (
                ("plain", plain_behind, plain_ahead),
                ("encrypted", secure_behind, secure_ahead),
            ):
                began = time.perf_counter()
                ahead.send(wire.ChunkMessage(lap, Chunk(1, rows, 1, hidden)))
                await behind.receive()
                if lap >= 2:  # TCP has opened its window by then
                    laps[name].append(time.perf_counter() - began)
        print(json.dumps(laps), flush=True)


async def measure(lan: Lan, num_laps: int, num_bytes: int, rate: str) -> dict[str, list[float]]:
    addresses = [lan.address(number) for number in range(lan.num_hosts)]
    for number in range(lan.num_hosts):
        tbf = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "32k", "latency", "40ms")
        lan.on_host(number, *tbf)
    arguments = (",".join(addresses), str(num_laps), str(num_bytes))
    stations = [
        await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", lan.host(number), sys.executable, "-m", "benchmarks.encryption"),
            *("--station", str(number), *arguments),
            stdout=asyncio.subprocess.PIPE,
        )
        for number in reversed(range(lan.num_hosts))
    ]
    out, _ = await stations[-1].communicate()
    await asyncio.gather(*(station.wait() for station in stations))
    result: dict[str, list[float]] = json.loads(out)
    return result


def report(laps: dict[str, list[float]], options: argparse.Namespace) -> dict[str, object]:
    plain, encrypted = (statistics.median(laps[name]) for name in ("plain", "encrypted"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "hosts": options.hosts,
        "rate": options.rate,
        "chunk_bytes": options.bytes,
        "laps": options.laps,
        "plain_ms": round(plain * 1e3, 2),
        "encrypted_ms": round(encrypted * 1e3, 2),
        "cost": round(encrypted / plain - 1, 4),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores for all hosts, load {os.getloadavg()[0]:.1f}",
        "commit": commit,
    }


async def main(options: argparse.Namespace) -> int:
    if reason := why_not():
        print(f"encryption: {reason}", file=sys.stderr)
        return 1
    async with lan_of(options.hosts) as lan:
        result = report(await measure(lan, options.laps, options.bytes, options.rate), options)
    if options.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:14} {value}" for name, value in result.items()))
        print("cost = median lap encrypted / median lap plain - 1")
    return 0


def parse() -> Callable[[], Coroutine[Any, Any, int | None]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=5)
    parser.add_argument("--laps", type=int, default=40, help="of each kind, in turns (default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=600_064, help="of hidden rows per lap (default: %(default)s)")
    parser.add_argument("--rate", default="150mbit", help="of each host's link, as tc writes it (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--station", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.station is None:
        return lambda: main(options)
    number, addresses, num_laps, num_bytes = options.station
    return lambda: run_station(int(number), addresses.split(","), int(num_laps), int(num_bytes))


if __name__ == "__main__":
    sys.exit(asyncio.run(parse()()))
