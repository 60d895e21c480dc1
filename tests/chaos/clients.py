"""Clients that ask for one text after another, until standard input ends.

Run as ``python -m tests.chaos.clients URL NUM_CLIENTS`` with a JSON list of requests as the first line of standard
input; ``soak.py`` does. Each text is told as a JSON line: which request it was, its tokens, how it ended, and the
longest gap between two of its pieces.
"""

import asyncio
import itertools
import json
import sys
import time
from typing import Any

from flowspec_edge.client import Client
from flowspec_edge.errors import FlowspecError

AGAIN_S = 0.5
"""How long to wait behind a text that failed."""


async def _ask(client: Client, number: int, request: dict[str, Any]) -> None:
    """Ask once, and tell what came."""
    told: dict[str, Any] = {"request": number, "token_ids": [], "error": ""}
    last, pause_s = time.monotonic(), 0.0
    try:
        answer = client.generate(**request)
        async for piece in answer:
            now = time.monotonic()
            pause_s, last = max(pause_s, now - last), now
            told["token_ids"] += piece.token_ids
        told["end"] = answer.finish_reason
    except FlowspecError as error:
        told |= {"end": "error", "error": str(error)}
        await asyncio.sleep(AGAIN_S)
    print(json.dumps({**told, "pause_s": round(pause_s, 3)}), flush=True)


async def _go_on_asking(client: Client, first: int, requests: list[dict[str, Any]]) -> None:
    for number in itertools.count(first):
        await _ask(client, number % len(requests), requests[number % len(requests)])


async def main() -> None:
    requests = json.loads(sys.stdin.readline())
    async with Client(sys.argv[1]) as client, asyncio.TaskGroup() as group:
        asking = [group.create_task(_go_on_asking(client, first, requests)) for first in range(int(sys.argv[2]))]
        await asyncio.to_thread(sys.stdin.read)
        for task in asking:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
