"""Why a link ended, as a number in its close frame: what both ends tell apart, whatever words go with it."""

from __future__ import annotations

from enum import IntEnum

from flowspec_edge.errors import FlowspecError, OtherVersionError, ProtocolError


class CloseCode(IntEnum):
    """Why a link ends, in its close frame. Codes from 4000 to 4999 are an application's own (RFC 6455, 7.4.2)."""

    DONE = 1000
    BROKEN_RULE = 1002
    OTHER_VERSION = 4001
    """The side that connected speaks another version of the protocol. This code must stay, whatever else changes."""


def close_code_of(end: FlowspecError) -> CloseCode:
    """What the peer is told of an end that came from this side."""
    if isinstance(end, OtherVersionError):
        return CloseCode.OTHER_VERSION
    return CloseCode.BROKEN_RULE if isinstance(end, ProtocolError) else CloseCode.DONE
