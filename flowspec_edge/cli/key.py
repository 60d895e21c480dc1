"""``flowspec key``: shows, makes and takes over the keys of this machine."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from dataclasses import dataclass

from flowspec_edge.cli.access import DEFAULT_CLUSTER, join_line
from flowspec_edge.cli.api_access import print_code
from flowspec_edge.cli.options import Commands, set_command
from flowspec_edge.core.cluster.key_text import format_key, parse_key
from flowspec_edge.errors import ClusterKeyError
from flowspec_edge.net.auth import derive_credentials, key_path, load_key, replace_key
from flowspec_edge.tasks import interruptible

DESCRIPTION = """\
One cluster key makes one cluster: nodes that hold it find each other, and nobody else can join them, read what they \
send
or put anything in. The first `flowspec node` makes it. Clients of `flowspec serve` have keys of their own: flowspec \
key api.

examples:
  flowspec key show                    the key, and the line to run on the other boards
  flowspec key set fsk1-...            join: keep another board's key (- reads it from standard input)
  flowspec key new                     a new cluster; the key before is kept in a file beside it
  flowspec key api add phone           a key for one client of flowspec serve
"""
API_DESCRIPTION = """\
Beyond this machine `flowspec serve` answers only who sends a key. Each client may have one of its own, under a name. A
key is shown when it is made; what is kept of it, in a file of mode 0600, does not tell it. A server that runs heeds
new keys and revoked ones at once.

examples:
  flowspec key api add phone           make a key (--qr: as a code to scan, too)
  flowspec key api add phone fsa1-...  keep a key that another server has made (- reads it from standard input)
  flowspec key api list                which there are
  flowspec key api revoke phone        refuse it from now on
"""


@dataclass(frozen=True, kw_only=True)
class KeyCommand:
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ShowKeyCommand(KeyCommand):
    qr: bool = False


@dataclass(frozen=True, kw_only=True)
class SetKeyCommand(KeyCommand):
    key: str | None = None


@dataclass(frozen=True, kw_only=True)
class AddApiKeyCommand(SetKeyCommand):
    name: str
    qr: bool = False


@dataclass(frozen=True, kw_only=True)
class RevokeApiKeyCommand(KeyCommand):
    name: str


def add_key(commands: Commands) -> None:
    parser = commands.add_parser(
        "key",
        help="show, make or take over the key that makes boards one cluster; keys of the HTTP API's clients",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print the cluster key, and the line for other boards")
    new = actions.add_parser("new", help="make another cluster key")
    taken = actions.add_parser("set", help="keep the cluster key of another board")
    taken.add_argument("key", nargs="?", metavar="KEY", help="without it, it is asked for; - reads standard input")
    for action in (show, new, taken):
        _add_json(action)
    for action in (show, new):
        action.add_argument("--qr", action="store_true", help="print the line as a QR code as well")
    set_command(show, ShowKeyCommand, show_key)
    set_command(new, ShowKeyCommand, make_new_key)
    set_command(taken, SetKeyCommand, take_key)
    api = actions.add_parser(
        "api",
        help="keys of the HTTP API's clients",
        description=API_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_api(api.add_subparsers(dest="api_action", required=True, metavar="ACTION"))


def _add_api(actions: Commands) -> None:
    add = actions.add_parser("add", help="make a key, or keep one that another server has made")
    add.add_argument("name", metavar="NAME", help="whose it is")
    add.add_argument("key", nargs="?", metavar="KEY", help="another server's (default: a new one; - reads it)")
    add.add_argument("--qr", action="store_true", help="print it as a QR code as well")
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("name", metavar="NAME", help="under which it is kept")
    listed = actions.add_parser("list", help="names of the keys, and when they were added")
    for action in (add, revoke, listed):
        _add_json(action)
    set_command(add, AddApiKeyCommand, add_client_key)
    set_command(revoke, RevokeApiKeyCommand, revoke_client_key)
    set_command(listed, KeyCommand, list_client_keys)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


# ------------------------------------------------------------------------ the cluster's


async def show_key(options: ShowKeyCommand) -> int:
    """Print this machine's key. Raises ClusterKeyError where there is none."""
    known = load_key()
    if known is None:
        raise ClusterKeyError(
            f"this machine has no such key ({key_path()}); make the first with flowspec key new, "
            "or copy the one of another board with flowspec key set"
        )
    _print_key(known, is_json=options.json, with_code=options.qr)
    return 0


async def make_new_key(options: ShowKeyCommand) -> int:
    """Replace the key by a new one. Raises StateError where its file cannot be used."""
    secret, kept = replace_key()
    _print_key(secret, is_json=options.json, with_code=options.qr)
    if kept is not None and not options.json:
        _print_kept(kept)
    return 0


async def take_key(options: SetKeyCommand) -> int:
    """Replace the key by one of another board.

    Raises:
        KeyTextError: it is mistyped.
        StateError: its file cannot be used.
    """
    secret, kept = replace_key(parse_key(_given_key(options.key)))
    if options.json:
        _print_key(secret, is_json=True)
        return 0
    print(f"key {derive_credentials(secret).fingerprint} is kept in {key_path()}")
    if kept is not None:
        _print_kept(kept)
    return 0


def _print_key(secret: bytes, *, is_json: bool, with_code: bool = False) -> None:
    key = format_key(secret)
    join = join_line(key, DEFAULT_CLUSTER)
    if is_json:
        fingerprint = derive_credentials(secret).fingerprint
        print(json.dumps({"key": key, "fingerprint": fingerprint, "file": str(key_path()), "join": join}))
        return
    print(f"{key}\n\nOn every other board, run:\n\n    {join}\n")
    if with_code:
        print_code(join)


def _print_kept(kept: object) -> None:
    print(f"the key before is kept in {kept}; nodes that run keep theirs until they are started again")


def _given_key(argument: str | None) -> str:
    """From the command line, a prompt that does not show it, or standard input."""
    if argument is not None and argument != "-":
        return argument
    with interruptible():
        if argument is None and sys.stdin.isatty():
            return getpass.getpass("key: ")
        return sys.stdin.readline()


# ------------------------------------------------------------------------- of clients


async def add_client_key(options: AddApiKeyCommand) -> int:
    """Keep a key under a name, and print it where it is new.

    Raises:
        RequestError: the name is none, or is taken.
        KeyTextError: the key is mistyped.
        StateError: the file cannot be used.
    """
    from flowspec_edge.net.api_keys import add_api_key, api_keys_path

    given = None if options.key is None else _given_key(options.key)
    key = add_api_key(options.name, given)
    if options.json:
        print(json.dumps({"name": options.name, "key": key, "file": str(api_keys_path())}))
    elif given is not None:
        print(f"the key of {options.name} is kept in {api_keys_path()}")
    else:
        print(f"{key}\n\nIt is shown this once. The client sends it as `Authorization: Bearer`, or as its API key.")
        if options.qr:
            print_code(key)
    return 0


async def revoke_client_key(options: RevokeApiKeyCommand) -> int:
    """Forget a key. Raises ClusterKeyError where there is none of that name."""
    from flowspec_edge.net.api_keys import revoke_api_key

    revoke_api_key(options.name)
    print(
        json.dumps({"revoked": options.name}) if options.json else f"the key of {options.name} is refused from now on"
    )
    return 0


async def list_client_keys(options: KeyCommand) -> int:
    """Print which keys there are. Raises StateError where their file cannot be used."""
    from flowspec_edge.net.api_keys import load_api_keys

    keys = load_api_keys()
    if options.json:
        print(json.dumps({"keys": [{"name": key.name, "added": key.added} for key in keys]}))
    elif not keys:
        print("there are no API keys; flowspec key api add NAME makes one")
    else:
        width = max(len(key.name) for key in keys)
        for key in keys:
            print(f"{key.name:{width}}  added {key.added}")
    return 0
