"""``flowspec node``: serve layers to whoever finds this node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flowspec_edge.cli.access import Access, joining_text
from flowspec_edge.cli.node_settings import ServingArguments, add_serving, serving_settings, settle_process
from flowspec_edge.cli.options import (
    Commands,
    access_from,
    add_network,
    check_port,
    set_command,
)
from flowspec_edge.cli.service_manager import ServiceManager
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.net.addresses import addresses_to_announce
from flowspec_edge.node.board import board_report, describe_board, use_board
from flowspec_edge.tasks import until_interrupted

if TYPE_CHECKING:
    from flowspec_edge.core.device.boards import BoardFacts, BoardSettings
    from flowspec_edge.node.node import Node
    from flowspec_edge.node.pacing import Board


@dataclass(frozen=True, kw_only=True)
class NodeCommand(ServingArguments):
    port: int
    json: bool
    until_stdin_closes: bool
    emulate: str | None


def add_node(commands: Commands) -> None:
    node = commands.add_parser("node", help="serve layers to whoever finds this node")
    add_serving(node)
    add_network(node)
    node.add_argument("--port", type=int, default=0, help="port to listen on (default: any free one)")
    node.add_argument("--json", action="store_true", help="print the node's name and address as one JSON object")
    node.add_argument("--until-stdin-closes", action="store_true", help="end when standard input does; for scripts")
    node.add_argument(
        "--emulate",
        metavar="TESTBED",
        help="compute and send at the pace of a testbed's board, and print as JSON, at the end of each session, the "
        "seconds that its computing should have taken and those that it took longer (see flowspec bench --emulate)",
    )
    set_command(node, NodeCommand, _node)


async def _node(options: NodeCommand) -> int:
    from flowspec_edge.cli.show_fetches import FetchDisplay
    from flowspec_edge.cli.show_peers import PeerDisplay
    from flowspec_edge.node.node import Node

    settle_process()
    board = _board_of(options)
    access = access_from(options, makes_key=True)
    profile, facts = use_board(
        options.board,
        num_threads=options.threads,
        memory_mib=options.memory,
        keeps_all_cores=options.emulate is not None,
    )
    sensed = profile if options.emulate is None else replace(profile, profile=None)  # an emulated board has no sensors
    settings = serving_settings(options, access, sensed, port=check_port(options.port))
    display = PeerDisplay(settings.neighbourhood, is_quiet=options.json)
    node = await Node.start(settings, board, display.show)
    display.port = node.port
    node.on_fetch = FetchDisplay().show_own
    try:
        async with ServiceManager().serving(f"{settings.name} serves on port {node.port}"):
            _print_start(node, access, profile, facts, is_json=options.json)
            if options.until_stdin_closes:
                await _until_stdin_closes()
            else:
                await until_interrupted()
    finally:
        await node.close()
    return 0


def _board_of(options: NodeCommand) -> Board:
    """This board, or one that pretends to be a testbed's and prints how late it was.

    Raises:
        TestbedError: there is no such testbed.
    """
    from flowspec_edge.node.pacing import Board

    if options.emulate is None:
        return Board()
    from flowspec_edge.bench.emulated_board import EmulatedBoard, Lateness
    from flowspec_edge.bench.testbed import load_testbed

    def print_lateness(lateness: Lateness) -> None:
        print(json.dumps([lateness.asked_s, lateness.late_s]), flush=True)

    return EmulatedBoard(load_testbed(options.emulate), print_lateness)


def _print_start(node: Node, access: Access, profile: BoardSettings, facts: BoardFacts, *, is_json: bool) -> None:
    """What the node is, what it offers, and how others join. A script is told of a new key on standard error."""
    settings = node.settings
    joining = joining_text(access, settings.cluster, shows_key=sys.stdout.isatty())
    if is_json:
        if access.new_key is not None:
            print(joining, file=sys.stderr, flush=True)
        report = {"node": settings.name, "host": settings.host, "port": node.port}
        print(json.dumps({**report, **board_report(profile)}), flush=True)
        return
    address = Address(addresses_to_announce(settings.host)[0], node.port)
    bundles = " and ".join(bundle.manifest.name for bundle in settings.bundles)
    print(
        f"node {settings.name} serves on {address}, cluster {settings.cluster}. Ctrl-C ends it.",
        describe_board(profile, facts),
        *([f"rests so that the board stays under {settings.caps}"] if settings.caps else []),
        f"offers layers of {f'{bundles} alone' if settings.cache is None else 'any model; it fetches what it lacks'}",
        joining,
        sep="\n",
        flush=True,
    )


async def _until_stdin_closes() -> None:
    """Wait for that, or for Ctrl-C or SIGTERM."""
    ended = asyncio.Event()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: _UntilEnd(ended), sys.stdin)
    with contextlib.suppress(asyncio.CancelledError):
        await ended.wait()
    transport.close()


class _UntilEnd(asyncio.Protocol):
    def __init__(self, ended: asyncio.Event) -> None:
        self._ended = ended

    def connection_lost(self, error: Exception | None) -> None:
        self._ended.set()
