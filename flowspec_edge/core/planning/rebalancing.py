"""Decides when a ring that serves is planned anew, and when it moves to the new plan.

Four things make a plan due: a board that the last plan did not weigh, a way between boards that works again, the end of
the last session when the last plan is old, since boards get hot and cool down, and a part of the ring that loses
packets. A plan is made while the ring goes on serving. If it is clearly better, the ring moves as soon as no session
runs. With ``at_once``, and where packets are lost, it moves at once, and its sessions go on in the new ring. Otherwise
what is loaded stays (see core/planning/planner.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

REPLAN_S = 60.0
"""How old a plan may be when the last session ends.

Boards get hot within minutes, and asking them takes under a second.
"""
SETTLE_S = 1.5
"""How long to wait for more boards after a new one: boards that are switched on together are weighed together."""

# ------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class RingOpened:
    """A ring was opened. ``boards`` were found when it was planned, whether the ring uses them or not."""

    boards: frozenset[str]


@dataclass(frozen=True, slots=True)
class RingClosed:
    """The ring was lost, or could not be moved. The next request opens another ring."""


@dataclass(frozen=True, slots=True)
class BoardsFound:
    """The boards that are there now, all of them."""

    boards: frozenset[str]


@dataclass(frozen=True, slots=True)
class WayReturned:
    """A way between two boards may be used again that plans went around."""


@dataclass(frozen=True, slots=True)
class PacketsLost:
    """A part of the ring loses packets, and is not planned with if that can be."""


@dataclass(frozen=True, slots=True)
class SessionBegan:
    pass


@dataclass(frozen=True, slots=True)
class SessionEnded:
    pass


@dataclass(frozen=True, slots=True)
class PlanMade:
    """A plan was made with ``boards``, and uses those in ``used``. ``is_better`` is False where planning failed."""

    boards: frozenset[str]
    is_better: bool
    used: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class TimePassed:
    """``next_deadline`` has come."""


RebalancingEvent = (
    RingOpened
    | RingClosed
    | BoardsFound
    | WayReturned
    | PacketsLost
    | SessionBegan
    | SessionEnded
    | PlanMade
    | TimePassed
)

# ------------------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Make a plan with the boards that are there. It is answered by ``PlanMade``."""


@dataclass(frozen=True, slots=True)
class MoveRing:
    """Move the ring to the plan that was made last. It is answered by ``RingOpened`` or ``RingClosed``."""


RebalancingAction = MakePlan | MoveRing

# --------------------------------------------------------------------------------- core


@dataclass(slots=True)
class Rebalancing:
    """The decisions for one ring at a time. Where it does not ``follow`` boards, it moves for lost packets alone."""

    at_once: bool = False
    follows: bool = True
    _weighed: frozenset[str] | None = None  # None while no ring is open
    _found: frozenset[str] = frozenset()
    _num_sessions: int = 0
    _planned_at: float = field(default=-math.inf)
    _due_at: float | None = None  # when to make the next plan; None where none is due
    _is_planning: bool = False
    _is_better: bool = False  # whether the plan that was made last is better
    _used: frozenset[str] = frozenset()  # the boards that this plan uses
    _is_moving: bool = False
    _is_urgent: bool = False  # whether texts suffer in the ring that is open

    def handle(self, event: RebalancingEvent, now: float) -> list[RebalancingAction]:
        match event:
            case RingOpened(boards):
                self._weighed, self._planned_at = boards, now
                self._is_better = self._is_moving = self._is_urgent = False
                self._watch_for_newcomers(now)
            case RingClosed():
                self._weighed = self._due_at = None
                self._is_better = self._is_moving = self._is_urgent = False
            case BoardsFound(boards):
                self._found = boards
                self._watch_for_newcomers(now)
            case WayReturned():
                if self._weighed is not None and self._due_at is None and self.follows:
                    self._due_at = now + SETTLE_S
            case PacketsLost():
                if self._weighed is not None:
                    self._due_at, self._is_urgent, self._is_better = now, True, False
            case SessionBegan():
                self._num_sessions += 1
            case SessionEnded():
                self._num_sessions -= 1
                is_old = self._weighed is not None and now - self._planned_at >= REPLAN_S
                if is_old and self.follows and not self._num_sessions:
                    self._due_at = now
            case PlanMade(boards, is_better, used):
                self._is_planning = False
                if self._weighed is not None:
                    self._weighed, self._planned_at = boards, now
                    self._is_better, self._used = is_better, used
                    self._is_urgent &= is_better or self._due_at is not None
                    self._watch_for_newcomers(now)
            case TimePassed():
                pass
        return self._go_on(now)

    def next_deadline(self) -> float | None:
        """When ``TimePassed`` is due."""
        return None if self._is_planning or self._is_moving else self._due_at

    def check(self) -> None:
        """Assert the invariants."""
        assert self._num_sessions >= 0
        assert self._weighed is not None or not (self._is_better or self._is_moving or self._is_urgent)
        assert self._weighed is not None or self._due_at is None, "nothing is due without a ring"

    def _watch_for_newcomers(self, now: float) -> None:
        if self._weighed is not None and self._found - self._weighed and self._due_at is None and self.follows:
            self._due_at = now + SETTLE_S

    def _go_on(self, now: float) -> list[RebalancingAction]:
        if self._weighed is None or self._is_planning or self._is_moving:
            return []
        if self._is_better and not self._used <= self._found:  # a board of that plan has left
            self._is_better, self._due_at = False, now
        if self._is_better and (self.at_once or self._is_urgent or not self._num_sessions):
            self._is_moving = True
            return [MoveRing()]
        if self._due_at is not None and self._due_at <= now:
            self._due_at, self._is_planning = None, True
            return [MakePlan()]
        return []
