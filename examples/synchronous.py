"""The client for programs that do not await: ten lines around it, and one event loop for all that they ask.

python examples/synchronous.py                        # starts a server of its own for a moment
python examples/synchronous.py http://127.0.0.1:8008  # asks yours
"""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from typing import Any, Self

from flowspec_edge import Answer, Client

SERVE = ("-m", "flowspec_edge", "serve", "--port", "0", "--cluster", "synchronous-example")


class SynchronousClient:
    def __init__(self, *urls: str, **options: Any) -> None:
        self._runner, self._client = asyncio.Runner(), Client(*urls, **options)

    def __enter__(self) -> Self:
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.run(self._client.__aexit__(*error))
        self._runner.close()

    def complete(self, prompt: str, **options: Any) -> Answer:
        return self._runner.run(self._client.complete(prompt, **options))

    def reply(self, messages: Any, **options: Any) -> Answer:
        return self._runner.run(self._client.reply(messages, **options))


def ask(url: str) -> None:
    with SynchronousClient(url) as client:
        answer = client.complete("def main(argv):", max_new_tokens=24, temperature=0.6, seed=7)
        print(f"def main(argv):{answer.text}")
        print(f"\n{answer.usage}, {answer.trips} trips")


def ask_own() -> None:
    with subprocess.Popen([sys.executable, *SERVE], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = re.search(r"http://[\d.]+:\d+", server.stdout.readline())
        assert found is not None
        ask(found.group())
        server.terminate()


if __name__ == "__main__":
    ask(sys.argv[1]) if len(sys.argv) > 1 else ask_own()
