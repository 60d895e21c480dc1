"""Several texts at once from a server, told as JSON lines: every piece with its time, and how each text ended.

Run as ``python -m tests.chaos.streams URL``. It says when it is ready, and takes a JSON list of requests in each line
of its standard input: one batch, whose texts are asked for at once, beside those of others. ``asking.py`` does.
"""

import asyncio
import dataclasses
import inspect
import itertools
import json
import sys
import time
from typing import Any

from flowspec_edge.client import Client
from flowspec_edge.config import GenerateOptions
from flowspec_edge.errors import FlowspecError


def _tell(**what: Any) -> None:
    print(json.dumps({"at": time.monotonic(), **what}), flush=True)


def as_asked(prompt: str, options: GenerateOptions) -> dict[str, Any]:
    """The arguments of ``Client.generate`` that ask for this. A server has other defaults, so all of them are given."""
    known = inspect.signature(Client.generate).parameters
    wanted = {name: value for name, value in dataclasses.asdict(options).items() if name in known}
    return {"prompt": prompt, **wanted, "logit_bias": dict(options.logit_bias)}


async def _stream(client: Client, batch: int, number: int, request: dict[str, Any]) -> None:
    try:
        answer = client.generate(request.pop("prompt"), **request)
        async for piece in answer:
            _tell(batch=batch, stream=number, token_ids=piece.token_ids)
        _tell(batch=batch, stream=number, end=answer.finish_reason)
    except FlowspecError as error:
        _tell(batch=batch, stream=number, end="error", error=str(error))


async def main() -> None:
    async with Client(sys.argv[1]) as client, asyncio.TaskGroup() as group:
        _tell(ready=True)
        for batch in itertools.count():
            if not (line := await asyncio.to_thread(sys.stdin.readline)):
                break
            for number, request in enumerate(json.loads(line)):
                group.create_task(_stream(client, batch, number, request))


if __name__ == "__main__":
    asyncio.run(main())
