"""What a node brings along: its settings, and the account of the memory that it offers."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import RowKind
from flowspec_edge.core import wire
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.device.caps import NO_CAPS, Caps
from flowspec_edge.core.planning.shared_cores import Cores
from flowspec_edge.errors import StageFailedError
from flowspec_edge.net.auth import Credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.neighbourhood import Neighbourhood
from flowspec_edge.node.board import Thermometer
from flowspec_edge.node.sensors import BoardPower
from flowspec_edge.version import __version__
from flowspec_edge.weights.cache import WeightCache

MAX_STAGES, MAX_STAGES_PER_PEER = 32, 8
"""Stages that a node opens at once. An origin has one here, and while its ring changes another one that is ending."""
MEMORY_SHARE = 0.8
"""How much of the memory that is free at the start a node offers; the rest is for caches and the system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """``cluster`` is the label that nodes must share to find each other; memory is what the node offers, in bytes.

    ``num_threads`` run one stage. An ``announced`` node is found by others and serves layers; one that is not only
    takes in what returns from its own rings. Beyond loopback it needs ``credentials``, or has to be told to be
    insecure. Without a ``cache`` it fetches no weights and serves its own bundles alone. Port 0 is ``preferred_port``
    where that is free, else any. ``peers`` were typed; a node that ``remembers`` peers looks for those of its earlier
    runs as well. Its stages run in ``precision``; where that is None, in what was chosen for their bundle by
    measurement, or in the bundle's own. One that ``has_half_cache`` keeps keys and values in float16. ``thermometer``
    tells of the board's heat, where it can, and ``power`` what it takes. Its stages rest so that it stays under its
    ``caps``. ``cores`` are what it shares with other nodes of its machine. Hidden rows travel as ``row_kind`` in
    rings that it opens.
    """

    name: str
    cluster: str
    host: str = "127.0.0.1"
    port: int = 0
    bundles: tuple[Bundle, ...] = ()
    memory_bytes: int = 0
    num_threads: int = 1
    is_announced: bool = True
    credentials: Credentials | None = None
    is_insecure: bool = False
    cache: WeightCache | None = None
    preferred_port: int = 0
    peers: tuple[Address, ...] = ()
    remembers: bool = False
    precision: str | None = None
    has_half_cache: bool = False
    row_kind: RowKind = "float32"
    thermometer: Thermometer | None = None
    power: BoardPower | None = None
    caps: Caps = NO_CAPS
    cores: Cores = field(default_factory=Cores)

    @property
    def neighbourhood(self) -> Neighbourhood:
        return Neighbourhood(
            cluster=self.cluster,
            host=self.host,
            credentials=self.credentials,
            peers=self.peers,
            remembers=self.remembers,
        )

    def hello(self, purpose: str, ring: str) -> wire.Hello:
        """What this node says first on a link that it opens."""
        return wire.Hello(self.name, __version__, wire.PROTOCOL_VERSION, purpose, ring)


class OpenStages:
    """How many stages are open here, or are being opened or ended, and for whom."""

    def __init__(self) -> None:
        self._num_of: Counter[str] = Counter()

    @contextlib.contextmanager
    def admit(self, peer: str) -> Iterator[None]:
        """Count one more for that peer, as long as the context lasts.

        Raises:
            StageFailedError: the peer has as many as it may have, or all peers together have.
        """
        if self._num_of[peer] >= MAX_STAGES_PER_PEER:
            raise StageFailedError(f"has {self._num_of[peer]} stages of {peer}, the limit (MAX_STAGES_PER_PEER)")
        if (total := self._num_of.total()) >= MAX_STAGES:
            raise StageFailedError(f"has {total} stages, the limit (MAX_STAGES)")
        self._num_of[peer] += 1
        try:
            yield
        finally:
            self._num_of -= Counter([peer])  # which forgets peers that have none


class MemoryAccount:
    """The memory that a node offers for layers, and what the stages of open control links have reserved of it."""

    def __init__(self, offered_bytes: int) -> None:
        self.offered_bytes = offered_bytes
        self._reserved_bytes: dict[Link, int] = {}

    @contextlib.contextmanager
    def reserve(self, control: Link, num_bytes: int) -> Iterator[None]:
        """Take this much off what the node offers, while the stage of that control link needs it.

        Raises:
            StageFailedError: so much is not free.
        """
        if num_bytes > (free_bytes := self.free_bytes):
            raise StageFailedError(
                f"has {free_bytes / 2**20:.0f} MiB free of the {self.offered_bytes / 2**20:.0f} that it offers, and "
                f"these layers need {num_bytes / 2**20:.0f}; plan again, or give its node a larger --memory"
            )
        self._reserved_bytes[control] = num_bytes
        try:
            yield
        finally:
            del self._reserved_bytes[control]

    @property
    def free_bytes(self) -> int:
        """Of what is offered. Stages that are ending have none of it: whoever opens another waits (KeptLayers)."""
        reserved = sum(num_bytes for control, num_bytes in self._reserved_bytes.items() if control.is_open)
        return self.offered_bytes - reserved


def unique_name() -> str:
    """This machine's name and six digits by chance: freshly flashed cards share one name, and often one process id."""
    return f"{socket.gethostname()}-{secrets.token_hex(3)}"


def available_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What Linux says is available without swapping, less a reserve; see MEMORY_SHARE."""
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(int(line.split()[1]) * 1024 * MEMORY_SHARE)
    return 0
