"""Schedules: small policies over one machinery, chosen by name.

The machinery (``core/generation.py``) sends the prompt, verifies, prunes and emits. A schedule decides which rows form the next
chunk and when it leaves, what the drafter runs next, and whether returned rows may be verified yet.
"""

from __future__ import annotations

from flowspec_edge.core.speculation.schedules.ablations import ABLATIONS
from flowspec_edge.core.speculation.schedules.autoregressive import Autoregressive
from flowspec_edge.core.speculation.schedules.base import Schedule
from flowspec_edge.core.speculation.schedules.flowspec import Flowspec
from flowspec_edge.core.speculation.schedules.pipedec import Pipedec
from flowspec_edge.core.speculation.schedules.rounds import Chunked, Lockstep, Pruned
from flowspec_edge.errors import RequestError

SCHEDULES: dict[str, type[Schedule]] = {
    "autoregressive": Autoregressive,
    "chunked": Chunked,
    "pruned": Pruned,
    "pipedec": Pipedec,
    "lockstep": Lockstep,
    "flowspec": Flowspec,
}


def ablation_names() -> list[str]:
    """Schedules that are ``flowspec`` without one thing: for comparison, not for use."""
    return list(ABLATIONS)


def find_schedule(name: str) -> type[Schedule]:
    """The schedule of that name.

    Raises:
        RequestError: there is none.
    """
    found = SCHEDULES.get(name) or ABLATIONS.get(name)
    if found is None:
        raise RequestError(f"schedule {name!r} is not known; choose one of {', '.join(SCHEDULES)}")
    return found
