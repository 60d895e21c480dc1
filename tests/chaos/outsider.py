"""Someone on the network without the key: ``python -m tests.chaos.outsider HOST PORT``, with a plan as JSON on standard
input; ``outsiders.py`` makes it. Each kind of misbehaviour goes on until standard input closes or time is up.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from zeroconf._dns import DNSAddress, DNSPointer, DNSService, DNSText
from zeroconf._protocol.outgoing import DNSOutgoing
from zeroconf.const import _CLASS_IN, _FLAGS_AA, _FLAGS_QR_RESPONSE, _TYPE_A, _TYPE_PTR, _TYPE_SRV, _TYPE_TXT

from flowspec_edge.net.auth import derive_credentials
from flowspec_edge.net.discovery import SERVICE_TYPE
from tests.fuzz.inputs import NASTY_TEXTS, changed

NUM_SILENT = 1000
NUM_SLOW = 200
NUM_LOOPS = 8
PAUSE_S = 0.04
"""Of each of NUM_LOOPS loops that connect again and again: some 150 connections a second."""
PATIENCE_S = 1.0
"""How long one that has said something waits for an answer."""
RECORDS_PER_S = 200
MDNS = ("224.0.0.251", 5353)
HALF_A_HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(500)
"""The beginning of a TLS handshake."""


class Outsider:
    """Misbehaves against one node, and counts how often."""

    def __init__(self, host: str, port: int, own: str, handshake: bytes, record: tuple[str, str], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._host, self._port, self._own = host, port, own
        self._handshake, self._record = handshake, record
        self._rng = random.Random(seed)
        self._stranger = derive_credentials(self._rng.randbytes(20)).client
        self._nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._nobody.check_hostname, self._nobody.verify_mode = False, ssl.CERT_NONE

    @property
    def kinds(self) -> dict[str, Callable[[], Coroutine[Any, Any, None]]]:
        return {
            "silent sockets": lambda: self._crowd(NUM_SILENT, b""),
            "slow writers": lambda: self._crowd(NUM_SLOW, HALF_A_HELLO),
            "garbage": lambda: self._again_and_again(self._garbage),
            "wrong certificates": lambda: self._again_and_again(self._shake_hands),
            "replayed handshakes": lambda: self._again_and_again(self._replay),
            "forged mDNS": self._forge,
        }

    async def misbehave(self, kinds: list[str]) -> None:
        async with asyncio.TaskGroup() as group:
            for kind in kinds:
                group.create_task(self.kinds[kind]())

    async def _crowd(self, num: int, said: bytes) -> None:
        """``num`` sockets, of which each says a byte now and then; those that are closed come again a second later."""
        async with asyncio.TaskGroup() as group:
            for _ in range(num):
                group.create_task(self._one_of_a_crowd(said))

    async def _one_of_a_crowd(self, said: bytes) -> None:
        while True:
            self.counts["slow" if said else "silent"] += 1
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(self._host, self._port)
                with contextlib.closing(writer):
                    for byte in said:
                        writer.write(bytes([byte]))
                        await writer.drain()
                        await asyncio.sleep(0.1)
                    await reader.read()
            await asyncio.sleep(1.0)

    async def _again_and_again(self, attempt: Callable[[], Awaitable[None]]) -> None:
        async def loop() -> None:
            while True:
                self.counts[attempt.__name__.strip("_")] += 1
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await attempt()
                await asyncio.sleep(PAUSE_S)

        async with asyncio.TaskGroup() as group:
            for _ in range(NUM_LOOPS):
                group.create_task(loop())

    async def _garbage(self) -> None:
        kind = self._rng.randrange(3)
        size = self._rng.choice((1, 10, 1000, 65536))
        junk = (self._rng.randbytes(size), HALF_A_HELLO, b"GET /link/control HTTP/1.1\r\nHost: \x1b[2J\r\n\r\n")[kind]
        await self._say(junk)

    async def _replay(self) -> None:
        """What a member said before, to the byte, or nearly so."""
        await self._say(self._handshake if self._rng.random() < 0.5 else changed(self._rng, self._handshake))

    async def _say(self, said: bytes) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        with contextlib.closing(writer), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                writer.write(said)
                await reader.read()

    async def _shake_hands(self) -> None:
        """With a certificate of another key, or none at all."""
        tls = self._rng.choice((self._stranger, self._nobody))
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=tls, server_hostname="x")
        with contextlib.closing(writer), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                writer.write(b"GET /link/control HTTP/1.1\r\n\r\n")
                if await reader.read(1):
                    self.counts["answered without the key"] += 1

    async def _forge(self) -> None:
        """Records of nodes that are none, in the cluster's own name, with names that a terminal would obey."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaking:
            speaking.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(self._own))
            speaking.bind((self._own, 0))
            while True:
                for _ in range(RECORDS_PER_S // 20):
                    self.counts["forged records"] += 1
                    speaking.sendto(self._forged(), MDNS)
                await asyncio.sleep(0.05)

    def _forged(self) -> bytes:
        rng, (cluster, fingerprint) = self._rng, self._record
        name = f"pi\x1b[2J-{rng.randrange(10**6)}.{SERVICE_TYPE}"
        texts = {"node": rng.choice((*NASTY_TEXTS, f"pi-{rng.randrange(999)}", "pi-0"))[:200], "cluster": cluster}
        texts |= {"key": fingerprint, "version": rng.choice(NASTY_TEXTS)[:50]}
        pairs = [f"{key}={text}".encode(errors="replace")[:255] for key, text in texts.items()]
        address = rng.choice((self._own, self._host, f"10.83.0.{rng.randrange(10, 250)}"))
        ttl = rng.choice((0, 1, 120, 4500))
        out = DNSOutgoing(_FLAGS_QR_RESPONSE | _FLAGS_AA)
        for record in (
            DNSPointer(SERVICE_TYPE, _TYPE_PTR, _CLASS_IN, ttl, name),
            DNSService(name, _TYPE_SRV, _CLASS_IN, ttl, 0, 0, rng.choice((1, self._port, 65535)), "forged.local."),
            DNSText(name, _TYPE_TXT, _CLASS_IN, ttl, b"".join(bytes([len(pair)]) + pair for pair in pairs)),
            DNSAddress("forged.local.", _TYPE_A, _CLASS_IN, ttl, socket.inet_aton(address)),
        ):
            out.add_answer_at_time(record, 0)
        packet = out.packets()[0]
        return packet if rng.random() < 0.8 else changed(rng, packet)


async def main() -> None:
    os.nice(5)  # or it would be the machine that is slow, which an outsider on its own is not
    logging.disable(logging.CRITICAL)  # asyncio tells of each connection that the node has closed
    plan = json.load(sys.stdin)
    host, port = sys.argv[1], int(sys.argv[2])
    record = plan["cluster"], plan["fingerprint"]
    outsider = Outsider(host, port, plan["own"], bytes.fromhex(plan["handshake"]), record, plan["seed"])
    print("begins", flush=True)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(plan["seconds"]):
            await outsider.misbehave(plan["kinds"])
    print(json.dumps(outsider.counts))


if __name__ == "__main__":
    asyncio.run(main())
