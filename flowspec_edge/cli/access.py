"""Which network a command works on, and which key protects what it says there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowspec_edge.core.cluster.address import parse_address
from flowspec_edge.core.cluster.key_text import format_key
from flowspec_edge.errors import ClusterKeyError, RequestError, is_plain
from flowspec_edge.net.addresses import EVERY_INTERFACE, LOOPBACK, NODE_PORT, is_loopback
from flowspec_edge.net.auth import Credentials, derive_credentials, key_path, load_key, make_key

if TYPE_CHECKING:
    from flowspec_edge.net.neighbourhood import Neighbourhood

DEFAULT_CLUSTER = "flowspec"
MAX_NAME_BYTES = 200
"""Of a node's name or a cluster's label: mDNS carries each in 255 bytes (RFC 6763, 6.1), of which some say what it is.
"""
INSECURE_WARNING = (
    "--insecure: no key and no encryption. Everyone on this network can use this node, read what it is asked and what "
    "it answers, and put layers of their own into the ring. `flowspec key new` does away with that."
)
NO_KEY_HINT = "other boards are out of reach without their cluster key: flowspec key show there, flowspec key set here"


@dataclass(frozen=True, slots=True)
class Access:
    """The address to listen on, and the credentials that protect what is said there; without them nothing does.

    ``new_key`` is the cluster key where it was made just now.
    """

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
    """Every interface where this machine has a cluster key, and this machine alone where it has none.

    ``host`` and ``is_insecure`` are what the user chose instead. With ``makes_key`` a first key is made where one is
    needed.

    Raises:
        ClusterKeyError: ``host`` is beyond this machine, and there is no key.
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
            f"--host {host} is open to the network, and this machine has no cluster key ({key_path()}); copy the one "
            "of another board with flowspec key set, or make the first with flowspec key new (--insecure does without)"
        )
    return Access(host or EVERY_INTERFACE, derive_credentials(secret), new_key=format_key(secret) if is_new else None)


def check_name(option: str, name: str) -> None:
    """Raise RequestError where a name cannot be announced; peers take none with control characters."""
    if not is_plain(name) or not 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES:
        raise RequestError(
            f"{option} {name!r:.80} is no name; give 1 to {MAX_NAME_BYTES} bytes without control characters"
        )


def neighbourhood(cluster: str, typed: Sequence[str], access: Access) -> Neighbourhood:
    """Where to look for the nodes of a cluster: at the addresses that the user ``typed`` and, on a network, at those of
    peers of earlier runs.

    Raises:
        RequestError: a typed address is none.
        ClusterKeyError: it is beyond this machine, and no key would protect what is said to it.
    """
    from flowspec_edge.net.neighbourhood import Neighbourhood

    check_name("--cluster", cluster)
    peers = []
    for text in typed:
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
        cluster=cluster,
        host=access.host,
        credentials=access.credentials,
        peers=tuple(peers),
        remembers=not access.is_loopback,
    )


def join_line(key: str, cluster: str) -> str:
    """What to run on another board."""
    return f"flowspec key set {key} && flowspec node{_label(cluster)}"


def open_join_line(cluster: str) -> str:
    """The same where neither key nor encryption is wanted."""
    return f"flowspec node --insecure --host {EVERY_INTERFACE}{_label(cluster)}"


def _label(cluster: str) -> str:
    return "" if cluster == DEFAULT_CLUSTER else f" --cluster {cluster}"


def joining_text(access: Access, cluster: str, *, shows_key: bool) -> str:
    """How other boards join, for the start of a node. A new key is shown in any case, since nobody knows it yet."""
    if access.credentials is not None:
        secret = load_key() if shows_key or access.new_key is not None else None
        if secret is None:
            return "other boards join by the line that `flowspec key show` prints here"
        head, line = ", which `flowspec key show` prints again", join_line(format_key(secret), cluster)
    elif access.is_insecure and not access.is_loopback:
        head, line = "", open_join_line(cluster)
    else:
        return "for this machine alone; other boards can join where --host is left out"
    return f"every other board joins with this line{head}:\n    {line}"
