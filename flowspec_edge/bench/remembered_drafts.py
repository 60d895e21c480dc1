"""A drafter that remembers its answers, so that nothing is computed twice.

Schedules that do not look at the clock ask for the same passes on every testbed, and some share passes with other
schedules. A drafter's answer depends on all jobs of its session so far, so answers are kept by the whole sequence of
jobs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowspec_edge.core.events import DraftFinished, RunDraft
from flowspec_edge.engine.drafters.drafter import Drafter


@dataclass(slots=True)
class _Asked:
    """A sequence of jobs: the answer to the last one, and the sequences that continue it, by the next job."""

    answer: DraftFinished | None = None
    following: dict[Any, _Asked] = field(default_factory=dict)


class RememberedDrafts:
    """A drafter for one session at a time. It runs another drafter only for jobs whose answers are not known yet."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self._start = self._at = _Asked()
        self._capacity = 0
        self._behind: list[RunDraft] = []  # jobs that were answered from memory, which the other drafter has not run
        self._is_open = False

    def forget(self) -> None:
        """Forget all answers, since another text begins: jobs tell hidden rows apart by their place in
        the text alone.
        """
        self._start = _Asked()

    def open(self, session: int, capacity: int) -> None:
        self._at, self._capacity, self._behind = self._start, capacity, []

    def close(self, session: int) -> None:
        if self._is_open:
            self._drafter.close(session)
            self._is_open = False

    def run(self, job: RunDraft) -> DraftFinished:
        key = (job.rows, job.positions.tobytes(), len(job.hidden), job.dropped)
        asked = self._at.following.get(key)
        if asked is None:
            asked = self._at.following[key] = _Asked(self._compute(job))
        else:
            self._behind.append(job)
        self._at = asked
        assert asked.answer is not None
        return asked.answer

    def _compute(self, job: RunDraft) -> DraftFinished:
        if not self._is_open:
            self._drafter.open(job.session, self._capacity)
            self._is_open = True
        behind, self._behind = self._behind, []
        for earlier in behind:
            self._drafter.run(earlier)
        return self._drafter.run(job)
