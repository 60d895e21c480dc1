"""Tells which part of a ring loses packets, from what its nodes' systems count as they send, and what that costs.

TCP hides a bad cable or radio: what was lost is sent again, and texts only become slow and uneven. But a system knows
of each packet that it sent again. Every count is evidence for or against the way that the packets took, and for or
against either node at its ends, whose own link may be what is bad. So the losses on all ways of a node add up, and its
sound ways speak for it; whoever has the most evidence is the likeliest cause.

The evidence is that of a sequential test of BAD_SHARE against USUAL_SHARE, begun anew each time that it is in favour of
the part (E. S. Page, "Continuous inspection schemes", Biometrika 41, 1954). It needs as many packets as the share is
small: some 700 at 5 %, 180 at 10 % and 50 at 30 %, and no less than four counts. Where fewer are sent, ``probing.py``
sees to them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from flowspec_edge.core.planning.losses import Part, way_between
from flowspec_edge.core.planning.placement import Plan

COUNT_S = 0.2
"""How often nodes count. A loss that is not followed by other packets is itself seen after 200 ms."""
USUAL_SHARE = 0.02
"""What a usable Wi-Fi may lose behind its own repetitions; a cable loses nothing."""
BAD_SHARE = 0.05
"""What is to be noticed."""
MIN_ODDS = 1e5
"""How much likelier BAD_SHARE than USUAL_SHARE must be. In a simulation of 1670 hours a node that exchanged 600 packets
per second besides its probes, and lost just 2 % of all, was taken for a bad one 25 times (149 times without probes:
what more of them can tell within COUNT_S is bounded by MAX_STEP), and one that lost 1.5 % never."""
MAX_STEP = 30.0
"""By how much more that becomes likelier within COUNT_S. A queue that overflows drops a hundred packets at once, and a
radio that changes its channel all for a moment; a bad link goes on losing."""
REPEAT_MS = 200.0
"""After this time a system sends again what nothing followed (Linux, TCP_RTO_MIN), and after twice as long each further
time."""
MAX_SHARE = 0.45
"""Beyond this share the mean of these waits grows without bounds."""

_FOR_A_LOSS = math.log(BAD_SHARE / USUAL_SHARE)
_FOR_AN_ARRIVAL = math.log((1 - BAD_SHARE) / (1 - USUAL_SHARE))
_ENOUGH, _STEP = math.log(MIN_ODDS), math.log(MAX_STEP)
_MOST = 10 * _ENOUGH
"""After a long time of losses, a link that has healed is not held against its part for as long."""


@dataclass(frozen=True, slots=True)
class Lossy:
    """A part of the ring, which may be the origin itself, and the share of the packets that it loses."""

    part: Part
    share: float


@dataclass(slots=True)
class Evidence:
    """Of a part, or of one way in one direction, that it loses packets.

    ``odds`` is the logarithm of how much likelier a bad part is than a usual one, with every step; while it is above
    zero, ``all_odds`` has them with steps as large as they were, and the counts are added up.

    From ``since`` on, for COUNT_S, ``odds`` may grow up to ``most``.
    """

    odds: float = 0.0
    all_odds: float = 0.0
    num_sent: int = 0
    num_lost: int = 0
    since: float = -math.inf
    most: float = 0.0

    def add(self, num_sent: int, num_lost: int, now: float) -> None:
        if now - self.since >= COUNT_S:
            self.since, self.most = now, min(self.odds + _STEP, _MOST)
        change = num_lost * _FOR_A_LOSS + (num_sent - num_lost) * _FOR_AN_ARRIVAL
        self.odds = min(self.odds + change, self.most)
        if self.odds <= 0:
            self.odds, self.all_odds, self.num_sent, self.num_lost = 0.0, 0.0, 0, 0
            return
        self.all_odds += change
        self.num_sent += num_sent
        self.num_lost += num_lost

    @property
    def is_enough(self) -> bool:
        """Whether the part is to be named."""
        return self.odds >= _ENOUGH

    @property
    def num_to_refute(self) -> int:
        """How many packets would have to arrive, one after another, until nothing speaks against the part any more."""
        return math.ceil(self.odds / -_FOR_AN_ARRIVAL)


@dataclass(slots=True)
class PacketLoss:
    """What is known of the ways of one ring. ``origin`` is the name of the origin's own node."""

    origin: str
    _evidence: dict[Part, Evidence] = field(default_factory=dict)
    _named: set[Part] = field(default_factory=set)

    def count(self, near: str, far: str, num_sent: int, num_lost: int, now: float) -> Lossy | None:
        """A node has sent so many packets to another one, of which so many were lost. Returns the part that loses them,
        once, as soon as there is enough evidence.
        """
        if near == far or not num_sent:
            return None
        parts: tuple[Part, ...] = (way_between(near, far), near, far)
        for part in parts:
            evidence = self._evidence.setdefault(part, Evidence())
            evidence.add(num_sent, min(num_lost, num_sent), now)
            if not evidence.odds:
                self._named.discard(part)
        if not any(self._evidence[part].is_enough for part in parts):
            return None
        part = max(self._evidence, key=self._likelihood)
        if part in self._named:
            return None
        self._named.add(part)
        likeliest = self._evidence[part]
        return Lossy(part, likeliest.num_lost / likeliest.num_sent)

    def check(self) -> None:
        """Assert that only parts that evidence speaks against are named."""
        assert all(self._evidence[part].odds > 0 for part in self._named)

    def _likelihood(self, part: Part) -> tuple[float, bool, int]:
        """Where only one way of a node is used, both have the same evidence; and no ring can go around the origin."""
        preference = 0 if part == self.origin else 2 if isinstance(part, str) else 1
        return self._evidence[part].all_odds, part in self._named, preference


def slowed(plan: Plan, lossy: Lossy, origin: str) -> float:
    """The tokens/s that the ring of a plan brings while a part of it loses packets: each of its chunks waits there.

    ``origin`` is the name of the origin's own node, which may have another one in plans.
    """
    share = min(lossy.share, MAX_SHARE)
    wait_ms = REPEAT_MS * share / (1 - 2 * share)  # the sum of share^n * 2^(n - 1) over n = 1, 2, ...
    nodes = [origin, *(stage.node for stage in plan.stages), origin]
    num_hops = sum(lossy.part in (start, end, way_between(start, end)) for start, end in itertools.pairwise(nodes))
    return plan.tokens_per_s * plan.trip_ms / (plan.trip_ms + num_hops * wait_ms)
