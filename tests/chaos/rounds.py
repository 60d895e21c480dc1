"""Rounds of chaos: three texts are written over a ring of real processes on hosts of their own, and one node is struck.

Each text must be the undisturbed one, token for token. The seed decides everything but the machine's own timing.
"""

import asyncio
import contextlib
import dataclasses
import math
import random
import re
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
from tests.chaos.asking import Request, Text, TextClient, Texts
from tests.chaos.faults import FAULTS, Boards
from tests.held_out import held_out_prompts
from tests.lan import Lan, lan_of
from tests.narrowing import present

PORT = 8008
NUM_STREAMS = 3
NUM_TOKENS = 160
AGAIN_TOKENS = 32
"""Of the fourth text, of which the beginning is looked at."""
NUM_REQUESTS = 40
"""Of so many requests each round draws some."""
ROUND_S = 120
"""A bound on one round: a text that is not complete by then hangs."""
LATEST_STRIKE_S = 1.5
ASKED_AFTER_S = 0.1
"""How long after a fault began the fourth text is asked for, where the fault itself takes longer."""
SHORT_MIB = 80
"""Memory of a node that has room for half of the model's layers (74 MiB), not for all (87)."""
SETTLED_S = 8.0
"""How long to wait behind a round for all nodes to serve again."""
_NOTICES = ("the ring was lost", "is lost", "of its packets")
"""What the origin's log says when it notices a loss."""


@dataclass(frozen=True, slots=True)
class Round:
    """One fault and its texts.

    ``seen_s`` is the time from the fault to the origin's first notice of a loss, None where it noticed none. ``again``
    is a text that was asked for right after the fault, and ``again_s`` the time to its first piece. ``back_s`` is how
    long after the fault was healed all nodes served again, None where that took longer than SETTLED_S.
    """

    fault: str
    node: int
    num_nodes: int
    is_memory_short: bool
    struck_at_s: float
    seen_s: float | None
    texts: tuple[Text, ...]
    again: Text
    again_s: float
    back_s: float | None


class Undisturbed:
    """The requests that rounds draw from, and what the model writes to each in one process."""

    def __init__(self, rng: random.Random) -> None:
        bundle = Bundle.load(DEMO_BUNDLE)
        self._tokenizer = Tokenizer(DEMO_BUNDLE / bundle.manifest.tokenizer.file)
        self._model = UnsplitModel(DEMO_BUNDLE, bundle.manifest)
        self._known: dict[Request, list[int]] = {}
        prompts = [self._tokenizer.decode(prompt) for prompt in held_out_prompts()]
        self.requests = [_random_request(rng, prompts) for _ in range(NUM_REQUESTS)]

    def tokens(self, request: Request) -> list[int]:
        """Computed once, which takes as long as a ring takes for all texts of a round."""
        if request not in self._known:
            prompt, options = request
            self._known[request] = list(self._model.generate(self._tokenizer.encode(prompt), options))
        return self._known[request]


def _random_request(rng: random.Random, prompts: Sequence[str]) -> Request:
    options = GenerateOptions(
        max_new_tokens=NUM_TOKENS,
        temperature=rng.choice((0.0, 0.8)),
        seed=rng.choice((0, 7)),
        top_p=rng.choice((1.0, 0.9)),
    )
    return rng.choice(prompts), options


class Cluster:
    """Nodes on hosts 0, 1, ..., and on the host behind them a server, of which the log is read, and a ``client``.

    ``notices`` are the times at which the server told of a loss.
    """

    def __init__(self, lan: Lan, boards: Boards, num_nodes: int) -> None:
        self.lan, self.boards, self.num_nodes = lan, boards, num_nodes
        self.client = TextClient(lan.host(num_nodes), f"http://127.0.0.1:{PORT}")
        self.notices: list[float] = []
        self.serving = list(range(num_nodes))  # before there is a ring: any of them
        self._told = asyncio.Event()

    async def listen(self, log: asyncio.StreamReader) -> None:
        async for told in log:  # or the server would stand still once the pipe is full
            line = told.decode()
            if any(notice in line for notice in _NOTICES):
                self.notices.append(time.monotonic())
            if (ring := re.search("ring is open: (.*)", line)) is not None:
                self.serving = [int(number) for number in re.findall(r"pi-(\d+)", ring[1])]
            self._told.set()

    def first_notice(self, since: float) -> float | None:
        return next((at for at in self.notices if at >= since), None)

    async def all_serve(self) -> bool:
        """Until all nodes serve; False where some still do not after SETTLED_S, as nodes that come and go too often."""
        try:
            async with asyncio.timeout(SETTLED_S):
                while len(self.serving) < self.num_nodes:
                    self._told.clear()
                    await self._told.wait()
        except TimeoutError:
            return False
        return True


@contextlib.asynccontextmanager
async def cluster_of(
    num_nodes: int, folder: Path, key: bytes, *, is_memory_short: bool = False
) -> AsyncIterator[Cluster]:
    """Nodes that all serve layers, with memory for half of them where it is short, a server without layers, and a
    client.
    """
    states = [folder / f"host-{number}" for number in range(num_nodes + 1)]
    for state in states:
        state.mkdir(mode=0o700, exist_ok=True)
        (state / "cluster.key").touch(mode=0o600)
        (state / "cluster.key").write_text(format_key(key, CLUSTER_PREFIX) + "\n")
    async with lan_of(num_nodes + 1) as lan:
        boards = Boards(lan, states, SHORT_MIB if is_memory_short else None)
        cluster = Cluster(lan, boards, num_nodes)
        await asyncio.gather(*(boards.start(number) for number in range(num_nodes)))
        env = {"FLOWSPEC_HOME": str(states[num_nodes])}
        server = await lan.start(
            num_nodes, "--verbose", "serve", "--no-layers", "--equal-split", "--port", str(PORT), env=env
        )
        line = await present(server.stdout).readline()
        assert b"model" in line, line + await present(server.stderr).read()
        listening = asyncio.create_task(cluster.listen(present(server.stderr)))
        await cluster.client.start()
        try:
            yield cluster
        finally:
            await cluster.client.close()
            listening.cancel()


async def play_round(
    cluster: Cluster,
    rng: random.Random,
    undisturbed: Undisturbed,
    fault: str | None = None,
    turn: contextlib.AbstractAsyncContextManager[object] | None = None,
) -> Round:
    """Strike one node while texts are written, and heal it behind them; by a random fault, unless it is named.

    All this happens within ``turn``; then its nodes come back, while others may have theirs.
    """
    async with turn or contextlib.nullcontext():
        struck = await _strike(cluster, rng, undisturbed, fault)
    healed_at = time.monotonic()
    back_s = round(time.monotonic() - healed_at, 3) if await cluster.all_serve() else None
    return dataclasses.replace(struck, back_s=back_s if struck.seen_s is not None else None)


async def _strike(cluster: Cluster, rng: random.Random, undisturbed: Undisturbed, fault: str | None) -> Round:
    """The round, but for the time that nodes take to come back."""
    requests = rng.sample(undisturbed.requests, NUM_STREAMS)
    fault, node = fault or rng.choice(sorted(FAULTS)), rng.choice(cluster.serving)
    strikes_after_s = rng.uniform(0.0, LATEST_STRIKE_S)
    expected = [undisturbed.tokens(request) for request in requests]
    struck_at = math.inf
    prompt, options = requests[0]
    texts, again = Texts(requests), Texts([(prompt, dataclasses.replace(options, max_new_tokens=AGAIN_TOKENS))])
    try:
        async with asyncio.timeout(ROUND_S), asyncio.TaskGroup() as group:
            group.create_task(cluster.client.ask(texts))
            await asyncio.sleep(strikes_after_s)
            striking = group.create_task(FAULTS[fault].strike(cluster.boards, node, rng))
            struck_at = time.monotonic()
            await asyncio.wait({striking}, timeout=ASKED_AFTER_S)
            group.create_task(cluster.client.ask(again))
    except TimeoutError:  # texts that hang are not to be waited for in the next round
        await cluster.client.close()
        await cluster.client.start()
    await FAULTS[fault].heal(cluster.boards, node, rng)
    seen_at = cluster.first_notice(struck_at)
    (again_text,) = again.results([expected[0][:AGAIN_TOKENS]], struck_at, seen_at)
    return Round(
        fault=fault,
        node=node,
        num_nodes=cluster.num_nodes,
        is_memory_short=cluster.boards.memory_mib is not None,
        struck_at_s=round(struck_at - texts.asked_at, 3),
        seen_s=round(seen_at - struck_at, 3) if seen_at is not None else None,
        texts=texts.results(expected, struck_at, seen_at),
        again=again_text,
        back_s=None,
        again_s=round(again.times[0][0] - again.asked_at if again.times[0] else ROUND_S, 3),
    )


def summary(rounds: Sequence[Round], seed: int) -> dict[str, Any]:
    """The figures of a run: how many texts were the undisturbed ones, and how long texts stood still, by fault."""
    texts = [text for round_ in rounds for text in round_.texts]
    asked_again = [round_.again for round_ in rounds]
    return {
        "seed": seed,
        "rounds": len(rounds),
        "texts": len(texts),
        "equal": sum(text.is_equal for text in texts),
        "asked_again": len(asked_again),
        "asked_again_equal": sum(text.is_equal for text in asked_again),
        "errors": sorted({text.error for text in [*texts, *asked_again] if text.error}),
        "by_fault": {
            fault: _times([round_ for round_ in rounds if round_.fault == fault])
            for fault in sorted({round_.fault for round_ in rounds})
        },
        "all_faults": _times(rounds),
    }


def _times(rounds: Sequence[Round]) -> dict[str, Any]:
    """Of these rounds, p50 and p99 in seconds of each time that there was."""
    times: dict[str, list[float | None]] = {
        "seen": [round_.seen_s for round_ in rounds],
        "flowing": [text.flowing_s for round_ in rounds for text in round_.texts],
        "pause": [text.pause_s for round_ in rounds for text in round_.texts],
        "again": [round_.again_s for round_ in rounds],
        "back": [round_.back_s for round_ in rounds],
    }
    known = {name: sorted(value for value in values if value is not None) for name, values in times.items()}
    quantiles = {
        name: [quantile(values, share) for share in (0.5, 0.99)] if values else None for name, values in known.items()
    }
    return {"rounds": len(rounds), "noticed": len(known["seen"]), **quantiles}


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values."""
    return values[min(int(len(values) * share), len(values) - 1)]


def as_markdown(figures: dict[str, Any]) -> str:
    """The figures by fault as a table, times as p50 / p99 in seconds."""

    def row(name: str, times: dict[str, Any]) -> str:
        cells = [" / ".join(f"{value:.2f}" for value in times[key] or ()) or "-" for key in _COLUMNS]
        return f"| {name} | {times['rounds']} | {times['noticed']} | {' | '.join(cells)} |"

    lines = [
        f"| a node was | rounds | noticed | {', s | '.join(_COLUMNS.values())}, s |",
        "|---" * (3 + len(_COLUMNS)) + "|",
        *(row(fault, times) for fault, times in figures["by_fault"].items()),
        row("all together", figures["all_faults"]),
    ]
    return "\n".join(lines)


_COLUMNS = {"seen": "seen after", "flowing": "flowing again", "pause": "pause", "again": "again", "back": "back"}
