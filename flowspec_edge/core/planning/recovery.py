"""What becomes of texts when nodes are lost.

``LostNodes`` keeps which nodes are not planned with at present. ``Recovery`` decides for one text whether it goes on
over another ring, waits for boards, or ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

GREET_S = 1.0
"""How long after a greeting that was not answered a lost node is greeted again. A greeting is 2 ms of work."""
FORGET_S = 120.0
"""How long a node counts as lost that answers no greeting: longer than any text waits for it."""
FAILED_S = 5.0
"""How long a node is not planned with whose stages failed twice although it answers."""
REPEAT_S = 30.0
"""Two failures of a node's stages within this time are no accident."""
MAX_LOSSES = 6
"""How many rings in a row a text may lose without a new token. A ring of five that loses node after node loses four."""
RETRY_S = 1.0
"""How often to look whether a ring can be opened while a text waits: memory becomes free without a sign."""

# ------------------------------------------------------------------- events of LostNodes


@dataclass(frozen=True, slots=True)
class NodesLost:
    """Links to these nodes ended, or could not be opened."""

    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A node that answers said that its stage failed."""

    node: str


@dataclass(frozen=True, slots=True)
class NodeAnswered:
    """The node has answered a greeting, or is found at another address."""

    node: str


@dataclass(frozen=True, slots=True)
class NodeSilent:
    """The node has not answered a greeting."""

    node: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """``next_deadline`` has come."""


LossEvent = NodesLost | StageFailed | NodeAnswered | NodeSilent | TimePassed


@dataclass(frozen=True, slots=True)
class GreetNode:
    """Ask the node whether it is there. It is answered by ``NodeAnswered`` or ``NodeSilent``."""

    node: str


@dataclass(frozen=True, slots=True)
class UseNode:
    """From now on the node may be planned with again."""

    node: str


LossAction = GreetNode | UseNode


@dataclass(slots=True)
class _Lost:
    """``greet_at`` is infinite while the node is greeted. One that only failed is not greeted, for it would answer."""

    forget_at: float
    greet_at: float = math.inf
    only_failed: bool = False


@dataclass(slots=True)
class LostNodes:
    """The nodes that were lost and have not answered since."""

    _lost: dict[str, _Lost] = field(default_factory=dict)
    _failed_at: dict[str, float] = field(default_factory=dict)
    _greeted: set[str] = field(default_factory=set)  # at present

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes not to plan with."""
        return frozenset(self._lost)

    def handle(self, event: LossEvent, now: float) -> list[LossAction]:
        match event:
            case NodesLost(nodes):
                for node in sorted(nodes):
                    self._lost[node] = _Lost(now + FORGET_S, math.inf if node in self._greeted else now)
            case StageFailed(node):
                if node not in self._lost and now - self._failed_at.get(node, -math.inf) <= REPEAT_S:
                    self._lost[node] = _Lost(now + FAILED_S, only_failed=True)
                self._failed_at[node] = now
            case NodeAnswered(node):
                self._greeted.discard(node)
                if node in self._lost and not self._lost[node].only_failed:
                    del self._lost[node]
                    return [UseNode(node), *self._pass_time(now)]
            case NodeSilent(node):
                self._greeted.discard(node)
                if node in self._lost and not self._lost[node].only_failed:
                    self._lost[node].greet_at = now + GREET_S
            case TimePassed():
                pass
        return self._pass_time(now)

    def next_deadline(self) -> float | None:
        """When ``TimePassed`` is due."""
        return min((min(lost.forget_at, lost.greet_at) for lost in self._lost.values()), default=None)

    def check(self) -> None:
        """Assert that every lost node is forgotten some day, and that those which are gone are greeted."""
        for node, lost in self._lost.items():
            assert math.isfinite(lost.forget_at)
            assert lost.only_failed or node in self._greeted or math.isfinite(lost.greet_at)

    def _pass_time(self, now: float) -> list[LossAction]:
        actions: list[LossAction] = []
        for node, lost in list(self._lost.items()):
            if lost.forget_at <= now:
                del self._lost[node]
                actions.append(UseNode(node))
            elif lost.greet_at <= now:
                lost.greet_at = math.inf
                self._greeted.add(node)
                actions.append(GreetNode(node))
        return actions


# -------------------------------------------------------------------- events of Recovery


@dataclass(frozen=True, slots=True)
class RingOpened:
    """There is a ring to write over."""


@dataclass(frozen=True, slots=True)
class RingFailed:
    """The ring was lost, or could not be opened since a node of it was. ``num_tokens`` are written so far."""

    num_tokens: int
    reason: str


@dataclass(frozen=True, slots=True)
class RoomMissing:
    """No ring can be opened with the nodes that are there.

    ``had_room`` says whether there has been a ring before; where there was none, nothing was lost that may come back.
    """

    reason: str
    had_room: bool


RecoveryEvent = RingOpened | RingFailed | RoomMissing


@dataclass(frozen=True, slots=True)
class OpenRing:
    """Open a ring with who is there. It is answered by any of the events."""


@dataclass(frozen=True, slots=True)
class WaitForBoards:
    """Wait until a board has come or ``until`` has passed, then open a ring."""

    until: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the text for this reason."""

    reason: str


RecoveryAction = OpenRing | WaitForBoards | GiveUp


@dataclass(slots=True)
class Recovery:
    """The decisions for one text, which waits for boards at most ``wait_s`` each time that there is no room."""

    wait_s: float
    _num_losses: int = 0  # since the latest token
    _num_tokens: int = 0
    _waits_until: float | None = None

    def handle(self, event: RecoveryEvent, now: float) -> list[RecoveryAction]:
        match event:
            case RingOpened():
                self._waits_until = None
                return []
            case RingFailed(num_tokens, reason):
                if num_tokens > self._num_tokens:
                    self._num_losses, self._num_tokens = 0, num_tokens
                self._num_losses += 1
                if self._num_losses < MAX_LOSSES:
                    return [OpenRing()]
                return [GiveUp(f"{MAX_LOSSES} rings in a row were lost without a new token, the last one so: {reason}")]
            case RoomMissing(reason, had_room):
                if not (had_room or self._num_losses) or self.wait_s <= 0:
                    return [GiveUp(reason)]
                if self._waits_until is None:
                    self._waits_until = now + self.wait_s
                if self._waits_until <= now:
                    return [GiveUp(f"{reason}; no board came within {self.wait_s:g} s (--wait-for-boards)")]
                return [WaitForBoards(min(now + RETRY_S, self._waits_until))]

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self._num_losses <= MAX_LOSSES
