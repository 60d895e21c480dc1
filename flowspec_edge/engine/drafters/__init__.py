"""The interface of drafters, one of which is chosen by what the bundle has."""

from __future__ import annotations

from typing import Protocol

from flowspec_edge.core.events import DraftFinished, RunDraft


class Drafter(Protocol):
    """Proposes continuations. Sessions are opened before their first job and closed after their last."""

    def open(self, session: int, capacity: int) -> None: ...

    def close(self, session: int) -> None: ...

    def run(self, job: RunDraft) -> DraftFinished: ...
