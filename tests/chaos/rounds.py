"""Rounds of chaos: three texts are written over a ring of real processes on hosts of their own, and one node is struck.

Each text must be the undisturbed one, token for token. The seed decides everything but the machine's own timing.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.cluster.key_text import CLUSTER_PREFIX, format_key
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from tests.chaos.faults import FAULTS, Boards
from tests.held_out import held_out_prompts
from tests.lan import Lan, lan_of
from tests.narrowing import present

PORT = 8008
NUM_STREAMS = 3
NUM_TOKENS = 160
ROUND_S = 120
"""A bound on one round: a text that is not complete by then hangs."""
LATEST_STRIKE_S = 1.5


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a round, and how it came out. ``pause_s`` is the longest gap between two pieces after the fault."""

    is_equal: bool
    end: str
    pause_s: float
    error: str = ""


@dataclass(frozen=True, slots=True)
class Round:
    """One fault and its texts. ``again_s``: until the first piece of a text that is asked for right after the fault."""

    fault: str
    node: int
    num_nodes: int
    struck_at_s: float
    texts: tuple[Text, ...]
    again_s: float


class Undisturbed:
    """What the model writes in one process, computed once per request."""

    def __init__(self) -> None:
        bundle = Bundle.load(DEMO_BUNDLE)
        self._tokenizer = Tokenizer(DEMO_BUNDLE / bundle.manifest.tokenizer.file)
        self._model = UnsplitModel(DEMO_BUNDLE, bundle.manifest)
        self._known: dict[tuple[str, GenerateOptions], list[int]] = {}
        self.prompts = [self._tokenizer.decode(prompt) for prompt in held_out_prompts()]

    def tokens(self, prompt: str, options: GenerateOptions) -> list[int]:
        key = prompt, options
        if key not in self._known:
            self._known[key] = list(self._model.generate(self._tokenizer.encode(prompt), options))
        return self._known[key]


def random_request(rng: random.Random, prompts: Sequence[str]) -> tuple[str, GenerateOptions]:
    options = GenerateOptions(
        max_new_tokens=NUM_TOKENS,
        temperature=rng.choice((0.0, 0.8)),
        seed=rng.choice((0, 7)),
        top_p=rng.choice((1.0, 0.9)),
    )
    return rng.choice(prompts), options


@contextlib.asynccontextmanager
async def cluster_of(num_nodes: int, folder: Path, key: bytes) -> AsyncIterator[tuple[Lan, Boards]]:
    """Nodes on hosts 0, 1, ..., all of which serve layers, and a server without layers on the host behind them."""
    states = [folder / f"host-{number}" for number in range(num_nodes + 1)]
    for state in states:
        state.mkdir(mode=0o700, exist_ok=True)
        (state / "cluster.key").touch(mode=0o600)
        (state / "cluster.key").write_text(format_key(key, CLUSTER_PREFIX) + "\n")
    async with lan_of(num_nodes + 1) as lan:
        boards = Boards(lan, states)
        await asyncio.gather(*(boards.start(number) for number in range(num_nodes)))
        env = {"FLOWSPEC_HOME": str(states[num_nodes])}
        server = await lan.start(num_nodes, "serve", "--no-layers", "--equal-split", "--port", str(PORT), env=env)
        line = await present(server.stdout).readline()
        assert b"model" in line, line + await present(server.stderr).read()
        drained = asyncio.create_task(present(server.stderr).read())  # or it would stand still once the pipe is full
        try:
            yield lan, boards
        finally:
            drained.cancel()


async def stream(lan: Lan, host: int, requests: Sequence[tuple[str, GenerateOptions]]) -> AsyncIterator[dict[str, Any]]:
    """What ``tests/chaos/streams.py`` tells on the server's host."""
    process = await asyncio.create_subprocess_exec(
        *(
            "ip",
            "netns",
            "exec",
            lan.host(host),
            sys.executable,
            "-m",
            "tests.chaos.streams",
            f"http://127.0.0.1:{PORT}",
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    asked = [{"prompt": prompt, **dataclasses.asdict(options)} for prompt, options in requests]
    for request in asked:
        request["stop"] = list(request["stop"])
    present(process.stdin).write(json.dumps(asked).encode())
    present(process.stdin).close()
    try:
        async for line in present(process.stdout):
            yield json.loads(line)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


class _Texts:
    """The texts of a round as they come."""

    def __init__(self, num: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(num)]
        self.times: list[list[float]] = [[] for _ in range(num)]
        self.ends: list[tuple[str, str]] = [("hangs", "")] * num

    async def take(self, told: AsyncIterator[dict[str, Any]]) -> None:
        async for line in told:
            number = line["stream"]
            self.times[number].append(line["at"])
            if "end" in line:
                self.ends[number] = line["end"], line.get("error", "")
            else:
                self.tokens[number] += line["token_ids"]

    def pause_s(self, number: int, since: float) -> float:
        times = [since, *(at for at in self.times[number] if at >= since)]
        return max((after - before for before, after in itertools.pairwise(times)), default=0.0)


async def play_round(lan: Lan, boards: Boards, num_nodes: int, rng: random.Random, undisturbed: Undisturbed) -> Round:
    """Strike one node while texts are written, and heal it behind them."""
    requests = [random_request(rng, undisturbed.prompts) for _ in range(NUM_STREAMS)]
    fault, node = rng.choice(sorted(FAULTS)), rng.randrange(num_nodes)
    strikes_after_s = rng.uniform(0.0, LATEST_STRIKE_S)
    strike, heal = FAULTS[fault]
    texts, again = _Texts(NUM_STREAMS), _Texts(1)
    expected = [undisturbed.tokens(*request) for request in requests]
    struck_at = 0.0
    began = time.monotonic()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(ROUND_S), asyncio.TaskGroup() as group:
            group.create_task(texts.take(stream(lan, num_nodes, requests)))
            await asyncio.sleep(strikes_after_s)
            struck_at = time.monotonic()
            await strike(boards, node)
            asked_at = time.monotonic()
            group.create_task(again.take(stream(lan, num_nodes, requests[:1])))
    await heal(boards, node)
    results = tuple(
        Text(texts.tokens[number] == expected[number], end, round(texts.pause_s(number, struck_at), 3), error)
        for number, (end, error) in enumerate(texts.ends)
    )
    again_s = again.times[0][0] - asked_at if again.times[0] else ROUND_S
    return Round(fault, node, num_nodes, round(struck_at - began, 3), results, round(again_s, 3))


def summary(rounds: Sequence[Round], seed: int) -> dict[str, Any]:
    """The figures of a run: how many texts were the undisturbed ones, and how long texts stood still, by fault."""
    texts = [text for round_ in rounds for text in round_.texts]
    by_fault = {}
    for fault in sorted({round_.fault for round_ in rounds}):
        pauses = [text.pause_s for round_ in rounds if round_.fault == fault for text in round_.texts]
        again = [round_.again_s for round_ in rounds if round_.fault == fault]
        by_fault[fault] = {
            "rounds": sum(round_.fault == fault for round_ in rounds),
            "pause_p50_s": statistics.median(pauses),
            "pause_p99_s": quantile(pauses, 0.99),
            "again_p50_s": statistics.median(again),
            "again_p99_s": quantile(again, 0.99),
        }
    return {
        "seed": seed,
        "rounds": len(rounds),
        "texts": len(texts),
        "equal": sum(text.is_equal for text in texts),
        "errors": sorted({text.error for text in texts if text.error}),
        "by_fault": by_fault,
    }


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]
