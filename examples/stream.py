"""Streams a text from `flowspec serve`, piece by piece, and cancels a second one in the middle.

python examples/stream.py                        # starts a server of its own for a moment
python examples/stream.py http://127.0.0.1:8008  # asks yours
"""

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator

from flowspec_edge import Client

SERVE = ("-m", "flowspec_edge", "serve", "--port", "0", "--cluster", "streaming-example")


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[str]:
    """`flowspec serve` as a process; gives its URL."""
    process = await asyncio.create_subprocess_exec(sys.executable, *SERVE, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode()
        found = re.search(r"http://[\d.]+:\d+", line)
        assert found is not None, line
        yield found.group()
    finally:
        process.terminate()
        await process.wait()


async def stream(url: str) -> None:
    async with Client(url) as client:
        answer = client.generate("def main(argv):", max_new_tokens=48, temperature=0.6, seed=7)
        async for piece in answer:
            print(piece.text, end="", flush=True)
        assert answer.statistics is not None
        print(f"\n\n{answer.statistics['tokens_per_s']:.1f} tokens/s, ended by {answer.finish_reason}")

        endless = client.generate("class Stack:", max_new_tokens=900)
        await anext(endless)
        await endless.aclose()  # the nodes stop working on it
        print(f"left after {endless.text!r}")


async def main() -> None:
    if len(sys.argv) > 1:
        await stream(sys.argv[1])
        return
    async with server() as url:
        await stream(url)


if __name__ == "__main__":
    asyncio.run(main())
