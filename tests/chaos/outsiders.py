"""Outsiders on the network of a node that serves a member: how soon the member is served, what becomes of the node's
memory, and whether anything reaches its terminal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import resource
import secrets
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowspec_edge.core.cluster.key_text import CLUSTER_PREFIX, format_key
from flowspec_edge.net.auth import derive_credentials
from tests.lan import Lan, captured, lan_of
from tests.narrowing import present

NODE, MEMBER, OUTSIDER = range(3)
PORT = 7361
SERVED_S = 0.2
"""Within this time a member is let in, and gets the next piece of its text."""
GROWN_SHARE = 0.1
KINDS = (
    "silent sockets",
    "slow writers",
    "garbage",
    "wrong certificates",
    "replayed handshakes",
    "forged mDNS",
)
WARM_UP_S = 3.0


@dataclass(slots=True)
class Service:
    """What the member was served in some time, in seconds."""

    greetings: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    num_texts: int = 0
    failures: list[str] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        return {
            "greeting_s": _quantiles(self.greetings),
            "gap_s": _quantiles(self.gaps),
            "greetings": len(self.greetings),
            "texts": self.num_texts,
            "failures": self.failures[:5],
        }


def _quantiles(values: Sequence[float]) -> list[float] | None:
    """p50, p99 and the largest."""
    ordered = sorted(values)
    return [round(ordered[int(share * (len(ordered) - 1))], 4) for share in (0.5, 0.99, 1.0)] if ordered else None


class Scene:
    """A node on its host and a member on another, each a process; and what the node has printed."""

    def __init__(self, lan: Lan, node: Process, member: Process, secret: bytes, handshake: bytes) -> None:
        self.printed: list[str] = []
        self.service = Service()
        self._lan, self._node, self._member = lan, node, member
        self._fingerprint = derive_credentials(secret).fingerprint
        self._handshake = handshake
        self._listening = [
            asyncio.create_task(self._read(present(node.stdout))),
            asyncio.create_task(self._read(present(node.stderr))),
            asyncio.create_task(self._hear(present(member.stdout))),
        ]

    async def close(self) -> None:
        for task in self._listening:
            task.cancel()
        await asyncio.wait(self._listening)

    async def until_joined(self) -> None:
        """Until the node has said that it knows the member, which is all that it has to say."""
        async with asyncio.timeout(30):
            while not any(line.startswith("joined: member") for line in self.printed):
                await asyncio.sleep(0.05)

    @property
    def memory_mb(self) -> float:
        """Of the node's process, resident."""
        pages = int(Path(f"/proc/{self._node.pid}/statm").read_text().split()[1])
        return round(pages * resource.getpagesize() / 1e6, 1)

    async def serve(self, seconds: float) -> Service:
        """What the member is served from now on for so long."""
        self.service = service = Service()
        await asyncio.sleep(seconds)
        assert self._node.returncode is None, "the node has ended"
        assert self._member.returncode is None, "the member has ended"
        return service

    async def attack(self, kinds: Sequence[str], seconds: float, seed: int) -> tuple[Service, dict[str, int]]:
        """The service while an outsider misbehaves in these ways, and how often it did."""
        plan = {
            "kinds": list(kinds),
            "seconds": seconds,
            "seed": seed,
            "own": self._lan.address(OUTSIDER),
            "handshake": self._handshake.hex(),
            "cluster": "home",
            "fingerprint": self._fingerprint,
        }
        outsider = await program(self._lan, OUTSIDER, "tests.chaos.outsider", self._lan.address(NODE), str(PORT))
        present(outsider.stdin).write(json.dumps(plan).encode())
        present(outsider.stdin).close()
        await present(outsider.stdout).readline()  # it begins
        service = await self.serve(seconds)
        counts = json.loads(await present(outsider.stdout).read())
        await outsider.wait()
        return service, counts

    async def _read(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            self.printed.append(line.decode(errors="replace").rstrip("\n"))

    async def _hear(self, stream: asyncio.StreamReader) -> None:
        async for line in stream:
            match json.loads(line):
                case {"greeting": seconds}:
                    self.service.greetings.append(seconds)
                case {"gap": seconds}:
                    self.service.gaps.append(seconds)
                case {"text": True}:
                    self.service.num_texts += 1
                case told:
                    self.service.failures.append(str(told))


async def program(lan: Lan, host: int, module: str, *arguments: str, state: Path | None = None) -> Process:
    """A program of these tests on a host of the LAN, which ends with it."""
    env = {**os.environ, **({"FLOWSPEC_HOME": str(state)} if state is not None else {})}
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", lan.host(host), sys.executable, "-m", module, *arguments),
        stdin=PIPE,
        stdout=PIPE,
        env=env,
    )
    lan.processes.append(process)
    return process


@contextlib.asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    """A node that serves a member, whose handshake an outsider has recorded."""
    secret = secrets.token_bytes(20)
    with tempfile.TemporaryDirectory(prefix="outsiders-") as folder:
        states = [Path(folder) / name for name in ("node", "member")]
        for state in states:
            state.mkdir(mode=0o700)
            (state / "cluster.key").touch(mode=0o600)
            (state / "cluster.key").write_text(format_key(secret, CLUSTER_PREFIX) + "\n")
        async with lan_of(3) as lan:
            peer = ("--peer", lan.address(MEMBER))
            options = ("--name", "pi-0", "--cluster", "home", "--threads", "1", "--port", str(PORT), *peer)
            node = await lan.start(NODE, "node", *options, env={"FLOWSPEC_HOME": str(states[0])})
            line = await present(node.stdout).readline()
            assert b"serves on" in line, line + await present(node.stderr).read()
            with captured(lan) as capture:
                address = lan.address(NODE), str(PORT)
                member = await program(lan, MEMBER, "tests.chaos.member", *address, state=states[1])
                assert await present(member.stdout).readline(), "the member is not served"
            hello = next(stream for stream in capture.streams() if stream[:1] == b"\x16" and stream[5:6] == b"\x01")
            at = Scene(lan, node, member, secret, hello[:65536])
            try:
                await at.until_joined()
                yield at
            finally:
                await at.close()


async def try_outsiders(
    seconds: float,
    rest_s: float,
    seed: int,
    *,
    each: bool = True,
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """With ``each`` every kind for so long, then all at once; ``rest_s`` later the node's memory is what it was.

    ``tell`` hears what is tried. The report's ``found`` has what should not have been.
    """
    began, rng, found = time.monotonic(), random.Random(seed), list[str]()
    by_kind: dict[str, Any] = {}
    async with scene() as at:
        if each:
            await at.serve(WARM_UP_S)
            by_kind["nobody"] = (await at.serve(seconds)).report()
        memory, printed = {"before_mb": at.memory_mb}, len(at.printed)
        for name, tried in [*((kind, [kind]) for kind in KINDS if each), ("all at once", KINDS)]:
            tell(f"outsiders: {name}")
            service, counts = await at.attack(tried, seconds, rng.getrandbits(32))
            by_kind[name] = {**service.report(), "tried": counts}
            found += [f"{name}: {what}" for what in complaints(service, counts)]
            memory["most_mb"] = max(at.memory_mb, memory.get("most_mb", 0.0))
        if rest_s:
            tell(f"outsiders: {rest_s:g} s of rest")
            by_kind["nobody any more"] = (await at.serve(rest_s)).report()
            memory["after_mb"] = at.memory_mb
            if memory["after_mb"] > memory["before_mb"] * (1 + GROWN_SHARE):
                found.append(f"memory has grown: {memory}")
        found += [f"the node printed {line!r}" for line in at.printed[printed:]]
    return {
        "seed": seed,
        "found": found,
        "memory": memory,
        "lines_printed": len(at.printed) - printed,
        "by_kind": by_kind,
        "s": round(time.monotonic() - began, 1),
    }


def complaints(service: Service, counts: dict[str, int]) -> list[str]:
    slow = [(what, max(times)) for what, times in (("greeting", service.greetings), ("gap", service.gaps)) if times]
    return [
        *(f"a {what} took {seconds:.3f} s" for what, seconds in slow if seconds > SERVED_S),
        *service.failures,
        *(["no greeting"] if not service.greetings else []),
        *(["no text"] if not service.num_texts else []),
        *(["the node answered one without the key"] if counts.get("answered without the key") else []),
    ]


def as_markdown(report: dict[str, Any]) -> str:
    """Service times by kind as a table."""

    def row(name: str, figures: dict[str, Any]) -> str:
        tried = sum(figures.get("tried", {}).values()) or "-"
        times = [
            " / ".join(f"{1000 * value:.0f}" for value in figures[key] or ()) or "-" for key in ("greeting_s", "gap_s")
        ]
        return f"| {name} | {tried} | {' | '.join(times)} |"

    lines = [
        "| outsiders | attempts | a member comes in, ms | gaps of its text, ms |",
        "|---|---|---|---|",
        *(row(name, figures) for name, figures in report["by_kind"].items()),
    ]
    return "\n".join(lines)
