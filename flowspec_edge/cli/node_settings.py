"""The node that a command runs itself: it serves layers, or only takes in what returns from its own rings."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowspec_edge.cli.access import Access, check_name
from flowspec_edge.cli.options import (
    BundleArguments,
    CacheArguments,
    NetworkArguments,
    SearchArguments,
    add_bundle,
    add_cache_options,
    bundle_from,
    cache_from,
    neighbourhood_from,
)
from flowspec_edge.core.device.boards import BoardSettings
from flowspec_edge.core.device.caps import NO_CAPS, TEMPERATURE_BOUNDS_C, WATTS_BOUNDS, Caps
from flowspec_edge.errors import RequestError
from flowspec_edge.net.addresses import NODE_PORT
from flowspec_edge.node.board import cores_of, find_profile, read_facts, thermometer_of

if TYPE_CHECKING:
    from flowspec_edge.node.resources import NodeSettings


@dataclass(frozen=True, kw_only=True)
class OriginArguments(SearchArguments, BundleArguments):
    """Of commands that ask others to serve a bundle, and serve nothing themselves."""


def origin_settings(options: OriginArguments, access: Access) -> NodeSettings:
    """Settings of a node that nobody finds: it only takes in what returns from its own rings."""
    from flowspec_edge.node.resources import NodeSettings, available_memory_bytes, unique_name
    from flowspec_edge.node.sensors import power_of

    where, num_threads = neighbourhood_from(options, access), len(os.sched_getaffinity(0))
    return NodeSettings(
        name=unique_name(),
        cluster=options.cluster,
        host=access.host,
        credentials=access.credentials,
        is_insecure=access.is_insecure,
        peers=where.peers,
        remembers=where.remembers,
        bundles=(bundle_from(options),),
        memory_bytes=available_memory_bytes(),
        num_threads=num_threads,
        is_announced=False,
        power=power_of(find_profile(None, read_facts())),
        cores=cores_of(num_threads),
    )


@dataclass(frozen=True, kw_only=True)
class ServingArguments(NetworkArguments, BundleArguments, CacheArguments):
    """Of commands that serve layers; their parsers take the options of the network too."""

    name: str | None
    threads: int | None
    memory: int | None
    board: str | None
    precision: str | None
    kv_cache: str
    max_watts: float | None
    max_temperature: float | None


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
        help="run layers in this precision, one of those that the bundle has (default: the one that flowspec bench "
        "--calibrate --use-fastest chose here, else the bundle's own)",
    )
    parser.add_argument(
        "--kv-cache",
        choices=("float32", "float16"),
        default="float32",
        help="how keys and values are kept (default: float32); in float16 contexts take half the memory, texts may be "
        "others, and are the same on nodes that all do so",
    )
    parser.add_argument(
        "--max-watts",
        type=float,
        metavar="W",
        help="keep this board under so many watts, in the mean of half a minute, by rests between its layers; needs a "
        "board that tells what it takes (default: the board profile's, else no cap)",
    )
    parser.add_argument(
        "--max-temperature",
        type=float,
        metavar="C",
        help="keep this board under so many degrees Celsius, likewise; plans take it for as slow as it then is "
        "(default: the board profile's, else no cap)",
    )
    add_cache_options(parser)


def caps_from(options: ServingArguments, board: BoardSettings, *, serves_layers: bool = True) -> Caps:
    """What the user typed comes before what the profile says.

    Raises:
        RequestError: it is out of range, or there is nothing that could rest for it.
    """
    typed = (
        ("--max-watts", options.max_watts, WATTS_BOUNDS, "watts"),
        ("--max-temperature", options.max_temperature, TEMPERATURE_BOUNDS_C, "degrees Celsius"),
    )
    for option, value, (low, high), unit in typed:
        if value is not None and not low <= value <= high:
            raise RequestError(f"{option} is {value:g}; it must be a number of {unit} from {low:g} to {high:g}")
        if value is not None and not serves_layers:
            raise RequestError(f"{option} has layers rest, and --no-layers serves none; leave out either of them")
    if not serves_layers:
        return NO_CAPS
    known = NO_CAPS if board.profile is None else board.profile.caps
    return Caps(
        known.max_watts if options.max_watts is None else options.max_watts,
        known.max_temperature_c if options.max_temperature is None else options.max_temperature,
    )


def serving_settings(
    options: ServingArguments, access: Access, board: BoardSettings, *, port: int = 0, is_announced: bool = True
) -> NodeSettings:
    """Settings of a node on ``board``; one that is not announced serves no layers, and fetches none.

    Raises:
        RequestError, BoardError: an option is out of range; the board is to be kept under what it does not show.
    """
    from flowspec_edge.node.resources import NodeSettings, unique_name
    from flowspec_edge.node.sensor_watch import check_caps
    from flowspec_edge.node.sensors import power_of

    caps = caps_from(options, board, serves_layers=is_announced)
    power, thermometer = power_of(board.profile), thermometer_of(board)
    check_caps(caps, power, thermometer)
    where = neighbourhood_from(options, access)
    if options.name is not None:
        check_name("--name", options.name)
    return NodeSettings(
        name=options.name or unique_name(),
        cluster=options.cluster,
        host=access.host,
        credentials=access.credentials,
        is_insecure=access.is_insecure,
        port=port,
        preferred_port=0 if access.is_loopback or not is_announced else NODE_PORT,
        peers=where.peers,
        remembers=where.remembers,
        bundles=(bundle_from(options),),
        memory_bytes=board.memory_bytes,
        num_threads=board.num_threads,
        is_announced=is_announced,
        cache=cache_from(options) if is_announced else None,
        precision=options.precision,
        has_half_cache=options.kv_cache == "float16",
        thermometer=thermometer,
        power=power,
        caps=caps,
        cores=cores_of(board.num_threads),
    )


def settle_process() -> None:
    """Prepare this process for weeks of serving, before its threads begin: few heaps, and all descriptors it may
    have.
    """
    from flowspec_edge.allocator import use_few_arenas
    from flowspec_edge.net.door import raise_descriptor_limit

    use_few_arenas()
    raise_descriptor_limit()
