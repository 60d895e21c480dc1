"""Several texts at once from a server, told as JSON lines: every piece with its time, and how each text ended.

Run as ``python -m tests.chaos.streams URL`` with a JSON list of requests on standard input; ``rounds.py`` does.
"""

import asyncio
import json
import sys
import time
from typing import Any

from flowspec_edge.client import Client
from flowspec_edge.errors import FlowspecError


async def _stream(client: Client, number: int, request: dict[str, Any]) -> None:
    def tell(**what: Any) -> None:
        print(json.dumps({"stream": number, "at": time.monotonic(), **what}), flush=True)

    try:
        answer = client.generate(request.pop("prompt"), **request)
        async for piece in answer:
            tell(token_ids=piece.token_ids)
        tell(end=answer.finish_reason)
    except FlowspecError as error:
        tell(end="error", error=str(error))


async def main() -> None:
    requests = json.load(sys.stdin)
    async with Client(sys.argv[1]) as client, asyncio.TaskGroup() as group:
        for number, request in enumerate(requests):
            group.create_task(_stream(client, number, request))


if __name__ == "__main__":
    asyncio.run(main())
