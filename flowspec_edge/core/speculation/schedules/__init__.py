"""Schedules: small policies over one machinery, chosen by name.

The machinery (``core/speculation/generation.py``) sends the prompt, verifies, prunes and emits. A schedule decides
which rows form the next chunk and when it leaves, what the drafter runs next, and whether returned rows may be verified
yet.
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
_registered: dict[str, type[Schedule]] = {}


def ablation_names() -> list[str]:
    """Schedules that are ``flowspec`` without one thing: for comparison, not for use."""
    return list(ABLATIONS)


def register_schedule(name: str, schedule: type[Schedule]) -> None:
    """Make a schedule of your own known by ``name`` in this process, to be chosen like the built-in ones.

    A name that was registered before stands for the new schedule from now on. Other processes do not know the schedule
    by this call. Where they are to run it, as in a comparison on all cores, register it in a module that they import.

    Raises:
        ValueError: the name belongs to a built-in schedule.
    """
    if name in SCHEDULES or name in ABLATIONS:
        raise ValueError(f"schedule {name!r} comes with flowspec-edge; choose another name")
    _registered[name] = schedule


def find_schedule(name: str) -> type[Schedule]:
    """The schedule of that name.

    Raises:
        RequestError: there is none.
    """
    found = SCHEDULES.get(name) or ABLATIONS.get(name) or _registered.get(name)
    if found is None:
        known = ", ".join([*SCHEDULES, *_registered])
        raise RequestError(f"schedule {name!r} is not known; choose one of {known}")
    return found
