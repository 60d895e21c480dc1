"""Where the time of a hop and a forward goes: one chunk at a time between two processes, through the project's own
links and stage host, over layers that do nothing.

    python -m benchmarks.hop                    64 KB of hidden rows, encrypted, over loopback
    python -m benchmarks.hop --plain --json
    python -m benchmarks.hop --rate 150mbit     over a wire of that rate as well (needs root and iproute2)

A lap goes from the one process, which plays the origin, to the stage in the other one and back: two hops and a forward.
Both read the same clock, so each moment of the way is told from the one before. The part of a step that is spent in a
function is measured around that function; what is left of it is the event loop's, the system's, and Python's between.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import platform
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from flowspec_edge.bench.report import format_table
from flowspec_edge.core import codec, wire
from flowspec_edge.core import events as ev
from flowspec_edge.core.journal import Journal
from flowspec_edge.core.limits import CREDITS_PER_HOP
from flowspec_edge.core.rows import NO_PARENT, Chunk, Row, SessionSpec, SlotMove
from flowspec_edge.core.speculation.stage import Stage
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.auth import Credentials, derive_credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import LinkServer, open_link
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.stage_host import StageHost, StageLinks
from tests.lan import lan_of, why_not

SECRET = bytes(range(20))
SESSION = 1
WARM_LAPS = 20
"""TCP has opened its window by then, and Python has specialised what runs often."""
MOMENTS = ("told", "run", "ran", "told again", "sending")
"""What the stage notes of a chunk, in this order: it came, its forward began and ended, that was told, it left."""
STEPS = (
    ("from the sender to the stage's core", "sent", "told"),
    ("core, and over to the thread", "told", "run"),
    ("the forward, a copy of the rows", "run", "ran"),
    ("back to the loop", "ran", "told again"),
    ("core, up to the next hop", "told again", "sending"),
    ("a hop and a forward", "sent", "sending"),
    ("the hop back", "sending", "back"),
)
FUNCTIONS: dict[str, tuple[Any, str]] = {
    "encode": (codec, "encode"),
    "read the header": (codec, "read_header"),
    "decode": (codec, "complete"),
    "TLS write": (ssl.SSLObject, "write"),
    "TLS read": (ssl.SSLObject, "read"),
    "system: send": (socket.socket, "send"),
    "system: receive": (socket.socket, "recv_into"),
}


class Spent:
    """Seconds that this process spends in some functions."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(FUNCTIONS, 0.0)
        for name, (holder, attribute) in FUNCTIONS.items():
            setattr(holder, attribute, self._watched(name, getattr(holder, attribute)))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds[name] += time.perf_counter() - began

        return watched


class Moments:
    """When what happened to each chunk in this process, and the seconds of each function and of the processor then."""

    def __init__(self, spent: Spent | None) -> None:
        self._spent = spent
        self.noted: dict[str, list[float]] = {name: [] for name in (*MOMENTS, "sent", "back")}
        self.laps: list[dict[str, float]] = []

    def note(self, name: str) -> None:
        self.noted[name].append(time.monotonic())

    def end_lap(self) -> None:
        seconds = self._spent.seconds if self._spent else {}
        self.laps.append({"processor": time.process_time(), **seconds})

    def told(self) -> dict[str, Any]:
        return {"noted": self.noted, "laps": self.laps}


class NotingJournal(Journal):
    """Writes nothing, and notes when the core is told of a chunk and of a forward."""

    def __init__(self, moments: Moments) -> None:
        super().__init__("stage", {})
        self._moments = moments

    def handle(self, core: Any, event: Any, now: float) -> Any:
        if isinstance(event, ev.ChunkArrived):
            self._moments.note("told")
        elif isinstance(event, ev.ForwardFinished):
            self._moments.note("told again")
        return super().handle(core, event, now)


class NotingBoard(Board):
    """Notes when a chunk leaves."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def send(self, link: Link, message: wire.Message) -> None:
        if isinstance(message, wire.ChunkMessage):
            self._moments.note("sending")
            self._moments.end_lap()
        super().send(link, message)


class NoLayers:
    """A runner whose forward copies the rows, as that of a stage does in the end."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments

    def open_cache(self, session: int, capacity: int) -> None:
        pass

    def free_cache(self, session: int) -> None:
        pass

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None:
        pass

    def take_over_cache(self, session: int, kept: int) -> bool:
        return False

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished:
        self._moments.note("run")
        assert forward.hidden is not None
        finished = ev.ForwardFinished(forward.hidden.copy())
        self._moments.note("ran")
        return finished


def keep_to_core(number: int) -> None:
    """Each process has a core of its own, as each board has its own: on one they would wait for each other."""
    if hasattr(os, "sched_setaffinity") and (os.cpu_count() or 1) > number:
        os.sched_setaffinity(0, {number})


def hello(purpose: str) -> wire.Hello:
    return wire.Hello("pi-hall", "0", wire.PROTOCOL_VERSION, purpose, "hop")


def welcome() -> wire.Welcome:
    return wire.Welcome("pi-kitchen", "0", 0, [])


@contextlib.asynccontextmanager
async def listening(
    host: str, port: int, credentials: Credentials | None, purposes: Sequence[str]
) -> AsyncIterator[tuple[LinkServer, dict[str, asyncio.Future[Link]]]]:
    """A server, and the links of these purposes that will come."""
    loop = asyncio.get_running_loop()
    came: dict[str, asyncio.Future[Link]] = {purpose: loop.create_future() for purpose in purposes}

    async def take(link: Link) -> None:
        came[link.purpose].set_result(link)
        await link.wait_closed()

    server = await LinkServer.start(host, port, welcome, take, credentials=credentials)
    try:
        yield server, came
    finally:
        await server.close()


async def serve_stage(host: str, back_host: str, back_port: int, *, is_plain: bool, is_watched: bool) -> None:
    """The other process: a stage between the link that comes and the one that it opens, until the origin leaves."""
    keep_to_core(1)
    credentials = None if is_plain else derive_credentials(SECRET)
    moments = Moments(Spent() if is_watched else None)
    async with listening(host, 0, credentials, (wire.CONTROL, wire.DATA)) as (server, came):
        raw = await asyncio.start_server(take_raw, host, 0)
        print(server.port, raw.sockets[0].getsockname()[1], flush=True)
        control, behind = await came[wire.CONTROL], await came[wire.DATA]
        ahead, _ = await open_link(back_host, back_port, hello(wire.DATA), credentials=credentials)
        with ThreadPoolExecutor(1) as executor:
            host_of_stage = StageHost(
                Stage(is_last=False, embeds=False),
                NotingJournal(moments),
                NoLayers(moments),
                StageLinks(control, behind, ahead),
                NotingBoard(moments),
                executor,
                max_capacity=2**20,
                activity=Activity(),
            )
            async with host_of_stage:
                await host_of_stage.wait_ended()
        await ahead.close()
        raw.close()
    print(json.dumps(moments.told()), flush=True)


class Origin:
    """Sends chunks of a prompt's rows and takes them back. Each lap is a chunk of ``num_rows`` rows."""

    def __init__(self, control: Link, ahead: Link, behind: Link, num_rows: int, num_bytes: int) -> None:
        self._control, self._ahead, self._behind = control, ahead, behind
        self._num_rows = num_rows
        self._hidden = np.random.default_rng(0).standard_normal((num_rows, num_bytes // num_rows // 4), np.float32)
        self._num_sent = 0

    async def open(self, num_laps: int) -> None:
        """Open the session; all of its rows are its prompt's."""
        num_prompt = (num_laps + 1) * self._num_rows
        self._control.send(wire.OpenSession(SessionSpec(SESSION, num_prompt, num_prompt=num_prompt)))
        wire.expect(await self._control.receive(), wire.SessionOpened, self._control.peer)

    def send(self) -> None:
        first = self._num_sent * self._num_rows
        rows = tuple(Row(id, id - 1 if id else NO_PARENT, 7) for id in range(first, first + self._num_rows))
        self._ahead.send(wire.ChunkMessage(self._num_sent, Chunk(SESSION, rows, self._num_rows, self._hidden)))
        self._num_sent += 1

    async def take_back(self) -> None:
        wire.expect(await self._behind.receive(), wire.ChunkMessage, self._behind.peer)
        self._behind.send(wire.Credit(1))


async def one_at_a_time(origin: Origin, moments: Moments, num_laps: int) -> None:
    for _ in range(num_laps):
        moments.note("sent")
        origin.send()
        await origin.take_back()
        moments.note("back")
        moments.end_lap()


async def bytes_per_s(origin: Origin, num_laps: int, num_bytes: int) -> float:
    """The rate of chunks that follow each other as closely as credits allow."""
    began = time.monotonic()
    for _ in range(CREDITS_PER_HOP):
        origin.send()
    for _ in range(num_laps - CREDITS_PER_HOP):
        await origin.take_back()
        origin.send()
    for _ in range(CREDITS_PER_HOP):
        await origin.take_back()
    return num_laps * num_bytes / (time.monotonic() - began)


async def raw_bytes_per_s(host: str, port: int, num_bytes: int) -> float:
    """The rate at which the system's own TCP carries so many bytes to the stage's process."""
    reader, writer = await asyncio.open_connection(host, port)
    began = time.monotonic()
    writer.write(num_bytes.to_bytes(8, "big") + bytes(num_bytes))
    await reader.readexactly(1)
    rate = num_bytes / (time.monotonic() - began)
    writer.close()
    await writer.wait_closed()
    return rate


async def take_raw(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Take what ``raw_bytes_per_s`` sends, and say when it is here."""
    num_left = int.from_bytes(await reader.readexactly(8), "big")
    while num_left:
        num_left -= len(await reader.read(2**18))
    writer.write(b"!")
    writer.close()
    await writer.wait_closed()


@contextlib.asynccontextmanager
async def stage_process(options: argparse.Namespace, back_port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    """The other process. Its first line has its ports, its last one what it noted."""
    inside = ("ip", "netns", "exec", options.stage_host) if options.stage_host else ()
    flags = [flag for flag in ("plain", "watched") if getattr(options, flag)]
    stage = await asyncio.create_subprocess_exec(
        *(*inside, sys.executable, "-m", "benchmarks.hop", *(f"--{flag}" for flag in flags)),
        *("--as-stage", options.stage_address, options.origin_address, str(back_port)),
        stdout=asyncio.subprocess.PIPE,
        limit=2**26,
    )
    try:
        yield stage
    finally:
        if stage.returncode is None:
            stage.kill()
        await stage.wait()


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """What one ring of two processes takes: each lap's moments, and the rate of chunks that follow each other."""
    credentials = None if options.plain else derive_credentials(SECRET)
    moments = Moments(Spent() if options.watched else None)
    listens = listening(options.origin_address, 0, credentials, (wire.DATA,))
    async with listens as (server, came), stage_process(options, server.port) as stage:
        assert stage.stdout is not None
        port, raw_port = map(int, (await stage.stdout.readline()).split())
        control, _ = await open_link(options.stage_address, port, hello(wire.CONTROL), credentials=credentials)
        ahead, _ = await open_link(options.stage_address, port, hello(wire.DATA), credentials=credentials)
        origin = Origin(control, ahead, await came[wire.DATA], options.rows, options.bytes)
        reading = asyncio.create_task(ahead.deliver(lambda credit: None))
        await origin.open(WARM_LAPS + 2 * options.laps)
        await one_at_a_time(origin, moments, WARM_LAPS + options.laps)
        rate = await bytes_per_s(origin, options.laps, options.bytes)
        reading.cancel()
        raw_rate = await raw_bytes_per_s(options.stage_address, raw_port, options.laps * options.bytes)
        await control.close()
        told = json.loads(await stage.stdout.readline())
        await ahead.close()
    return {"origin": moments.told(), "stage": told, "bytes_per_s": rate, "raw_bytes_per_s": raw_rate}


def medians_us(laps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each lap, in microseconds: what of it was spent in each function, and by the processor."""
    return {
        name: 1e6 * statistics.median(later[name] - lap[name] for lap, later in itertools.pairwise(laps[WARM_LAPS:]))
        for name in laps[0]
    }


def summarise(measured: dict[str, Any], watched: dict[str, Any]) -> dict[str, Any]:
    """Medians in microseconds. A lap has two hops and a forward, of which each process sends one and takes one."""
    num_laps = len(measured["origin"]["laps"])
    noted = {**measured["stage"]["noted"], **{name: measured["origin"]["noted"][name] for name in ("sent", "back")}}
    laps = {name: np.array(times[:num_laps])[WARM_LAPS:] for name, times in noted.items()}  # [laps]
    ends = [medians_us(watched[end]["laps"][:num_laps]) for end in ("origin", "stage")]
    processor = [medians_us(measured[end]["laps"][:num_laps])["processor"] for end in ("origin", "stage")]
    return {
        "steps_us": {name: 1e6 * float(np.median(laps[stop] - laps[start])) for name, start, stop in STEPS},
        "functions_us": {name: sum(end[name] for end in ends) / 2 for name in FUNCTIONS},
        "processor_us": dict(zip(("origin", "stage"), processor, strict=True)),
        "mbit_per_s": 8e-6 * measured["bytes_per_s"],
        "raw_tcp_mbit_per_s": 8e-6 * measured["raw_bytes_per_s"],
        "share_of_raw_tcp": measured["bytes_per_s"] / measured["raw_bytes_per_s"],
    }


def format_summary(summary: dict[str, Any]) -> str:
    times = [*summary["steps_us"].items()]
    times += [(f"of a hop: {name}", spent) for name, spent in summary["functions_us"].items()]
    times += [(f"processor, a lap: {name}", spent) for name, spent in summary["processor_us"].items()]
    table = format_table(["", "median, us"], [[name, f"{spent:.0f}"] for name, spent in times])
    rates = f"{summary['mbit_per_s']:.0f} Mbit/s of rows, {summary['raw_tcp_mbit_per_s']:.0f} by TCP alone"
    return f"{table}\n\n{rates} ({summary['share_of_raw_tcp']:.1%})"


async def main(options: argparse.Namespace) -> int:
    if options.rate and not options.stage_host:
        return await main_on_wire(options)
    keep_to_core(0)
    measured = await run(options)
    options.watched = True
    summary = {**summarise(measured, await run(options)), **setting(options)}
    print(json.dumps(summary) if options.json else format_summary(summary))
    return 0


async def main_on_wire(options: argparse.Namespace) -> int:
    """The same in two hosts of a LAN of network namespaces, whose cards send at ``--rate``."""
    if reason := why_not():
        print(f"hop: {reason}", file=sys.stderr)
        return 1
    async with lan_of(2) as lan:
        for number in range(2):
            tbf = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", options.rate)
            lan.on_host(number, *tbf, "burst", "32k", "latency", "40ms")
        process = await asyncio.create_subprocess_exec(
            *("ip", "netns", "exec", lan.host(0), sys.executable, "-m", "benchmarks.hop", *sys.argv[1:]),
            *("--stage-host", lan.host(1), "--stage-address", lan.address(1), "--origin-address", lan.address(0)),
        )
        return await process.wait()


def setting(options: argparse.Namespace) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "chunk_bytes": options.bytes,
        "rows": options.rows,
        "laps": options.laps,
        "encrypted": not options.plain,
        "rate": options.rate,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "commit": commit,
    }


def parse() -> Callable[[], Coroutine[Any, Any, int | None]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=65536, help="of hidden rows per chunk (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="of a chunk (default: %(default)s)")
    parser.add_argument("--laps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="without encryption")
    parser.add_argument("--rate", help="of the wire, as tc writes it (default: loopback)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for hidden in ("--stage-host", "--stage-address", "--origin-address"):
        parser.add_argument(hidden, default="" if hidden == "--stage-host" else LOOPBACK, help=argparse.SUPPRESS)
    parser.add_argument("--as-stage", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--watched", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_stage is None:
        return lambda: main(options)
    host, back_host, back_port = options.as_stage
    return lambda: serve_stage(host, back_host, int(back_port), is_plain=options.plain, is_watched=options.watched)


if __name__ == "__main__":
    sys.exit(asyncio.run(parse()()))
