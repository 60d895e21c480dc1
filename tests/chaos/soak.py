"""``python -m tests.chaos.soak``: three clients ask without a pause while a board is lost every minute, for long.

Each text must be the undisturbed one, and no process may grow. Boards are cut off and frozen, and the last one is
killed; so most processes live as long as the soak does. Each is looked at when all boards have been back for a while,
and compared with itself in the same state. Needs root, for hosts of their own (network namespaces).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.cluster.key_text import CLUSTER_PREFIX, format_key
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from tests.chaos.growth import Sample, Watched, growth
from tests.chaos.models import MODELS, make_bundle
from tests.chaos.streams import as_asked
from tests.held_out import held_out_prompts
from tests.lan import Lan, ip, lan_of, why_not
from tests.narrowing import present

NUM_NODES = 4
NUM_CLIENTS = 3
NUM_REQUESTS = 12
NUM_TOKENS = {"demo": 160, "135m": 40}
"""Of each text."""
PORT = 8008
LOSS_EVERY_S = 60.0
KEPT_MIB = 8
"""Memory of all nodes for sessions that are kept: filled at once, so that it does not grow between losses."""
AWAY_S = 10.0
"""How long a board is away."""
SETTLED_S = 20.0
"""How long after its return all of them have their layers again: those of a 135 M model take some seconds to load."""
SAMPLE_EVERY_S = 5.0
START_S = 120.0
WARM_UP_SHARE = 0.2
"""Of the soak: what comes before is not judged. In half an hour each fault has been met twice by then."""

Request = tuple[str, GenerateOptions]


def requests_of(bundle: Bundle, num_tokens: int, rng: random.Random) -> tuple[list[Request], list[list[int]]]:
    """What clients ask for, and what the model answers in one process."""
    tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
    model = UnsplitModel(bundle.directory, bundle.manifest)
    prompts = rng.sample(held_out_prompts(), NUM_REQUESTS)
    requests = []
    for number, prompt in enumerate(prompts):
        options = GenerateOptions(max_new_tokens=num_tokens, temperature=(0.0, 0.8)[number % 2], seed=number, top_p=0.9)
        requests.append((tokenizer.decode(prompt), options))
    return requests, [list(model.generate(tokenizer.encode(text), options)) for text, options in requests]


class Soak:
    """Boards, a server and its clients on a LAN, and what was seen of them."""

    def __init__(self, lan: Lan, folder: Path, bundle: Bundle, key: bytes) -> None:
        self.lan, self.folder, self.bundle = lan, folder, bundle
        self.faults: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.longest_pause_s = 0.0
        self._key = format_key(key, CLUSTER_PREFIX) + "\n"
        self._boards: dict[int, Process] = {}
        self._watched: list[Watched] = []
        self._samples: dict[int, list[Sample]] = {}
        self._began = time.monotonic()
        self._is_settled = False

    async def start(self, host: int, name: str, *command: str, ready: bytes) -> Process:
        """``flowspec`` on a host, which is watched, once it has said so."""
        home = self.folder / f"host-{host}"
        home.mkdir(mode=0o700, exist_ok=True)
        (home / "cluster.key").touch(mode=0o600)
        (home / "cluster.key").write_text(self._key)
        counts = self.folder / f"counts-{len(self._watched)}"
        process = await self._run(host, "tests.chaos.counted", str(counts), *command, home=home)
        async with asyncio.timeout(START_S):
            line = await present(process.stdout).readline()
        assert ready in line, f"{name} does not start: see what it wrote above"
        self._watched.append(Watched(name, process.pid, counts))
        return process

    async def start_board(self, number: int) -> None:
        options = ("--name", f"pi-{number}", "--threads", "1", "--json")
        self._boards[number] = await self.start(number, f"pi-{number}", "node", *options, ready=b'"node"')

    async def start_server(self) -> None:
        options = ("--no-layers", "--equal-split", "--port", str(PORT), "--bundle", str(self.bundle.directory))
        kept = ("--keep-sessions", str(KEPT_MIB))
        await self.start(NUM_NODES, "server", "serve", *options, *kept, ready=b"model")

    async def _run(self, host: int, module: str, *arguments: str, home: Path | None = None) -> Process:
        where = ("ip", "netns", "exec", self.lan.host(host))
        process = await asyncio.create_subprocess_exec(
            *(*where, sys.executable, "-m", module, *arguments),
            stdin=PIPE,
            stdout=PIPE,
            stderr=DEVNULL if home is None else None,
            env={**os.environ, **({} if home is None else {"FLOWSPEC_HOME": str(home)})},
        )
        self.lan.processes.append(process)
        return process

    async def read_texts(self, requests: Sequence[Request], expected: Sequence[Sequence[int]]) -> None:
        """Compare every text that the clients get with the one that it should be."""
        clients = await self._run(NUM_NODES, "tests.chaos.clients", f"http://127.0.0.1:{PORT}", str(NUM_CLIENTS))
        asked = [as_asked(prompt, options) for prompt, options in requests]
        present(clients.stdin).write(json.dumps(asked).encode() + b"\n")
        async for line in present(clients.stdout):
            told = json.loads(line)
            is_equal = told["token_ids"] == expected[told["request"]]
            end = "equal" if is_equal else f"not equal, {told['end']}" if not told["error"] else told["error"]
            self.ends[end] += 1
            self.longest_pause_s = max(self.longest_pause_s, told["pause_s"])
        raise AssertionError("the clients have ended")

    async def lose_boards(self, rng: random.Random) -> None:
        """Lose one board after another, each for AWAY_S."""
        kinds = ("cable out", "frozen", "killed")
        self._is_settled = True
        for number in range(10**6):
            await asyncio.sleep(LOSS_EVERY_S - AWAY_S - SETTLED_S)
            self._is_settled = False
            kind = kinds[number % len(kinds)]
            self.faults[kind] += 1
            board = NUM_NODES - 1 if kind == "killed" else rng.randrange(NUM_NODES - 1)
            async with self._lost(kind, board):
                await asyncio.sleep(AWAY_S)
            await asyncio.sleep(SETTLED_S)
            self._is_settled = True

    @contextlib.asynccontextmanager
    async def _lost(self, kind: str, number: int) -> AsyncIterator[None]:
        board, port = self._boards[number], ("link", "set", f"port{number}")
        match kind:
            case "cable out":
                ip(*port, "down", inside=self.lan.switch)
                try:
                    yield
                finally:
                    ip(*port, "up", inside=self.lan.switch)
            case "frozen":
                board.send_signal(signal.SIGSTOP)
                try:
                    yield
                finally:
                    board.send_signal(signal.SIGCONT)
            case "killed":
                board.kill()
                await board.wait()
                self.lan.processes.remove(board)
                yield
                await self.start_board(number)

    async def look(self, until: float) -> None:
        """Take samples of all processes whenever all boards have been there for a while."""
        while time.monotonic() < until:
            await asyncio.sleep(SAMPLE_EVERY_S)
            if self._is_settled:
                for watched in list(self._watched):
                    if (sample := await watched.sample(self._began)) is not None:
                        self._samples.setdefault(watched.pid, []).append(sample)
                    else:
                        self._watched.remove(watched)

    def figures(self, warm_up_s: float) -> dict[str, Any]:
        """The texts, and of each process that still lives what it took."""
        judged = {
            watched.name: growth([sample for sample in self._samples[watched.pid] if sample.at_s >= warm_up_s])
            for watched in self._watched
            if watched.pid in self._samples
        }
        return {
            "texts": self.ends.total(),
            "equal": self.ends["equal"],
            "ends": dict(self.ends),
            "longest_pause_s": self.longest_pause_s,
            "faults": dict(self.faults),
            "processes": judged,
            "grown": [
                f"{name} ({state}): {', '.join(figures['grown'])}"
                for name, found in judged.items()
                for state, figures in found.items()
                if figures["grown"]
            ],
        }

    def samples(self) -> dict[str, list[dict[str, Any]]]:
        """All samples, by process."""
        names = {watched.pid: watched.name for watched in self._watched}
        return {
            f"{names.get(pid, 'ended')} {pid}": [dataclasses.asdict(sample) for sample in samples]
            for pid, samples in self._samples.items()
        }


async def soak(minutes: float, model: str, seed: int) -> Soak:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        bundle = await asyncio.to_thread(make_bundle, model, Path(folder))
        requests, expected = await asyncio.to_thread(requests_of, bundle, NUM_TOKENS[model], rng)
        async with lan_of(NUM_NODES + 1) as lan:
            taken = Soak(lan, Path(folder), bundle, secrets.token_bytes(20))
            await asyncio.gather(*map(taken.start_board, range(NUM_NODES)))
            await taken.start_server()
            reading = asyncio.create_task(taken.read_texts(requests, expected))
            losing = asyncio.create_task(taken.lose_boards(rng))
            looking = asyncio.create_task(taken.look(time.monotonic() + 60 * minutes))
            done, _ = await asyncio.wait({reading, losing, looking}, return_when=asyncio.FIRST_COMPLETED)
            for task in (reading, losing):
                task.cancel()
            await asyncio.wait({reading, losing})
            for task in done:
                task.result()
    return taken


def line_of(figures: dict[str, Any]) -> str:
    """The row of docs/reliability.md."""
    memory = [
        f"{name} {process['pss_mb'][0]:.0f} to {process['pss_mb'][1]:.0f} ({state})"
        for name, found in figures["processes"].items()
        for state, process in found.items()
    ]
    return (
        f"| {figures['model']} | {figures['minutes']:g} | {sum(figures['faults'].values())} | "
        f"{figures['equal']} of {figures['texts']} | {', '.join(memory)} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)g")
    parser.add_argument("--model", choices=MODELS, default="demo", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="write all samples there, as JSON")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    options = parser.parse_args()
    if reason := why_not():
        print(f"soak: {reason}", file=sys.stderr)
        return 1
    taken = asyncio.run(soak(options.minutes, options.model, options.seed))
    figures = {"model": options.model, "minutes": options.minutes, "seed": options.seed}
    figures |= taken.figures(WARM_UP_SHARE * 60 * options.minutes)
    if options.samples is not None:
        options.samples.write_text(json.dumps(taken.samples()))
    print(json.dumps(figures) if options.json else line_of(figures))
    return 1 if figures["grown"] or figures["equal"] < figures["texts"] else 0


if __name__ == "__main__":
    sys.exit(main())
