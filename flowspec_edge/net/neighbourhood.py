"""Where a node looks for its peers, and the peers of earlier runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flowspec_edge.core.cluster.address import Address, parse_address
from flowspec_edge.core.cluster.membership import MAX_TOLD
from flowspec_edge.errors import StateError
from flowspec_edge.files import read_private, state_directory, write_private
from flowspec_edge.net.addresses import NODE_PORT, is_loopback
from flowspec_edge.net.auth import Credentials

MAX_REMEMBERED_BYTES = 2**16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbourhood:
    """Where to look for peers.

    ``peers`` are addresses that the user gave. With ``remembers``, peers of earlier runs are looked for as well, and
    those of this run are kept.
    """

    cluster: str
    host: str
    credentials: Credentials | None = None
    peers: tuple[Address, ...] = ()
    remembers: bool = False

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)

    @property
    def fingerprint(self) -> str:
        return self.credentials.fingerprint if self.credentials else ""


def _read_all() -> dict[str, list[str]]:
    text = read_private(state_directory() / "peers.json") or "{}"
    try:
        remembered = json.loads(text[:MAX_REMEMBERED_BYTES])
    except ValueError:
        return {}  # these are only hints, and the file is written anew when the next peer answers
    return remembered if isinstance(remembered, dict) else {}


def remembered_peers(where: Neighbourhood) -> Iterable[Address]:
    """Addresses at which peers of this cluster answered in earlier runs."""
    try:
        texts = _read_all().get(f"{where.cluster}/{where.fingerprint}")
    except StateError as cause:
        _log.warning("%s", cause)
        return []
    parsed = (parse_address(str(text), NODE_PORT) for text in (texts if isinstance(texts, list) else [])[:MAX_TOLD])
    return [address for address in parsed if address is not None]


def remember_peers(where: Neighbourhood, addresses: Sequence[Address]) -> None:
    """Keep these addresses, followed by those that were kept before, up to MAX_TOLD.

    Raises:
        StateError: the file cannot be written.
    """
    everything = _read_all()
    both = dict.fromkeys([*addresses, *remembered_peers(where)])
    everything[f"{where.cluster}/{where.fingerprint}"] = [str(address) for address in both][:MAX_TOLD]
    write_private(state_directory() / "peers.json", json.dumps(everything, indent=1) + "\n")
