"""Options of ``flowspec serve``: how many texts are written and wait, and how many that have ended are kept."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowspec_edge.errors import RequestError

if TYPE_CHECKING:
    from flowspec_edge.web.turns import TurnLimits

MAX_TEXTS = 4096
"""Of any kind that ``flowspec serve`` may take: each waiting one may hold a body of 4 MiB."""


@dataclass(frozen=True, kw_only=True)
class TextLimitArguments:
    max_sessions: int
    max_queue: int
    max_per_address: int
    max_per_key: int
    keep_sessions: int | None


def add_text_limits(serve: ArgumentParser) -> None:
    serve.add_argument(
        "--max-sessions", type=int, default=16, metavar="N", help="write N texts at a time (default: %(default)s)"
    )
    serve.add_argument(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="let N more wait for their turn; others are told to come back later (default: %(default)s)",
    )
    serve.add_argument(
        "--max-per-address",
        type=int,
        default=32,
        metavar="N",
        help="of all these, N may be of one address; raise it where a proxy stands before the server "
        "(default: %(default)s)",
    )
    serve.add_argument(
        "--max-per-key", type=int, default=32, metavar="N", help="and N of one API key (default: %(default)s)"
    )
    serve.add_argument(
        "--keep-sessions",
        type=int,
        metavar="MIB",
        help="memory, on all boards together, for texts that have ended, so that the next turn need not be read from "
        "its beginning (default: a quarter of what boards offer and do not need; 0: none)",
    )


def kept_bytes(options: TextLimitArguments) -> int | None:
    """What all boards together may keep, None for the default. Raises RequestError where it is out of range."""
    if (mib := options.keep_sessions) is None:
        return None
    if mib < 0:
        raise RequestError(f"--keep-sessions is {mib}; it must be 0 (none) or a number of MiB")
    return mib * 2**20


def turn_limits(options: TextLimitArguments) -> TurnLimits:
    """Raises RequestError where one is out of range."""
    from flowspec_edge.web.turns import TurnLimits

    for name, value, least in (
        ("--max-sessions", options.max_sessions, 1),
        ("--max-queue", options.max_queue, 0),
        ("--max-per-address", options.max_per_address, 1),
        ("--max-per-key", options.max_per_key, 1),
    ):
        if not least <= value <= MAX_TEXTS:
            raise RequestError(f"{name} is {value}; it must lie between {least} and {MAX_TEXTS}")
    return TurnLimits(options.max_sessions, options.max_queue, options.max_per_address, options.max_per_key)
