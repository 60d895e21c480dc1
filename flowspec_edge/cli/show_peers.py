"""What a node says of its peers: who has joined, who was lost, and what to do where nobody comes."""

from __future__ import annotations

import logging
import sys

from flowspec_edge.core.cluster import membership as ms
from flowspec_edge.core.cluster.address import Address
from flowspec_edge.net.addresses import NODE_PORT, addresses_to_announce
from flowspec_edge.net.neighbourhood import Neighbourhood

_log = logging.getLogger(__name__)


class PeerDisplay:
    """Prints who came and who was lost; with ``is_quiet`` it only logs that.

    What users have to act on (a namesake, nobody there) goes to standard error either way.
    """

    def __init__(self, where: Neighbourhood, *, is_quiet: bool) -> None:
        self.port = NODE_PORT  # the node sets its own once it listens
        self._where = where
        self._is_quiet = is_quiet

    def show(self, action: ms.MembershipAction) -> None:
        match action:
            case ms.ReportJoined(peer):
                self._say(f"joined: {peer.node} at {peer.address}")
            case ms.ReportMoved(peer, before):
                self._say(f"moved: {peer.node} from {before} to {peer.address}")
            case ms.ReportLost(peer, why):
                self._say(f"lost: {peer.node} at {peer.address} ({why})")
            case ms.ReportNamesake(text):
                print(f"flowspec: {text}", file=sys.stderr, flush=True)
            case ms.ReportAlone():
                print(f"flowspec: {alone_text(self._where, self.port)}", file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        if self._is_quiet:
            _log.info("%s", line)
        else:
            print(line, flush=True)


def alone_text(where: Neighbourhood, port: int) -> str:
    """What to do when no other node has answered."""
    alone = f"no other node of cluster {where.cluster} has answered for {ms.ALONE_S:.0f} s"
    if where.is_local:
        return f"{alone}; this one listens on this machine only (leave out --host to reach other boards)"
    address = Address(addresses_to_announce(where.host)[0], port)
    return (
        f"{alone}. Start one on another board (`flowspec key show` prints the line); if one runs already, `flowspec "
        f"doctor` says what keeps it away, and with --peer {address} it reaches this board without mDNS"
    )
