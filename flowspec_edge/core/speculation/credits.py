"""Credits: how many more chunks a sender may have waiting at the next hop."""

from __future__ import annotations

from flowspec_edge.core.limits import CREDITS_PER_HOP
from flowspec_edge.errors import ProtocolError


def add_credits(held: int, granted: int) -> int:
    """The credits of a sender that holds so many and is granted more.

    Raises:
        ProtocolError: that is more than chunks may wait at the next hop.
    """
    if held + granted > CREDITS_PER_HOP:
        raise ProtocolError(f"credit for {held + granted} chunks, where {CREDITS_PER_HOP} may wait (CREDITS_PER_HOP)")
    return held + granted
