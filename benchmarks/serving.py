"""What several streams get of one real ring: tokens/s of all together, the share of the least, and how long each waits.
And what the next turn of a dialogue waits for its first token, beside the turn before.

    python -m benchmarks.serving                               1, 2, 4, 8 and 16 streams on four emulated Jetsons
    python -m benchmarks.serving --streams 1,2 --testbed pi5x4-3b-int4 --json
    python -m benchmarks.serving --streams "" --history 1500   the next turn alone

One process per board, real sockets and forwards, each held to the testbed's time (``flowspec bench --emulate`` says
more). Each stream asks for the same texts as all others, one after the other, and begins with another one. A run ends
when the first stream has all of its texts, so that all streams are there at any time. Each text is checked against the
unsplit model's. ``late`` is how much longer computing took than the testbed says: beyond 5 % the figures are not valid.

The dialogue has a history of that many tokens, and the ring keeps the first turn's rows. ``ratio`` is the second turn's
time to its first token over the first one's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flowspec_edge.bench.compare import Bench, check_text
from flowspec_edge.bench.emulate import Emulation, emulated_boards
from flowspec_edge.bench.report import format_table
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.sessions import HEADER, cells_of, row_of
from flowspec_edge.bench.side_by_side import AskedText, ClientText, SharedTime
from flowspec_edge.bench.testbed import load_testbed
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.manifest import MANIFEST_NAME, SEAL_NAME
from flowspec_edge.origin.ring import Ring

STREAMS = "1,2,4,8,16"
NUM_TOKENS = 48
TURN_TOKENS = 16
"""Of what is said in the next turn, and of each answer."""
KEPT_BYTES = 2**30
TURN_HEADER = ["history", "of it cached", "first turn, s", "next turn, s", "ratio", "late"]


def record_texts(bundle: Bundle, request: Request) -> list[AskedText]:
    """What every stream asks for, and what it is to get."""
    bench = Bench(bundle)
    plan = request.plan(["flowspec"], NUM_TOKENS)
    return [
        AskedText(bench.record(task, options), options)
        for task in request.tasks(plan, num_quick=1)
        for options in [task.options(plan)]
    ]


async def serve(ring: Ring, asked: Sequence[AskedText], number: int) -> SharedTime:
    """So many streams at once, until one of them has all of its texts."""
    firsts = [stream * len(asked) // number for stream in range(number)]
    shared = SharedTime(0.0, [[] for _ in firsts])
    began_s = time.monotonic()
    streams = [
        asyncio.create_task(_stream(ring, [*asked[first:], *asked[:first]], texts))
        for first, texts in zip(firsts, shared.texts, strict=True)
    ]
    done, left = await asyncio.wait(streams, return_when=asyncio.FIRST_COMPLETED)
    shared.seconds = time.monotonic() - began_s
    for stream in left:
        stream.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    for stream in done:
        stream.result()
    return shared


async def _stream(ring: Ring, asked: Sequence[AskedText], written: list[ClientText]) -> None:
    for one in asked:
        written.append(ClientText(asked_s=time.monotonic()))
        await _write(ring, one.tape.prompt, one.options, one.tape.continuation, written[-1])


async def _write(
    ring: Ring, prompt: Sequence[int], options: GenerateOptions, expected: Sequence[int], text: ClientText
) -> int:
    """Have a text written, and note when which tokens came. Returns how many of the prompt's were known from before."""
    num_cached = 0
    async with contextlib.aclosing(ring.generate(prompt, options)) as pieces:
        async for piece in pieces:
            text.tokens += piece.token_ids
            text.token_times_s += [time.monotonic()] * len(piece.token_ids)
            check_text(text.tokens, expected[: len(text.tokens)], "a stream")
            if piece.statistics is not None:
                num_cached = piece.statistics["cached_tokens"]
    return num_cached


@contextlib.contextmanager
def long_context(bundle: Bundle, num_tokens: int) -> Iterator[Bundle]:
    """The same weights, with room for so many tokens: what they make of these is of no concern here."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(bundle.directory, folder, ignore=shutil.ignore_patterns(SEAL_NAME), dirs_exist_ok=True)
        found = json.loads((bundle.directory / MANIFEST_NAME).read_text())
        found["geometry"]["max_context"] = num_tokens
        (Path(folder) / MANIFEST_NAME).write_text(json.dumps(found))
        yield Bundle.load(Path(folder))


async def next_turn(ring: Ring, bundle: Bundle, history: Sequence[int]) -> dict[str, Any]:
    """Two turns of a dialogue with this history, on a ring that keeps sessions."""
    options = GenerateOptions(max_new_tokens=TURN_TOKENS)
    unsplit = await asyncio.to_thread(UnsplitModel, bundle.directory, bundle.manifest)
    prompt, waits_s, num_cached = list(history), [], 0
    for said in ((), history[:TURN_TOKENS]):
        prompt += said
        expected = await asyncio.to_thread(lambda: list(unsplit.generate(prompt, options)))  # noqa: B023
        text = ClientText(asked_s=time.monotonic())
        num_cached = await _write(ring, prompt, options, expected, text)
        waits_s.append(text.first_token_s)
        prompt += text.tokens
    return {
        "history": len(history),
        "cached": num_cached,
        "first_turn_s": waits_s[0],
        "next_turn_s": waits_s[1],
        "ratio": waits_s[1] / waits_s[0],
    }


async def compare(boards: Emulation, asked: Sequence[AskedText], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of streams, each on a new ring."""
    rows: list[dict[str, Any]] = []
    for number in numbers:
        async with boards.ring() as (ring, engine):
            shared = await serve(ring, asked, number)
            late = (await boards.told_lateness(engine)).share
        rows.append({**row_of(shared, rows[0] if rows else None), "late": late})
    return rows


def some_history(bundle: Bundle, num_tokens: int) -> list[int]:
    """This module, as often as it takes."""
    tokens = Tokenizer(bundle.directory / bundle.manifest.tokenizer.file).encode(Path(__file__).read_text())
    return (tokens * num_tokens)[:num_tokens]


async def measure_next_turn(arguments: argparse.Namespace) -> dict[str, Any]:
    demo = Bundle.load(DEMO_BUNDLE)
    history = some_history(demo, arguments.history)
    with long_context(demo, arguments.history + 4 * TURN_TOKENS) as bundle:
        async with (
            emulated_boards(load_testbed(arguments.testbed), arguments.testbed, bundle) as boards,
            boards.ring(KEPT_BYTES) as (ring, engine),
        ):
            row = await next_turn(ring, bundle, history)
            late = max([(await boards.told_lateness(engine)).share for _ in range(2)])  # of each turn
            return {**row, "late": late}


async def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    bundle = Bundle.load(DEMO_BUNDLE)
    request = Request(
        testbeds=arguments.testbed,
        schedules="flowspec",
        prompts=arguments.prompts,
        temperatures=str(arguments.temperature),
        num_prompts=arguments.num_prompts,
        max_new_tokens=arguments.max_new_tokens,
        sessions=arguments.streams,
    )
    numbers = request.session_numbers()
    asked = await asyncio.to_thread(record_texts, bundle, request)
    async with emulated_boards(load_testbed(arguments.testbed), arguments.testbed, bundle) as boards:
        return await compare(boards, asked, numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default=STREAMS, metavar="N[,N]", help="default: %(default)s; 1 is always there")
    parser.add_argument("--testbed", default="jetson4-7b-fp16-1gbit", metavar="NAME", help="default: %(default)s")
    parser.add_argument(
        "--prompts", default="quick", metavar="SET[,SET]", help="one of each set (default: %(default)s)"
    )
    parser.add_argument("--num-prompts", type=int, metavar="N", help="or the first N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=NUM_TOKENS, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument(
        "--history", type=int, default=1500, metavar="N", help="tokens before the next turn (default: %(default)s)"
    )
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments)) if arguments.streams else []
    turn = asyncio.run(measure_next_turn(arguments)) if arguments.history else None
    if arguments.json:
        print(json.dumps({"streams": rows, "next_turn": turn}))
        return
    if rows:
        print(format_table([*HEADER, "late"], [[*cells_of(row), f"{row['late']:.1%}"] for row in rows]))
    if turn is not None:
        cells = [f"{turn['history']}", f"{turn['cached']}", f"{turn['first_turn_s']:.2f}", f"{turn['next_turn_s']:.2f}"]
        print(format_table(TURN_HEADER, [[*cells, f"{turn['ratio']:.3f}", f"{turn['late']:.1%}"]]))


if __name__ == "__main__":
    main()
