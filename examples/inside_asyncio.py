"""Two nodes and an origin inside one asyncio program: nothing is announced, and no other process takes part.

    python examples/inside_asyncio.py

On boards of their own the nodes would be `flowspec node`, and `find_peers` of `flowspec_edge.net.directory` would find
them.
"""

import asyncio
import contextlib

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring

MEMORY_BYTES = 512 * 2**20  # that each node offers for layers


def settings(name: str, bundle: Bundle, memory_bytes: int = 0) -> NodeSettings:
    """A node that listens on this machine only, so it needs no cluster key."""
    return NodeSettings(
        name=name, cluster="one-program", bundles=(bundle,), memory_bytes=memory_bytes, is_announced=False
    )


async def main() -> None:
    bundle = Bundle.load(DEMO_BUNDLE)
    async with contextlib.AsyncExitStack() as closing:
        nodes = []
        for name in ("left", "right", "origin"):
            node = await Node.start(settings(name, bundle, MEMORY_BYTES))
            closing.push_async_callback(node.close)
            nodes.append(node)
        *serving, origin = nodes
        ring = await closing.enter_async_context(open_ring(origin, bundle, [node.announcement for node in serving]))
        for stage in ring.stages:
            print(f"{stage.plan.node} has layers [{stage.plan.start}, {stage.plan.stop})")

        # Two texts at once; each is what the unsplit model would write.
        prompts = ("def main(argv):", "class Stack:")
        texts = await asyncio.gather(*(write(ring, prompt) for prompt in prompts))
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"\n{prompt}{text}")


async def write(ring: Ring, prompt: str) -> str:
    pieces = ring.generate(prompt, GenerateOptions(max_new_tokens=32))
    return "".join([piece.text async for piece in pieces])


if __name__ == "__main__":
    asyncio.run(main())
