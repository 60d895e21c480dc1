"""How much of ended sessions a ring keeps for prompts that go on from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from flowspec_edge.core.planning.working_memory import kv_cache_bytes
from flowspec_edge.manifest import Geometry

SHARE = 0.25
"""Of the memory that a board offers and its layers do not need. Texts, standbys and other rings come before what is
kept; so much is seldom in their way at all."""


class Spare(NamedTuple):
    """A stage: its layers, and the memory that its board offers beside them."""

    num_layers: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class KeptRoom:
    """The caches of kept sessions may have ``num_slots`` slots, each of which takes ``slot_bytes`` on all boards
    together.
    """

    num_slots: int = 0
    slot_bytes: int = 0

    @classmethod
    def on(cls, geometry: Geometry, stages: Sequence[Spare], most_bytes: int | None) -> KeptRoom:
        """The room on these stages: ``most_bytes``, or where that is None, SHARE of what each has to spare."""
        slot_bytes = kv_cache_bytes(geometry, sum(stage.num_layers for stage in stages), 1)
        if most_bytes is not None:
            return cls(most_bytes // slot_bytes, slot_bytes)
        rooms = [SHARE * stage.num_bytes / kv_cache_bytes(geometry, stage.num_layers, 1) for stage in stages]
        return cls(max(int(min(rooms)), 0), slot_bytes)
