"""How often a ring writes another text than the unsplit model, in each precision: it should be never.

    python -m benchmarks.ties                         the demo model: hours; what is done is kept, so stop when you like
    python -m benchmarks.ties --num-prompts 8         a glance
    python -m benchmarks.ties --bundle DIR --json     another bundle, in all its precisions

Each text is written one row at a time in one process, and by rings of several sizes over loopback, by the default
schedule with the bundle's own drafter. The last ring is lost in the middle of its text, and another one, with one node
less, goes on from what was written. Greedy texts show near ties; seeded ones show draws.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.precisions import OWN, PRECISIONS
from flowspec_edge.bench.prompts import load_prompts
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring

PROJECT = Path(__file__).resolve().parents[1]
SIZES = (1, 2, 4)
TEMPERATURES = (0.0, 0.8)
NUM_PROMPTS, NUM_TOKENS, PROMPT_TOKENS = 200, 128, 64
MEMORY_BYTES = 2**30
REPLAY = "replay"


@dataclass(frozen=True)
class Case:
    """One text: which prompt, at which temperature, in which precision. Its seed is the prompt's number."""

    precision: str
    temperature: float
    number: int

    def options(self, max_new_tokens: int) -> GenerateOptions:
        return GenerateOptions(max_new_tokens=max_new_tokens, temperature=self.temperature, seed=self.number)


class Findings:
    """The first token that differs in each text, by case and ring, kept in a file; None where none does."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self.found: dict[tuple[Case, str], int | None] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            *key, precision, temperature, number, ring, differs_at = json.loads(line)
            if key == [name]:
                self.found[Case(precision, temperature, number), ring] = differs_at

    def add(self, case: Case, ring: str, differs_at: int | None) -> None:
        self.found[case, ring] = differs_at
        with self._path.open("a") as file:
            line = self._name, case.precision, case.temperature, case.number, ring, differs_at
            file.write(json.dumps(line) + "\n")


def first_difference(found: Sequence[int], expected: Sequence[int]) -> int | None:
    if list(found) == list(expected):
        return None
    pairs = zip(found, expected, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(found), len(expected)))


def demo_bundle(precision: str, folder: Path) -> Path:
    """The demo model with its draft head, all of it in that precision; exported where that has not been done yet."""
    out = folder / f"demo-{precision}"
    if not (out / "manifest.json").exists():
        report(f"exporting the demo model in {precision} ...")
        model = PROJECT / "exporter/demo_model"
        command = [sys.executable, "-m", "exporter", str(model / "target"), "--drafter", str(model / "eagle")]
        command += ["--precision", precision, "--max-loss", "100", "--out", str(out), "--force"]
        subprocess.run(command, check=True, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


@contextlib.asynccontextmanager
async def ring_of(num_nodes: int, bundle: Bundle, precision: str) -> AsyncIterator[Ring]:
    """A ring over nodes in this process."""
    settings: dict[str, Any] = {"cluster": "ties", "bundles": (bundle,), "is_announced": False, "precision": precision}
    async with contextlib.AsyncExitStack() as closing:
        nodes = []
        for number in range(num_nodes + 1):
            memory_bytes = MEMORY_BYTES if number else 0
            node = await Node.start(NodeSettings(name=f"node-{number}", memory_bytes=memory_bytes, **settings))
            closing.push_async_callback(node.close)
            nodes.append(node)
        origin, *serving = nodes
        yield await closing.enter_async_context(open_ring(origin, bundle, [node.announcement for node in serving]))


async def write(ring: Ring, prompt: list[int], options: GenerateOptions, num_tokens: int) -> list[int]:
    """The first tokens of the ring's text, ``num_tokens`` at most, and left there."""
    tokens: list[int] = []
    async with contextlib.aclosing(ring.generate(prompt, options)) as answer:
        async for piece in answer:
            tokens += piece.token_ids
            if len(tokens) >= num_tokens:
                break
    return tokens[:num_tokens]


async def compare(
    bundle: Bundle, precision: str, cases: Sequence[Case], prompts: Sequence[list[int]], findings: Findings
) -> None:
    """Write what has not been written yet."""
    rings = [*map(str, SIZES), REPLAY]
    wanted = [case for case in cases if any((case, ring) not in findings.found for ring in rings)]
    if not wanted:
        return
    model = UnsplitModel(bundle.directory, bundle.manifest, precision=precision)
    async with contextlib.AsyncExitStack() as closing:
        opened = {size: await closing.enter_async_context(ring_of(size, bundle, precision)) for size in SIZES}
        for case in wanted:
            prompt, options = prompts[case.number], case.options(NUM_TOKENS)
            expected = await asyncio.to_thread(lambda: list(model.generate(prompt, options)))  # noqa: B023 - awaited here
            for size in SIZES:
                if (case, str(size)) not in findings.found:
                    found = await write(opened[size], prompt, options, NUM_TOKENS)
                    findings.add(case, str(size), first_difference(found, expected))
            if (case, REPLAY) not in findings.found:
                before = await write(opened[SIZES[-1]], prompt, options, len(expected) // 2)
                rest = case.options(NUM_TOKENS - len(before))
                after = await write(opened[SIZES[-2]], [*prompt, *before], rest, NUM_TOKENS)
                findings.add(case, REPLAY, first_difference([*before, *after], expected))
            report(f"{case}: {', '.join(f'{ring}: {findings.found[case, ring]}' for ring in rings)}")


def summarise(findings: Findings) -> list[dict[str, Any]]:
    """Texts that differ, by precision and temperature, of each ring."""
    rows = []
    groups = itertools.groupby(
        sorted(findings.found.items(), key=lambda item: (item[0][0].precision, item[0][0].temperature, item[0][1])),
        key=lambda item: (item[0][0].precision, item[0][0].temperature, item[0][1]),
    )
    for (precision, temperature, ring), group in groups:
        differs_at = [place for _, place in group]
        differing = sum(place is not None for place in differs_at)
        rows.append(
            {
                "precision": precision,
                "temperature": temperature,
                "nodes": ring,
                "texts": len(differs_at),
                "differ": differing,
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| precision | temperature | nodes | texts | differ |", "|---|---|---|---:|---:|"]
    lines += [
        f"| `{row['precision']}` | " + " | ".join(str(row[name]) for name in list(row)[1:]) + " |" for row in rows
    ]
    return "\n".join(lines)


def prompts_of(bundle: Bundle, num_prompts: int) -> list[list[int]]:
    """The first tokens of held-out texts; where there are too few texts, of their later parts too."""
    tokenizer = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file)
    texts = [tokenizer.encode(text) for texts in load_prompts().values() for text in texts]

    def parts() -> Iterator[list[int]]:
        for start in itertools.count(step=PROMPT_TOKENS):
            found = [text[start : start + PROMPT_TOKENS] for text in texts if len(text) > start]
            if not found:
                return
            yield from found

    prompts = list(itertools.islice(parts(), num_prompts))
    if len(prompts) < num_prompts:
        raise SystemExit(f"ties: there are {len(prompts)} prompts; ask for no more with --num-prompts")
    return prompts


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--precisions", nargs="+", help="those of the bundle, or all")
    parser.add_argument("--temperatures", nargs="+", type=float, default=TEMPERATURES)
    parser.add_argument("--bundle", type=Path, help="instead of the demo model")
    parser.add_argument("--folder", type=Path, default=PROJECT / "build/ties", help="where findings are kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    given = Bundle.load(options.bundle) if options.bundle else None
    names = options.precisions or (given.manifest.precisions if given else PRECISIONS.keys() - {OWN})
    rows: list[dict[str, Any]] = []
    for precision in sorted(names):
        bundle = given or Bundle.load(demo_bundle(precision, options.folder))
        findings = Findings(options.folder / "findings.jsonl", f"{bundle.digest[:16]} {precision}")
        prompts = prompts_of(bundle, options.num_prompts)
        numbers = itertools.product(options.temperatures, range(len(prompts)))
        cases = [Case(precision, temperature, number) for temperature, number in numbers]
        asyncio.run(compare(bundle, precision, cases, prompts, findings))
        rows += summarise(findings)
    print(json.dumps({"rows": rows}) if options.json else format_table(rows))


if __name__ == "__main__":
    main()
