"""``flowspec key``: shows, makes and takes over the keys of this machine."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from dataclasses import dataclass

from flowspec_edge.cli.access import DEFAULT_CLUSTER, join_line
from flowspec_edge.cli.options import Commands, set_command
from flowspec_edge.core.cluster.key_text import API_PREFIX, CLUSTER_PREFIX, format_key, parse_key
from flowspec_edge.errors import ClusterKeyError
from flowspec_edge.net.auth import derive_credentials, key_path, load_key, replace_key
from flowspec_edge.tasks import interruptible

DESCRIPTION = """\
One cluster key makes one cluster: nodes that hold it find each other, and nobody else can join them, read what they \
send
or put anything in. The first `flowspec node` makes it. With --api: the key that clients of the HTTP API send.

examples:
  flowspec key show                    the key, and the line to run on the other boards
  flowspec key set fsk1-...            join: keep another board's key (- reads it from standard input)
  flowspec key new                     a new cluster; the key before is kept in a file beside it
  flowspec key show --api              the key for clients of flowspec serve --api-host 0.0.0.0
"""


@dataclass(frozen=True, kw_only=True)
class KeyCommand:
    action: str
    key: str | None = None
    api: bool = False
    json: bool = False


def add_key(commands: Commands) -> None:
    parser = commands.add_parser(
        "key",
        help="show, make or take over the key that makes boards one cluster",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("show", "new", "set"), help="what to do")
    parser.add_argument("key", nargs="?", metavar="KEY", help="for set: the key; without it, it is asked for")
    parser.add_argument("--api", action="store_true", help="the key of the HTTP API, not that of the cluster")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    set_command(parser, KeyCommand, run_key)


async def run_key(options: KeyCommand) -> int:
    """Show this machine's key, or replace it and show the new one. Returns an exit status.

    Raises:
        ClusterKeyError: there is no key to show.
        KeyTextError: the key to set is mistyped.
        StateError: the key's file cannot be used.
    """
    prefix = API_PREFIX if options.api else CLUSTER_PREFIX
    if options.action == "show":
        secret, kept = _known_key(prefix), None
    else:
        given = parse_key(_given_key(options.key), prefix) if options.action == "set" else None
        secret, kept = replace_key(given, prefix)
    _print_key(secret, prefix, options)
    if kept is not None and not options.json:
        print(f"the key before is kept in {kept}; nodes that run keep theirs until they are started again")
    return 0


def _known_key(prefix: str) -> bytes:
    known = load_key(prefix)
    if known is None:
        raise ClusterKeyError(
            f"this machine has no such key ({key_path(prefix)}); make the first with flowspec key new, "
            "or copy the one of another board with flowspec key set"
        )
    return known


def _given_key(argument: str | None) -> str:
    """From the command line, a prompt that does not show it, or standard input."""
    if argument is not None and argument != "-":
        return argument
    with interruptible():
        if argument is None and sys.stdin.isatty():
            return getpass.getpass("key: ")
        return sys.stdin.readline()


def _print_key(secret: bytes, prefix: str, options: KeyCommand) -> None:
    """The key, or, where it was given by the user, its fingerprint only."""
    key, path = format_key(secret, prefix), key_path(prefix)
    if options.json:
        fingerprint = derive_credentials(secret, prefix).fingerprint
        report = {"key": key, "fingerprint": fingerprint, "file": str(path)}
        print(json.dumps(report if options.api else {**report, "join": join_line(key, DEFAULT_CLUSTER)}))
    elif options.action == "set":
        print(f"key {derive_credentials(secret, prefix).fingerprint} is kept in {path}")
    else:
        print(key if options.api else f"{key}\n\nOn every other board, run:\n\n    {join_line(key, DEFAULT_CLUSTER)}\n")
