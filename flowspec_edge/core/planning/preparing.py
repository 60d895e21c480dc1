"""Decides when layers are prepared to stand by: in quiet moments, one block after the other.

It is quiet when a ring is open and no text has been written over it for a while. Then it is planned who is to stand by
for whom, and each block of layers is fetched and loaded. When a text begins, what is being done is given up at once; a
board that is in the middle of loading a block ends that, and reports it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

QUIET_S = 3.0
"""How long no text was written: who reads an answer and asks again takes longer, a program that asks does not."""
AGAIN_S = 60.0
"""After what was refused or failed it is tried again: memory is free when another ring has ended."""

# ------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Layers:
    """Layers ``[start, stop)`` that stand by on a node, or are to."""

    node: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class RingOpened:
    """There is a ring, and perhaps there are other boards than before."""


@dataclass(frozen=True, slots=True)
class RingClosed:
    """The ring was lost or left."""


@dataclass(frozen=True, slots=True)
class TextBegan:
    pass


@dataclass(frozen=True, slots=True)
class TextEnded:
    pass


@dataclass(frozen=True, slots=True)
class StandbysPlanned:
    """The answer to PlanStandbys: what is to stand by, the most urgent first. None where planning failed."""

    wanted: tuple[Layers, ...] | None


@dataclass(frozen=True, slots=True)
class LayersPrepared:
    """An answer to PrepareLayers: they stand by."""

    layers: Layers


@dataclass(frozen=True, slots=True)
class LayersRefused:
    """The other answer to PrepareLayers: they do not, or that was given up."""

    layers: Layers


@dataclass(frozen=True, slots=True)
class LayersGone:
    """The node has given them back: a stage took them, or needs their memory."""

    layers: Layers


@dataclass(frozen=True, slots=True)
class NodeGone:
    """Nothing stands by on the node any more."""

    node: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """``next_deadline`` has come."""


PreparingEvent = (
    RingOpened
    | RingClosed
    | TextBegan
    | TextEnded
    | StandbysPlanned
    | LayersPrepared
    | LayersRefused
    | LayersGone
    | NodeGone
    | TimePassed
)

# ------------------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class PlanStandbys:
    """Find out what is to stand by. It is answered by StandbysPlanned."""


@dataclass(frozen=True, slots=True)
class PrepareLayers:
    """Have the node fetch and load them. It is answered by LayersPrepared, LayersRefused or NodeGone."""

    layers: Layers


@dataclass(frozen=True, slots=True)
class StopWork:
    """Give up what was asked for last. It is answered all the same."""


@dataclass(frozen=True, slots=True)
class ReleaseNode:
    """Nothing needs to stand by on the node any more."""

    node: str


PreparingAction = PlanStandbys | PrepareLayers | StopWork | ReleaseNode

# --------------------------------------------------------------------------------- core


@dataclass(slots=True)
class Preparing:
    """The decisions of one origin. At most one action waits for its answer at any time."""

    _is_ring_open: bool = False
    _num_texts: int = 0
    _quiet_at: float = -math.inf
    _plan_at: float | None = None  # when to plan; None where the plan stands
    _wanted: tuple[Layers, ...] = ()
    _held: set[Layers] = field(default_factory=set)
    _again_at: dict[Layers, float] = field(default_factory=dict)  # what was refused
    _work: PlanStandbys | PrepareLayers | None = None
    _is_stopping: bool = False

    def handle(self, event: PreparingEvent, now: float) -> list[PreparingAction]:
        actions: list[PreparingAction] = []
        match event:
            case RingOpened():
                self._is_ring_open, self._plan_at, self._quiet_at = True, now, now + QUIET_S
                self._again_at.clear()
                actions = self._stop()
            case RingClosed():
                self._is_ring_open = False
            case TextBegan():
                self._num_texts += 1
            case TextEnded():
                self._num_texts -= 1
                self._quiet_at = now + QUIET_S
            case StandbysPlanned(wanted):
                actions = self._take_plan(wanted, now)
            case LayersPrepared(layers):
                self._end_work(layers)
                self._held.add(layers)
            case LayersRefused(layers):
                if not self._is_stopping:
                    self._again_at[layers] = now + AGAIN_S
                self._end_work(layers)
            case LayersGone(layers):
                self._held.discard(layers)
                self._again_at[layers] = now + AGAIN_S
            case NodeGone(node):
                self._lose(node, now)
            case TimePassed():
                pass
        return [*actions, *self._go_on(now)]

    def holds(self, layers: Layers) -> bool:
        """Whether they stand by."""
        return layers in self._held

    def next_deadline(self) -> float | None:
        """When ``TimePassed`` is due."""
        if not self._is_ring_open or self._num_texts or self._work is not None:
            return None
        due = [self._again_at.get(layers, -math.inf) for layers in self._missing()]
        due += [] if self._plan_at is None else [self._plan_at]
        return max(min(due), self._quiet_at) if due else None

    def check(self) -> None:
        """Assert the invariants."""
        assert self._num_texts >= 0
        assert self._work is not None or not self._is_stopping
        assert self._is_stopping or self._work is None or self._may_work

    @property
    def _may_work(self) -> bool:
        return self._is_ring_open and not self._num_texts

    def _missing(self) -> list[Layers]:
        return [layers for layers in self._wanted if layers not in self._held]

    def _take_plan(self, wanted: tuple[Layers, ...] | None, now: float) -> list[PreparingAction]:
        """Nodes that hold what is not wanted any more are let go; they are asked for the rest again."""
        is_current, self._work, self._is_stopping = not self._is_stopping, None, False
        if not is_current:
            return []
        if wanted is None:
            self._plan_at = now + AGAIN_S
            return []
        self._wanted, self._plan_at = wanted, None
        released = sorted({layers.node for layers in self._held - set(wanted)})
        self._held = {layers for layers in self._held if layers.node not in released}
        return [ReleaseNode(node) for node in released]

    def _stop(self) -> list[PreparingAction]:
        if self._work is None or self._is_stopping:
            return []
        self._is_stopping = True
        return [StopWork()]

    def _end_work(self, layers: Layers) -> None:
        if self._work == PrepareLayers(layers):
            self._work, self._is_stopping = None, False

    def _lose(self, node: str, now: float) -> None:
        self._held = {layers for layers in self._held if layers.node != node}
        self._again_at |= {layers: now + AGAIN_S for layers in self._wanted if layers.node == node}
        if isinstance(self._work, PrepareLayers) and self._work.layers.node == node:
            self._work, self._is_stopping = None, False

    def _go_on(self, now: float) -> list[PreparingAction]:
        if self._work is not None:
            return [] if self._may_work else self._stop()
        if not self._may_work or now < self._quiet_at:
            return []
        if self._plan_at is not None and self._plan_at <= now:
            self._work = PlanStandbys()
            return [self._work]
        for layers in self._missing():
            if self._again_at.get(layers, -math.inf) <= now:
                self._work = PrepareLayers(layers)
                return [self._work]
        return []
