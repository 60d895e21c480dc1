"""Broken inputs against what is alive: a node that serves a ring meanwhile, and the HTTP interfaces of node and origin.

A witness writes over the ring all the time: its texts must be those that the ring wrote before.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import wire
from flowspec_edge.core.rows import NO_PARENT, Chunk, Row, SessionSpec
from flowspec_edge.errors import FlowspecError
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import LinkServer, open_link
from flowspec_edge.net.server import serve_app
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from flowspec_edge.web.app import build_app
from tests.fuzz.http_bodies import BODY, CONTENT_TYPES, Echo, body
from tests.fuzz.inputs import NASTY_TEXTS
from tests.fuzz.kinds import frame
from tests.net.conftest import send_raw

LIMIT_S = 20.0
"""For one input and its answer: whatever takes this long hangs."""
OPTIONS = GenerateOptions(max_new_tokens=12)
PROMPT = [5, 6, 7, 8]


class Hung(AssertionError):
    """Something did not answer within LIMIT_S."""


@dataclass
class Tally:
    """What came of the inputs, by kind."""

    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    num_texts: int = 0
    """Texts that the witness wrote meanwhile, each equal to the first."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A ring of one node, which is the target, and an origin."""

    node: Node
    ring: Ring
    bundle: Bundle


@contextlib.asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    bundle = Bundle.load(DEMO_BUNDLE)

    def settings(name: str) -> NodeSettings:
        return NodeSettings(name=name, cluster="fuzz", bundles=(bundle,), memory_bytes=2**30, is_announced=False)

    node, origin = await Node.start(settings("target")), await Node.start(settings("origin"))
    try:
        async with open_ring(origin, bundle, [node.announcement]) as ring:
            yield Scene(node, ring, bundle)
    finally:
        await asyncio.gather(node.close(), origin.close())


async def write(ring: Ring) -> list[int]:
    async with contextlib.aclosing(ring.generate(PROMPT, OPTIONS)) as pieces:
        return [token async for piece in pieces for token in piece.token_ids]


async def try_node(num: int, seed: int) -> Tally:
    """``num`` links to a live node, each with some broken messages on it."""
    rng, tally = random.Random(seed), Tally()
    async with scene() as at, _next_hop() as next_hop:
        wanted = await write(at.ring)
        await _outsider(at, rng, 5, next_hop)
        before = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
        for number in range(num):
            try:
                async with asyncio.timeout(LIMIT_S):
                    tally.counts[await _outsider(at, rng, number, next_hop)] += 1
                    if number % 20 == 0:
                        assert await write(at.ring) == wanted, "the witness read another text"
                        tally.num_texts += 1
            except TimeoutError:
                raise Hung(f"input {number} of seed {seed} is not answered within {LIMIT_S:g} s") from None
        await asyncio.sleep(2.5)  # longer than a link needs to end
        left = asyncio.all_tasks() - before[0]
        assert len(left) <= 4, f"tasks are left: {sorted(task.get_name() for task in left)}"
        assert len(os.listdir("/proc/self/fd")) <= before[1] + 8, "descriptors are left"
        assert await write(at.ring) == wanted
    return tally


async def _outsider(at: Scene, rng: random.Random, number: int, next_hop: int) -> str:
    """One link: Hello, a few messages that are wrong somewhere, and what became of it."""
    purpose = rng.choice((wire.CONTROL, wire.CONTROL, wire.DATA))
    hello = wire.Hello(f"outsider-{number}", "0.1.0", wire.PROTOCOL_VERSION, purpose, f"none-{number}/0")
    link, _ = await open_link("127.0.0.1", at.node.port, hello)
    try:
        if purpose == wire.CONTROL and number % 25 == 5:
            return await _break_a_stage(at, rng, number, link, next_hop)
        for _ in range(rng.choice((1, 1, 3, 10))):
            _send(link, *frame(rng))
        return await _fate(link)
    except (FlowspecError, OSError, aiohttp.ClientError):
        return "refused"
    finally:
        await link.close()


async def _break_a_stage(at: Scene, rng: random.Random, number: int, control: Link, next_hop: int) -> str:
    """Open a stage as an origin would, and then say what none would say; the stage ends with its reason."""
    ring, host = f"broken-{number}", "127.0.0.1"
    control.send(wire.OpenStage(ring, 0, at.bundle.digest, 0, 2, "next", host, next_hop, [], ""))
    opened = await control.receive()
    assert isinstance(opened, wire.StageOpened), f"{opened}"
    hello = wire.Hello("before", "0.1.0", wire.PROTOCOL_VERSION, wire.DATA, f"{ring}/0")
    data, _ = await open_link(host, at.node.port, hello)
    try:
        control.send(wire.OpenSession(SessionSpec(1, 64)))
        assert await control.receive() == wire.SessionOpened(1)
        match rng.randrange(6):
            case 0:
                data.send(wire.ChunkMessage(0, Chunk(1, (Row(0, NO_PARENT, 2048),), 1)))
            case 1:
                for session in range(2, 100):
                    control.send(wire.OpenSession(SessionSpec(session, 64)))
            case 2:
                for at_row in range(1100):
                    control.send(wire.AdvanceSession(1, at_row, 5))
                    await asyncio.sleep(0)
            case 3:
                for chunk in range(8):
                    data.send(
                        wire.ChunkMessage(chunk, Chunk(1, (Row(chunk, chunk - 1 if chunk else NO_PARENT, 5),), 1))
                    )
            case 4:
                data.send(wire.ChunkMessage(0, Chunk(1, (Row(0, 7, 5),), 1)))
            case _:
                control.send(wire.OpenSession(SessionSpec(2, 10**9)))
        while not isinstance(said := await control.receive(), wire.StageFailure):
            pass
        assert said.reason
        return "a stage ended with its reason"
    finally:
        await data.close()


@contextlib.asynccontextmanager
async def _next_hop() -> AsyncIterator[int]:
    """The port of a listener that takes chunks and never grants credit."""

    async def take(link: Link) -> None:
        await link.wait_closed()

    server = await LinkServer.start("127.0.0.1", 0, lambda: wire.Welcome("next", "0.1.0", 0, []), take)
    try:
        yield server.port
    finally:
        await server.close()


def _send(link: Link, header: bytes, tail: bytes) -> None:
    send_raw(link, header)
    for start in range(0, len(tail), 1000):
        send_raw(link, tail[start : start + 1000])


async def _fate(link: Link) -> str:
    """Whether the node has ended the link by itself; one that it keeps answers a probe or still takes messages."""
    try:
        async with asyncio.timeout(0.02):
            while True:
                await link.receive()
    except FlowspecError:
        return "refused"
    except TimeoutError:
        return "kept"


# ----------------------------------------------------------------------------------------------- HTTP


RANGES = ("bytes=0-", "bytes=-1", "bytes=9-1", "x", "bytes=" + "9" * 50)


async def try_http(num: int, seed: int) -> Tally:
    """``num`` requests to the API and to a node's weights; none is answered by 500, and none is left unanswered."""
    rng, tally = random.Random(seed), Tally()
    settings = NodeSettings(name="target", cluster="fuzz", bundles=(Bundle.load(DEMO_BUNDLE),), is_announced=False)
    node, api = await Node.start(settings), await serve_app(build_app(Echo()), cancels_on_disconnect=True)
    completions = f"http://127.0.0.1:{api.port}/v1/completions"
    weights = f"http://127.0.0.1:{node.port}/weights"
    try:
        async with aiohttp.ClientSession() as session:
            for number in range(num):
                data, headers = body(rng, BODY), {"Content-Type": rng.choice(CONTENT_TYPES)}
                try:
                    async with asyncio.timeout(LIMIT_S):
                        match rng.randrange(4):
                            case 0:
                                asking = session.post(f"{weights}/have", data=data, headers=headers)
                            case 1:
                                name = rng.choice(NASTY_TEXTS)[:50].encode().hex()
                                ranges = {"Range": rng.choice(RANGES)}
                                asking = session.get(f"{weights}/{name}", headers=ranges)
                            case _:
                                asking = session.post(completions, data=data, headers=headers)
                        async with asking as answer:
                            await answer.read()
                except TimeoutError:
                    raise Hung(f"request {number} of seed {seed} is not answered within {LIMIT_S:g} s") from None
                assert answer.status != 500, f"request {number} of seed {seed}: {data[:200]!r}"
                tally.counts[str(answer.status)] += 1
    finally:
        await asyncio.gather(api.close(), node.close())
    return tally
