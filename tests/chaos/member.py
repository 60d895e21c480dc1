"""A member of the cluster that is served all the time: ``python -m tests.chaos.member HOST PORT``.

It writes a text over a ring of the one node there, over and over, and comes in anew with a handshake and a greeting.
Each takes its time, which is told as JSON lines: ``{"greeting": seconds}``, ``{"gap": seconds}`` between two pieces of
a text, ``{"text": true}`` where a text was the first one again. It goes on until standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import wire
from flowspec_edge.errors import FlowspecError
from flowspec_edge.net.addresses import EVERY_INTERFACE, NODE_PORT
from flowspec_edge.net.auth import derive_credentials, load_key
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import open_link
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from tests.narrowing import present

GREETING_PAUSE_S = 0.05
PROMPT = [5, 6, 7, 8]
OPTIONS = GenerateOptions(max_new_tokens=60)


def tell(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def write(ring: Ring) -> list[int]:
    tokens: list[int] = []
    last = time.monotonic()
    async with contextlib.aclosing(ring.generate(PROMPT, OPTIONS)) as pieces:
        async for piece in pieces:
            tell(gap=time.monotonic() - last)
            last = time.monotonic()
            tokens += piece.token_ids
    return tokens


async def write_on(ring: Ring) -> None:
    wanted = await write(ring)
    while True:
        tell(text=await write(ring) == wanted)
        await asyncio.sleep(0.02)


async def come_in_again_and_again(settings: NodeSettings, host: str, port: int) -> None:
    while True:
        began = time.monotonic()
        try:
            link, _ = await open_link(host, port, settings.hello(wire.CONTROL, ""), credentials=settings.credentials)
        except FlowspecError as refused:
            tell(refused=str(refused))
        else:
            tell(greeting=time.monotonic() - began)
            await link.close()
        await asyncio.sleep(GREETING_PAUSE_S)


async def main() -> None:
    host, port = sys.argv[1], int(sys.argv[2])
    bundle = Bundle.load(DEMO_BUNDLE)
    credentials = derive_credentials(present(load_key()))
    settings = NodeSettings(
        name="member",
        cluster="home",
        host=EVERY_INTERFACE,
        port=NODE_PORT,
        bundles=(bundle,),
        credentials=credentials,
        is_announced=False,
    )
    node = await Node.start(settings)
    target = Announcement(node="pi-0", host=host, port=port, cluster="home", version="")
    try:
        async with open_ring(node, bundle, [target]) as ring:
            tasks = [
                asyncio.create_task(write_on(ring)),
                asyncio.create_task(come_in_again_and_again(settings, host, port)),
            ]
            closed = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
            await asyncio.wait([*tasks, closed], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
                task.cancel()
            await asyncio.wait(tasks)
    finally:
        await node.close()


if __name__ == "__main__":
    asyncio.run(main())
