"""Options that several commands share: how each is written on the command line, its type, and what is made of it.

Options come in groups. ``add_GROUP`` declares a group's options to a parser, and ``GROUPArguments`` has a field for
each of them. A command's own dataclass is made of the groups that it takes; :func:`set_command` fills it.

Whatever loads ONNX Runtime or opens sockets is imported where it is used, so that ``flowspec --help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from flowspec_edge.cli.access import DEFAULT_CLUSTER, NO_KEY_HINT, Access, neighbourhood, open_access
from flowspec_edge.cli.show_search import SearchDisplay
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.errors import NodeUnavailableError, RequestError
from flowspec_edge.files import cache_directory
from flowspec_edge.net.addresses import NODE_PORT
from flowspec_edge.version import __version__
from flowspec_edge.weights.cache import WeightCache

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from flowspec_edge.bundle import Bundle
    from flowspec_edge.config import GenerateOptions
    from flowspec_edge.net.directory import Directory
    from flowspec_edge.net.discovery import Announcement
    from flowspec_edge.net.neighbourhood import Neighbourhood

SEARCH_S, LOCAL_SEARCH_S = 5.0, 2.5
"""How long to look for nodes on a network, and on this machine alone, where no query is lost. All of a LAN answer
within 1.5 s of the last start (zeroconf 0.154).
"""
SETTLE_S = 1.5
"""How long to go on looking after the first node, where it is not said how many there are."""
GIB = 2**30

BUNDLE_HELP = "model bundle, or a GGUF file, of which one is made once (default: the demo model)"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What a command adds its parser to; argparse gives it no public name."""
Running = Coroutine[Any, Any, int]
"""A command that runs; its result is the exit status."""

_Arguments = TypeVar("_Arguments", bound="DataclassInstance")


def set_command(parser: argparse.ArgumentParser, kind: type[_Arguments], run: Callable[[_Arguments], Running]) -> None:
    """Have ``run`` perform the command of this parser. ``kind`` has a field for each option that the command reads."""
    parser.set_defaults(run=lambda parsed: run(_with_bundle(arguments_of(kind, parsed))))


def arguments_of(kind: type[_Arguments], parsed: argparse.Namespace) -> _Arguments:
    """What was parsed, as a ``kind``; an option without a field there is left out."""
    values = vars(parsed)
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def _with_bundle(options: _Arguments) -> _Arguments:
    """The options with a bundle where they name a GGUF file. It is made before anything else runs in this process.

    Raises:
        BundleError: no bundle can be made of it.
    """
    if not isinstance(options, BundleArguments) or options.bundle is None or not options.bundle.is_file():
        return options
    from flowspec_edge.cli.conversion import bundle_of

    return dataclasses.replace(options, bundle=bundle_of(options.bundle))


def check_port(port: int) -> int:
    """The value of ``--port``. Raises RequestError where it is none; the system takes any number, modulo 65536."""
    if not 0 <= port < 2**16:
        raise RequestError(f"--port is {port}; it must lie between 0 (any free one) and {2**16 - 1}")
    return port


# ----------------------------------------------------------------------------- bundle


@dataclass(frozen=True, kw_only=True)
class BundleArguments:
    bundle: Path | None


def add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, metavar="DIR", help=BUNDLE_HELP)


def bundle_from(options: BundleArguments) -> Bundle:
    """Raises BundleError where there is none, or it is broken."""
    from flowspec_edge.bundle import DEMO_BUNDLE, Bundle

    return Bundle.load(options.bundle or DEMO_BUNDLE)


# ------------------------------------------------------------------------------ cache


@dataclass(frozen=True, kw_only=True)
class CacheArguments:
    cache: Path | None
    cache_limit: float | None
    no_cache: bool


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where fetched weights are kept (default: ~/.cache/flowspec/weights)",
    )
    parser.add_argument(
        "--cache-limit",
        type=float,
        metavar="GIB",
        help="largest size of that; the longest unused goes first (default: a tenth of the disk stays free)",
    )
    parser.add_argument("--no-cache", action="store_true", help="fetch nothing: serve layers of --bundle only")


def cache_from(options: CacheArguments) -> WeightCache | None:
    """Raises RequestError where the limit is out of range."""
    if options.no_cache:
        return None
    return WeightCache(options.cache or cache_directory(), limit_bytes(options.cache_limit, "--cache-limit"))


def limit_bytes(gib: float | None, option: str) -> int | None:
    """The value of ``option`` in bytes.

    Raises:
        RequestError: it is out of range.
    """
    if gib is None:
        return None
    if not 0 <= gib <= 2**20:
        raise RequestError(f"{option} is {gib}; it must be a number of GiB, 0 or more")
    return int(gib * GIB)


# ---------------------------------------------------------------------------- network


@dataclass(frozen=True, kw_only=True)
class NetworkArguments:
    cluster: str
    peer: list[str]
    host: str | None
    insecure: bool


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


def access_from(options: NetworkArguments, *, makes_key: bool = False) -> Access:
    """Raises what :func:`open_access` does."""
    return open_access(options.host, is_insecure=options.insecure, makes_key=makes_key)


def neighbourhood_from(options: NetworkArguments, access: Access) -> Neighbourhood:
    """Raises what :func:`neighbourhood` does."""
    return neighbourhood(options.cluster, options.peer, access)


@dataclass(frozen=True, kw_only=True)
class SearchArguments(NetworkArguments):
    """Of commands that look for nodes; their parsers take the options of the network too."""

    nodes: int | None
    wait: float | None


def add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, metavar="N", help="go on as soon as N nodes are found")
    parser.add_argument(
        "--wait",
        type=float,
        metavar="S",
        help=f"look this long for the first node (default: {SEARCH_S}, on this machine alone {LOCAL_SEARCH_S})",
    )


async def search(
    options: SearchArguments,
    access: Access,
    directory: Directory | None = None,
    display: SearchDisplay | None = None,
) -> list[Announcement]:
    """The nodes of the cluster, as a directory that is open knows them, or one that is opened for this search. The
    ``display`` shows who was found so far, and is cleared in the end.

    Raises:
        NodeUnavailableError: there is none, or fewer than asked for.
    """
    from flowspec_edge.net.directory import find_peers, search_peers
    from flowspec_edge.node.resources import unique_name

    usual_s = LOCAL_SEARCH_S if access.is_loopback and options.nodes is None else SEARCH_S
    how: dict[str, Any] = {
        "num_nodes": options.nodes,
        "timeout_s": usual_s if options.wait is None else options.wait,
        "settle_s": SETTLE_S,
        "on_found": (display or SearchDisplay(is_quiet=True)).show,
    }
    try:
        if directory is not None:
            return await search_peers(directory, **how)
        where = neighbourhood_from(options, access)
        return await find_peers(where, node=unique_name(), version=__version__, **how)
    except NodeUnavailableError as cause:
        if options.host is None and access.is_loopback:
            raise NodeUnavailableError(f"{cause}; {NO_KEY_HINT}") from cause
        raise
    finally:
        if display is not None:
            display.clear()


# ------------------------------------------------------------------------- generation


@dataclass(frozen=True, kw_only=True)
class GenerationArguments:
    schedule: str
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: list[str]


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


def generate_options_from(options: GenerationArguments) -> GenerateOptions:
    """Raises RequestError where a number is out of range."""
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
