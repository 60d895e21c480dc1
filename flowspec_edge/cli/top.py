"""``flowspec top``: what a ``flowspec serve`` does now, live: its stages, its boards and its texts."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass

from flowspec_edge.cli.options import Commands, set_command
from flowspec_edge.cli.server_options import ServerArguments, add_server, client_from
from flowspec_edge.cli.show_top import Snapshot, print_plain, screen
from flowspec_edge.errors import FlowspecError, RequestError

DESCRIPTION = """\
What a `flowspec serve` does now: whether it can write texts, how busy each stage of its ring is, how hot the boards
are, and how many texts are written and wait. Ctrl-C ends it. Without a terminal it is printed once.
"""


@dataclass(frozen=True, kw_only=True)
class TopCommand(ServerArguments):
    every: float
    json: bool


def add_top(commands: Commands) -> None:
    top = commands.add_parser("top", help="what a flowspec serve does now, live", description=DESCRIPTION)
    add_server(top)
    top.add_argument(
        "--every", type=float, default=1.0, metavar="S", help="seconds between looks (default: %(default)s)"
    )
    top.add_argument("--json", action="store_true", help="print what the server tells of itself as one JSON object")
    set_command(top, TopCommand, _top)


async def _top(options: TopCommand) -> int:
    if not 0.1 <= options.every <= 3600:
        raise RequestError(f"--every is {options.every}; it must lie between 0.1 and 3600 seconds")
    async with await client_from(options, timeout=5.0) as client:
        if options.json:
            print(json.dumps((await client.health()).details))
            return 0
        if not sys.stdout.isatty():
            first = Snapshot.of(await client.health())
            await asyncio.sleep(options.every)  # a share needs two looks
            print_plain(Snapshot.of(await client.health(), first), client.url)
            return 0
        with screen() as show:
            latest: Snapshot | None = None
            while True:
                try:
                    latest = Snapshot.of(await client.health(), latest)
                    show(latest, client.url)
                except FlowspecError as error:
                    if latest is None:
                        raise
                    show(latest, f"{client.url}: {error}")
                await asyncio.sleep(options.every)
