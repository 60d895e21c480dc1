"""What several streams get of one real ring: tokens/s of all together, the share of the least, and how long each waits.

    python -m benchmarks.serving                               1, 2, 4, 8 and 16 streams on four emulated Jetsons
    python -m benchmarks.serving --streams 1,2 --testbed pi5x4-3b-int4 --json

One process per board, real sockets and forwards, each held to the testbed's time (``flowspec bench --emulate`` says
more). Each stream asks for the same texts as all others, one after the other, and begins with another one. A run ends
when the first stream has all of its texts, so that all streams are there at any time. Each text is checked against the
unsplit model's. ``late`` is how much longer computing took than the testbed says: beyond 5 % the figures are not valid.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from flowspec_edge.bench.compare import Bench, check_text
from flowspec_edge.bench.emulate import Emulation, emulated_boards
from flowspec_edge.bench.report import format_table
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.sessions import HEADER, cells_of, row_of
from flowspec_edge.bench.side_by_side import AskedText, ClientText, SharedTime
from flowspec_edge.bench.testbed import load_testbed
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.origin.ring import Ring

STREAMS = "1,2,4,8,16"
NUM_TOKENS = 48


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
        text = ClientText(asked_s=time.monotonic())
        written.append(text)
        async with contextlib.aclosing(ring.generate(one.tape.prompt, one.options)) as pieces:
            async for piece in pieces:
                text.tokens += piece.token_ids
                text.token_times_s += [time.monotonic()] * len(piece.token_ids)
                check_text(text.tokens, one.tape.continuation[: len(text.tokens)], "a stream")


async def compare(boards: Emulation, asked: Sequence[AskedText], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each number of streams, each on a new ring."""
    rows: list[dict[str, Any]] = []
    for number in numbers:
        async with boards.ring() as (ring, engine):
            shared = await serve(ring, asked, number)
            late = (await boards.told_lateness(engine)).share
        rows.append({**row_of(shared, rows[0] if rows else None), "late": late})
    return rows


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
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments))
    if arguments.json:
        print(json.dumps(rows))
    else:
        print(format_table([*HEADER, "late"], [[*cells_of(row), f"{row['late']:.1%}"] for row in rows]))


if __name__ == "__main__":
    main()
