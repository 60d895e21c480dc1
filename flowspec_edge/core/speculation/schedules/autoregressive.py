"""Plain pipeline parallelism: one token per trip, nothing drafted."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from flowspec_edge.core.speculation.schedules.base import Schedule

if TYPE_CHECKING:
    from flowspec_edge.core.speculation.generation import Generation


class Autoregressive(Schedule):
    uses_drafter: ClassVar[bool] = False

    def choose_rows(self, generation: Generation, now: float) -> list[int]:
        return [] if generation.root in generation.sent else [generation.root]
