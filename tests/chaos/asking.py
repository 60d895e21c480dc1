"""The client of a round of chaos: it asks for texts, and takes what comes of each with its time."""

import asyncio
import contextlib
import itertools
import json
import math
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowspec_edge.config import GenerateOptions
from tests.chaos.streams import as_asked
from tests.narrowing import present

Request = tuple[str, GenerateOptions]


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a round, and how it came out.

    ``pause_s`` is the longest gap between two pieces after the fault. ``flowing_s`` is the time from the origin's first
    notice of a loss to the next piece; None where nothing was noticed, or the text had ended.
    """

    is_equal: bool
    end: str
    pause_s: float
    flowing_s: float | None
    error: str = ""


class Texts:
    """The texts that a client is to ask for at once, as they come."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.asked_at = math.inf
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.times: list[list[float]] = [[] for _ in requests]
        self.ends: list[tuple[str, str]] = [("hangs", "")] * len(requests)
        self.have_ended = asyncio.Event()

    def take(self, line: dict[str, Any]) -> None:
        """What the client tells of one of them."""
        number = line["stream"]
        self.times[number].append(line["at"])
        if "end" in line:
            self.ends[number] = line["end"], line.get("error", "")
            if not any(end == "hangs" for end, _ in self.ends):
                self.have_ended.set()
        else:
            self.tokens[number] += line["token_ids"]

    def results(self, expected: Sequence[list[int]], struck_at: float, seen_at: float | None) -> tuple[Text, ...]:
        results = []
        for number, (end, error) in enumerate(self.ends):
            since = max(struck_at, self.asked_at)
            times = [since, *(at for at in self.times[number] if at >= since)]
            pause_s = max((after - before for before, after in itertools.pairwise(times)), default=0.0)
            after_notice = [at for at in times[1:] if seen_at is not None and at >= seen_at]
            flowing_s = (
                round(after_notice[0] - max(seen_at, since), 3) if after_notice and seen_at is not None else None
            )
            is_equal = self.tokens[number] == expected[number]
            results.append(Text(is_equal, end, round(pause_s, 3), flowing_s, error))
        return tuple(results)


class TextClient:
    """``tests/chaos/streams.py`` as a process on ``host``, which asks ``url`` as often as wanted."""

    def __init__(self, host: str, url: str) -> None:
        self._command = ("ip", "netns", "exec", host, sys.executable, "-m", "tests.chaos.streams", url)
        self._asked: list[Texts] = []
        self._process: Process | None = None
        self._listening: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ready to ask by the time this returns."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert b"ready" in await present(self._process.stdout).readline()
        self._asked = []
        self._listening = asyncio.create_task(self._listen(present(self._process.stdout)))

    async def close(self) -> None:
        """Whatever it still waits for, it leaves."""
        process, listening = present(self._process), present(self._listening)
        listening.cancel()
        await asyncio.wait({listening})
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()

    async def ask(self, texts: Texts) -> None:
        """Ask for them, and take them until all have ended."""
        self._asked.append(texts)
        asked = [as_asked(prompt, options) for prompt, options in texts.requests]
        texts.asked_at = time.monotonic()
        present(present(self._process).stdin).write(json.dumps(asked).encode() + b"\n")
        await texts.have_ended.wait()

    async def _listen(self, told: asyncio.StreamReader) -> None:
        async for line in told:
            what = json.loads(line)
            self._asked[what["batch"]].take(what)
