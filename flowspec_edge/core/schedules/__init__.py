"""Schedules: small policies over one machinery, chosen by name.

The machinery (``core/generation.py``) sends the prompt and every new root by itself, at once. A schedule decides the rest:
which draft rows form the next chunk, and whether another pass of the drafter is wanted.
"""

from __future__ import annotations

from typing import Protocol

from flowspec_edge.core.drafting import Drafting
from flowspec_edge.core.schedules.autoregressive import Autoregressive
from flowspec_edge.core.schedules.flowspec import Flowspec
from flowspec_edge.errors import RequestError


class Schedule(Protocol):
    """``num_in_flight`` counts chunks with a living row that have not come back; ``unsent`` are sendable rows, best first."""

    uses_drafter: bool

    def choose_rows(self, unsent: list[int], drafting: Drafting, num_in_flight: int) -> list[int]:
        """Draft ids of the next chunk, parents before children; empty to wait."""
        ...

    def wants_pass(self, num_unsent: int, drafting: Drafting, num_in_flight: int) -> bool:
        """Whether the drafter shall make another pass in this round."""
        ...


SCHEDULES: dict[str, type[Autoregressive] | type[Flowspec]] = {"autoregressive": Autoregressive, "flowspec": Flowspec}


def make_schedule(name: str, num_stages: int) -> Schedule:
    """The schedule of that name for a ring of ``num_stages``.

    Raises:
        RequestError: there is no such schedule.
    """
    if name not in SCHEDULES:
        raise RequestError(f"schedule {name!r} is not known; choose one of {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name](num_stages)
