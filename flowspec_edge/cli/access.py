"""Which network a command works on, and with which key; and the commands that keep the keys."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowspec_edge.core.cluster.address import parse_address
from flowspec_edge.core.cluster.key_text import API_PREFIX, CLUSTER_PREFIX, format_key, parse_key
from flowspec_edge.errors import ClusterKeyError, RequestError
from flowspec_edge.files import write_private
from flowspec_edge.net.addresses import EVERY_INTERFACE, LOOPBACK, NODE_PORT, is_loopback
from flowspec_edge.net.auth import Credentials, derive_credentials, key_path, load_key, make_key, replace_key

if TYPE_CHECKING:
    from flowspec_edge.net.neighbourhood import Neighbourhood

DEFAULT_CLUSTER = "flowspec"
INSECURE_WARNING = (
    "--insecure: no key and no encryption. Everyone on this network can use this node, read what it is asked and what it "
    "answers, and put layers of their own into the ring. `flowspec key new` does away with that."
)
PLAIN_HTTP_WARNING = (
    "--plain-http: whoever listens on this network can read the API key, the prompts and the answers. "
    "Without it, clients check this server by the API key."
)

NO_KEY_HINT = "other boards are out of reach without their cluster key: flowspec key show there, flowspec key set here"

KEY_HELP = """\
One cluster key makes one cluster: nodes that hold it find each other, and nobody else can join them, read what they send
or put anything in. The first `flowspec node` makes it. With --api: the key that clients of the HTTP API send.

examples:
  flowspec key show                    the key, and the line to run on the other boards
  flowspec key set fsk1-...            join: keep another board's key (- reads it from standard input)
  flowspec key new                     a new cluster; the key before is kept in a file beside it
  flowspec key show --api              the key for clients of flowspec serve --api-host 0.0.0.0
"""


@dataclass(frozen=True, slots=True)
class Access:
    """Where to listen and look, and what protects it; without credentials nothing does. ``new_key`` was made just now."""

    host: str
    credentials: Credentials | None = None
    is_insecure: bool = False
    new_key: str | None = None

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def fingerprint(self) -> str:
        return self.credentials.fingerprint if self.credentials else ""


def open_access(host: str | None, *, is_insecure: bool, makes_key: bool = False) -> Access:
    """With a key, every interface; without one, this machine only. ``host`` and ``is_insecure`` are the user's choice.

    Raises:
        ClusterKeyError: a ``host`` beyond this machine, and no key.
        StateError: the key's file cannot be used.
    """
    if is_insecure:
        print(f"flowspec: {INSECURE_WARNING}", file=sys.stderr)
        return Access(host or LOOPBACK, is_insecure=True)
    if host is not None and is_loopback(host):
        return Access(host)
    secret, is_new = make_key() if makes_key else (load_key(), False)
    if secret is None:
        if host is None:
            return Access(LOOPBACK)
        raise ClusterKeyError(
            f"--host {host} is open to the network, and this machine has no cluster key ({key_path()}); copy the one of "
            "another board with flowspec key set, or make the first with flowspec key new (--insecure does without)"
        )
    return Access(host or EVERY_INTERFACE, derive_credentials(secret), new_key=format_key(secret) if is_new else None)


def neighbourhood(options: argparse.Namespace, access: Access) -> Neighbourhood:
    """Where a command looks for nodes: ``--cluster``, ``--peer`` and, on a network, the peers of earlier runs.

    Raises:
        RequestError: a ``--peer`` is no address.
        ClusterKeyError: it is one beyond this machine, and nothing would protect what is said to it.
    """
    from flowspec_edge.net.neighbourhood import Neighbourhood

    peers = []
    for text in options.peer:
        address = parse_address(text, NODE_PORT)
        if address is None:
            raise RequestError(f"--peer {text!r:.80} is no address; give HOST or HOST:PORT, as in --peer 192.168.1.20")
        if access.is_loopback and not address.is_loopback:
            raise ClusterKeyError(
                f"--peer {text} is beyond this machine, which is all that is used without a cluster key or with --host "
                f"{access.host}; copy the key of that board: flowspec key show there, flowspec key set here"
            )
        peers.append(address)
    return Neighbourhood(
        cluster=options.cluster,
        host=access.host,
        credentials=access.credentials,
        peers=tuple(peers),
        remembers=not access.is_loopback,
    )


def join_line(key: str, cluster: str) -> str:
    """What to run on another board."""
    label = "" if cluster == DEFAULT_CLUSTER else f" --cluster {cluster}"
    return f"flowspec key set {key} && flowspec node{label}"


def welcome_text(key: str, cluster: str) -> str:
    """What the first start says, once."""
    return (
        f"This cluster has a new key. On every other board, run:\n\n    {join_line(key, cluster)}\n\n"
        f"Whoever has the key is in; it is kept in {key_path()}, and `flowspec key show` prints it again.\n"
    )


@dataclass(frozen=True, slots=True)
class ApiAccess:
    """How the HTTP API is protected: not at all on this machine, elsewhere by a key of its own."""

    host: str
    key: str | None = None
    credentials: Credentials | None = None
    is_new: bool = False

    @property
    def scheme(self) -> str:
        return "https" if self.credentials else "http"


def open_api_access(host: str, *, is_insecure: bool, is_plain: bool) -> ApiAccess:
    """Raises StateError where the API key's file cannot be used."""
    if is_insecure or is_loopback(host):
        return ApiAccess(host)
    secret, is_new = make_key(API_PREFIX)
    key = format_key(secret, API_PREFIX)
    if is_plain:
        print(f"flowspec: {PLAIN_HTTP_WARNING}", file=sys.stderr)
        return ApiAccess(host, key, is_new=is_new)
    credentials = derive_credentials(secret, API_PREFIX)
    write_private(key_path(API_PREFIX).with_suffix(".pem"), credentials.certificate.decode())
    return ApiAccess(host, key, credentials, is_new)


def api_text(access: ApiAccess) -> str:
    """What the first start beyond this machine says, once."""
    certificate = key_path(API_PREFIX).with_suffix(".pem")
    check = "" if access.credentials is None else f"; other clients check the server by {certificate} (name: flowspec)"
    return f"API key: {access.key}\nClients send it as `Authorization: Bearer`{check}. `flowspec key show --api` prints it again.\n"


def add_key(commands: Any) -> None:
    """``flowspec key``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "key",
        help="show, make or take over the key that makes boards one cluster",
        description=KEY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("show", "new", "set"), help="what to do")
    parser.add_argument("key", nargs="?", metavar="KEY", help="for set: the key; without it, it is asked for")
    parser.add_argument("--api", action="store_true", help="the key of the HTTP API, not that of the cluster")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_key)


async def run_key(options: argparse.Namespace) -> int:
    """Raises ClusterKeyError where there is none to show, KeyTextError where what was given is none."""
    prefix = API_PREFIX if options.api else CLUSTER_PREFIX
    kept = None
    if options.action == "show":
        known = load_key(prefix)
        if known is None:
            raise ClusterKeyError(
                f"this machine has no such key ({key_path(prefix)}); make the first with flowspec key new, "
                "or copy the one of another board with flowspec key set"
            )
        secret = known
    else:
        secret, kept = replace_key(
            parse_key(_given_key(options.key), prefix) if options.action == "set" else None, prefix
        )
    key = format_key(secret, prefix)
    fingerprint = derive_credentials(secret, prefix).fingerprint
    if options.json:
        report = {"key": key, "fingerprint": fingerprint, "file": str(key_path(prefix))}
        print(json.dumps(report if options.api else {**report, "join": join_line(key, DEFAULT_CLUSTER)}))
        return 0
    if options.action == "set":
        print(f"key {fingerprint} is kept in {key_path(prefix)}")
    else:
        print(key if options.api else f"{key}\n\nOn every other board, run:\n\n    {join_line(key, DEFAULT_CLUSTER)}\n")
    if kept is not None:
        print(f"the key before is kept in {kept}; nodes that run keep theirs until they are started again")
    return 0


def _given_key(argument: str | None) -> str:
    """From the command line, a prompt that does not show it, or standard input."""
    if argument is not None and argument != "-":
        return argument
    if argument is None and sys.stdin.isatty():
        return getpass.getpass("key: ")
    return sys.stdin.readline()
