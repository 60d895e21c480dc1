"""``flowspec node``: serve layers to whoever finds this node."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from typing import Any

from flowspec_edge.cli.access import welcome_text
from flowspec_edge.cli.options import (
    access_from,
    add_network,
    add_serving,
    settings_from,
)
from flowspec_edge.node.board import board_report, describe_board, use_board
from flowspec_edge.tasks import until_interrupted


def add_node(commands: Any) -> None:
    node: argparse.ArgumentParser = commands.add_parser("node", help="serve layers to whoever finds this node")
    add_serving(node)
    add_network(node)
    node.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    node.add_argument("--json", action="store_true", help="print the node's name and address as one JSON object")
    node.add_argument("--until-stdin-closes", action="store_true", help="end when standard input does; for scripts")
    node.add_argument(
        "--emulate",
        metavar="TESTBED",
        help="compute and send at the pace of a testbed's board, and print as JSON, at the end of each session, the seconds "
        "that its computing should have taken and those that it took longer (see flowspec bench --emulate)",
    )
    node.set_defaults(run=_node)


async def _node(options: argparse.Namespace) -> int:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.cli.show_peers import PeerDisplay
    from flowspec_edge.node.node import Node
    from flowspec_edge.node.pacing import Board

    board = Board()
    if options.emulate is not None:
        from flowspec_edge.bench.emulated_board import EmulatedBoard, Lateness
        from flowspec_edge.bench.testbed import load_testbed

        def tell_lateness(lateness: Lateness) -> None:
            print(json.dumps([lateness.asked_s, lateness.late_s]), flush=True)

        board = EmulatedBoard(load_testbed(options.emulate), tell_lateness)
    access = access_from(options, makes_key=True)
    if access.new_key is not None:
        print(
            welcome_text(access.new_key, options.cluster), file=sys.stderr if options.json else sys.stdout, flush=True
        )
    profile, facts = use_board(
        options.board,
        num_threads=options.threads,
        memory_mib=options.memory,
        keeps_all_cores=options.emulate is not None,
    )
    settings = settings_from(options, access, is_announced=True, board=profile)
    display = PeerDisplay(settings.neighbourhood, is_quiet=options.json)
    node = await Node.start(settings, board, display.show)
    display.port = node.port
    node.on_fetch = FetchDisplay().show_own
    try:
        if options.json:
            report = {"node": node.settings.name, "host": node.settings.host, "port": node.port}
            print(json.dumps({**report, **board_report(profile)}), flush=True)
        else:
            memory = node.settings.memory_bytes / 2**20
            print(
                f"node {node.settings.name} serves on {node.settings.host}:{node.port}, cluster {options.cluster}, "
                f"{memory:.0f} MiB for layers. Ctrl-C ends it.",
                describe_board(profile, facts),
                sep="\n",
                flush=True,
            )
        if options.until_stdin_closes:
            await asyncio.get_running_loop().connect_read_pipe(_UntilEnd, sys.stdin)
            await _UntilEnd.ended.wait()
        else:
            await until_interrupted()
    finally:
        await node.close()
    return 0


class _UntilEnd(asyncio.Protocol):
    ended = asyncio.Event()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()
