"""Plain pipeline parallelism: one token per trip, nothing drafted."""

from __future__ import annotations

from typing import ClassVar

from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule


class Autoregressive(Schedule):
    uses_drafter: ClassVar[bool] = False

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        return [] if view.root in view.sent else [view.root]
