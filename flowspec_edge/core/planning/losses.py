"""The nodes that were lost, and the ways between nodes that are cut, until they are back; and those that lose packets.

A way is cut where both of its ends answer the origin, and one of them cannot reach the other. Rings are planned without
lost nodes, and around cut ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Way = tuple[str, str]
"""The way between two nodes, in either direction: their names, sorted. One of them may be the origin."""
Part = str | Way
"""What a ring is made of: a node, by its name, or a way."""

GREET_S = 1.0
"""How long after a greeting that was not answered a lost node is greeted again. A greeting is 2 ms of work."""
TRY_S = 10.0
"""How long after it was cut a way is tried, and how long between two tries. A try sends up to 1 MiB, and rings do
without the way meanwhile."""
FORGET_S = 120.0
"""How long a part counts as lost that never answers: longer than any text waits for it."""
FAILED_S = 5.0
"""How long a node is doubted whose stages failed twice although it answers, or of which two ways are cut, and a part
that was lost twice or loses packets."""
MAX_DOUBT_S = 160.0
"""The longest doubt. It doubles with each loss, so a part on a bad link costs a text a pause every few minutes."""
REPEAT_S = 30.0
"""Two losses of a part, or failures of a node's stages, within this time are no accident."""


def way_between(node: str, other: str) -> Way:
    """The way between two nodes."""
    return (node, other) if node < other else (other, node)


# --------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PartsLost:
    """These nodes do not answer, or no longer, and these ways are cut."""

    parts: frozenset[Part]


@dataclass(frozen=True, slots=True)
class PacketsLost:
    """A part that answers loses many of its packets."""

    part: Part


@dataclass(frozen=True, slots=True)
class StageFailed:
    """A node that answers said that its stage failed."""

    node: str


@dataclass(frozen=True, slots=True)
class PartAnswered:
    """A node has answered a greeting, or a message has passed over a way."""

    part: Part


@dataclass(frozen=True, slots=True)
class PartSilent:
    """A node has not answered a greeting, or nothing came over a way."""

    part: Part


@dataclass(frozen=True, slots=True)
class TimePassed:
    """``next_deadline`` has come."""


LossEvent = PartsLost | PacketsLost | StageFailed | PartAnswered | PartSilent | TimePassed

# -------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True)
class TryPart:
    """Greet the node, or try the way. It is answered by ``PartAnswered`` or ``PartSilent``."""

    part: Part


@dataclass(frozen=True, slots=True)
class UsePart:
    """From now on the part may be planned with again."""

    part: Part


LossAction = TryPart | UsePart


@dataclass(slots=True)
class _Lost:
    """``try_at`` is infinite while the part is tried, and where it is doubted: that one would answer.

    ``doubt_s`` is how long it is to be doubted once it answers.
    """

    forget_at: float
    try_at: float = math.inf
    doubt_s: float = 0.0
    is_doubted: bool = False


@dataclass(slots=True)
class Losses:
    """The parts that were lost and have not answered since, and those that answer but are doubted.

    ``origin`` is the name of the origin's own node. Its link may be bad too, but no ring goes around it.
    """

    origin: str = ""
    _lost: dict[Part, _Lost] = field(default_factory=dict)
    _failed_at: dict[str, float] = field(default_factory=dict)
    _back: dict[Part, tuple[float, float]] = field(default_factory=dict)  # since when in use again, after which doubt
    _tried: set[Part] = field(default_factory=set)  # at present

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes not to plan with; those that are doubted only where there is room without them."""
        return frozenset(part for part in self._lost if isinstance(part, str))

    @property
    def ways(self) -> frozenset[Way]:
        """The ways not to plan with; those that are doubted only where there is room without them."""
        return frozenset(part for part in self._lost if not isinstance(part, str))

    @property
    def doubted(self) -> frozenset[Part]:
        """Of these nodes and ways those that answer."""
        return frozenset(part for part, lost in self._lost.items() if lost.is_doubted)

    def handle(self, event: LossEvent, now: float) -> list[LossAction]:
        match event:
            case PartsLost(parts):
                for part in sorted(parts, key=str):
                    self._lose(part, now)
                    if not isinstance(part, str):
                        self._doubt_ends(part, now)
            case PacketsLost(part):
                if part not in self._lost:
                    self._doubt(part, now)
                if not isinstance(part, str):
                    self._doubt_ends(part, now)
            case StageFailed(node):
                if node not in self._lost and now - self._failed_at.get(node, -math.inf) <= REPEAT_S:
                    self._lost[node] = _Lost(now + FAILED_S, doubt_s=FAILED_S, is_doubted=True)
                self._failed_at[node] = now
            case PartAnswered(part):
                self._tried.discard(part)
                lost = self._lost.get(part)
                if lost is not None and not lost.is_doubted:
                    lost.is_doubted, lost.try_at, lost.forget_at = True, math.inf, now + lost.doubt_s
            case PartSilent(part):
                self._tried.discard(part)
                if part in self._lost and not self._lost[part].is_doubted:
                    self._lost[part].try_at = now + _pause_s(part)
            case TimePassed():
                pass
        return self._pass_time(now)

    def next_deadline(self) -> float | None:
        """When ``TimePassed`` is due."""
        return min((min(lost.forget_at, lost.try_at) for lost in self._lost.values()), default=None)

    def check(self) -> None:
        """Assert that every lost part is forgotten some day, and that those which are gone are tried."""
        for part, lost in self._lost.items():
            assert math.isfinite(lost.forget_at)
            assert lost.is_doubted or part in self._tried or math.isfinite(lost.try_at)

    def _lose(self, part: Part, now: float) -> None:
        """A node is greeted at once, for it may only have been slow. One that was back a moment ago is doubted."""
        back_at, doubt_s = self._back.pop(part, (-math.inf, 0.0))
        if (before := self._lost.get(part)) is not None:
            back_at, doubt_s = now if before.is_doubted else -math.inf, before.doubt_s
        if now - back_at <= REPEAT_S:
            doubt_s = _longer(doubt_s)
        elif before is None:
            doubt_s = 0.0
        try_at = math.inf if part in self._tried else now if isinstance(part, str) else now + TRY_S
        self._lost[part] = _Lost(now + FORGET_S, try_at, doubt_s)

    def _doubt_ends(self, way: Way, now: float) -> None:
        """Where two ways of a node are cut it is the node's own link that is bad, and the next way would be cut too."""
        for node in way:
            if node != self.origin and node not in self._lost and sum(node in cut for cut in self.ways) > 1:
                self._doubt(node, now)

    def _doubt(self, part: Part, now: float) -> None:
        """It answers, and is not to be planned with for a while; for a longer one where that has not helped."""
        back_at, doubt_s = self._back.pop(part, (-math.inf, 0.0))
        doubt_s = _longer(doubt_s if now - back_at <= REPEAT_S else 0.0)
        self._lost[part] = _Lost(now + doubt_s, doubt_s=doubt_s, is_doubted=True)

    def _pass_time(self, now: float) -> list[LossAction]:
        actions: list[LossAction] = []
        for part, lost in list(self._lost.items()):
            if lost.forget_at <= now:
                del self._lost[part]
                self._back[part] = now, lost.doubt_s
                actions.append(UsePart(part))
            elif lost.try_at <= now:
                lost.try_at = math.inf
                self._tried.add(part)
                actions.append(TryPart(part))
        return actions


def _longer(doubt_s: float) -> float:
    return min(max(FAILED_S, 2 * doubt_s), MAX_DOUBT_S)


def _pause_s(part: Part) -> float:
    return GREET_S if isinstance(part, str) else TRY_S
