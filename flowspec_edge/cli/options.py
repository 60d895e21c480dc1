"""Options that several commands share, and what they come to: a bundle, a node's settings, the nodes to use.

What needs ONNX Runtime is imported where it is used: ``flowspec --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from flowspec_edge.cli.access import DEFAULT_CLUSTER, NO_KEY_HINT, Access, neighbourhood, open_access
from flowspec_edge.cli.cache import add_cache_options, cache_from
from flowspec_edge.core.device.boards import BoardSettings
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.addresses import NODE_PORT
from flowspec_edge.node.board import thermometer_of
from flowspec_edge.version import __version__

SEARCH_S = 5.0
"""How long to look for nodes. All of a LAN answer within 1.5 s of the last start (zeroconf 0.154)."""
SETTLE_S = 1.5
"""How long to go on looking after the first node, where it is not said how many there are."""


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="model bundle (default: the demo model)")


def add_serving(parser: argparse.ArgumentParser) -> None:
    add_bundle(parser)
    parser.add_argument("--name", help="name that others see (default: host name and six random digits)")
    parser.add_argument("--threads", type=int, default=None, help="threads per stage (default: the board profile's)")
    parser.add_argument("--memory", type=int, metavar="MIB", help="memory to offer (default: the board profile's)")
    parser.add_argument(
        "--board",
        metavar="NAME",
        help="board profile to use, or a TOML file (default: recognised; see firmware_configs)",
    )
    parser.add_argument(
        "--precision",
        metavar="NAME",
        help="run layers in this precision, one of those that the bundle has (default: the one that flowspec bench --calibrate "
        "--use-fastest chose here, else the bundle's own)",
    )
    add_cache_options(parser)


def add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", default=DEFAULT_CLUSTER, help="only nodes of the same label find each other")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="HOST[:PORT]",
        help=f"a node to ask for the others, where mDNS does not reach (default port: {NODE_PORT}); repeatable",
    )
    parser.add_argument(
        "--host", help="address to listen on (default: all of this machine's with a cluster key, 127.0.0.1 without)"
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="do without key and encryption: everyone on the network of --host can use the node and read its traffic",
    )


def add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, metavar="N", help="go on as soon as N nodes are found")
    parser.add_argument(
        "--wait", type=float, default=SEARCH_S, metavar="S", help="look this long (default: %(default)s)"
    )


def add_generation(parser: argparse.ArgumentParser, *, temperature: float, seed: int) -> None:
    parser.add_argument("--schedule", default="flowspec", help=f"one of {', '.join(SCHEDULES)} (default: flowspec)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help="0 is greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest (default: all)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="sample within this mass (default: 1, all)"
    )
    parser.add_argument(
        "--seed", type=int, default=seed, help="same seed, same text, on any ring (default: %(default)s)"
    )
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")


def access_from(options: argparse.Namespace, *, makes_key: bool = False) -> Access:
    return open_access(options.host, is_insecure=options.insecure, makes_key=makes_key)


async def search(options: argparse.Namespace, access: Access, directory: Any = None) -> list[Any]:
    """The nodes of the cluster, from a directory that is open, or one of its own.

    Raises:
        NodeUnavailableError: there is none, or fewer than asked for.
    """
    from flowspec_edge.net.directory import find_peers, search_peers
    from flowspec_edge.node.resources import unique_name

    limits = {"num_nodes": options.nodes, "timeout_s": options.wait, "settle_s": SETTLE_S}
    try:
        if directory is not None:
            return await search_peers(directory, **limits)
        where = neighbourhood(options, access)
        return await find_peers(where, node=unique_name(), version=__version__, **limits)
    except NodeUnavailableError as cause:
        if options.host is None and access.is_loopback:
            raise NodeUnavailableError(f"{cause}; {NO_KEY_HINT}") from cause
        raise


def bundle_from(options: argparse.Namespace) -> Any:
    from flowspec_edge.bundle import DEMO_BUNDLE, Bundle

    return Bundle.load(options.bundle or DEMO_BUNDLE)


def settings_from(
    options: argparse.Namespace, access: Access, *, is_announced: bool, board: BoardSettings | None = None
) -> Any:
    from flowspec_edge.node.resources import NodeSettings, available_memory_bytes, unique_name

    where = neighbourhood(options, access)
    return NodeSettings(
        name=getattr(options, "name", None) or unique_name(),
        cluster=options.cluster,
        host=access.host,
        credentials=access.credentials,
        is_insecure=access.is_insecure,
        port=getattr(options, "port", 0),
        preferred_port=0 if access.is_loopback or not is_announced else NODE_PORT,
        peers=where.peers,
        remembers=where.remembers,
        bundles=(bundle_from(options),),
        memory_bytes=available_memory_bytes() if board is None else board.memory_bytes,
        num_threads=len(os.sched_getaffinity(0)) if board is None else board.num_threads,
        is_announced=is_announced,
        cache=cache_from(options) if is_announced else None,
        precision=getattr(options, "precision", None),
        thermometer=None if board is None else thermometer_of(board),
    )


def generate_options_from(options: argparse.Namespace) -> Any:
    from flowspec_edge.config import GenerateOptions

    return GenerateOptions(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        schedule=options.schedule,
        stop=tuple(options.stop),
    )
