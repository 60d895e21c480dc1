"""Packets that flow over the ways of a ring and are lost at random; the ends of links count and probe as nodes do."""

import random
from collections.abc import Callable, Iterator, Mapping

from flowspec_edge.core.planning.losses import Part, way_between
from flowspec_edge.core.planning.packet_loss import COUNT_S, Lossy, PacketLoss
from flowspec_edge.core.planning.probing import Probing

PACKETS_PER_S = {
    **{(f"desk->{node}"): 80 for node in ("attic", "hall", "cellar")},  # what the origin says to each stage
    **{"desk->attic, chunks": 100, "attic->hall": 240, "hall->cellar": 220, "cellar->desk": 210},
    **{"attic->desk": 100, "hall->attic": 75, "cellar->hall": 80},  # credits
}
"""Of three texts of the demo model over three nodes, as counted there (x86, two cores)."""
_FORWARDS = {"attic->desk": "desk->attic, chunks", "hall->attic": "attic->hall", "cellar->hall": "hall->cellar"}
_OTHER_END = _FORWARDS | {forwards: backwards for backwards, forwards in _FORWARDS.items()}
"""Both ends of a link to a neighbour count; of the links to stages, the origin alone."""

EVERY_S = COUNT_S + 2**-10  # timers are late by a little, and never early

Loss = Callable[[str, str], float]
"""The share of the packets that is lost on the way from one node to another."""


class PacketFlow:
    """Counts of a ring from the beginning on, ``busy`` times as many packets as usual besides the probes."""

    def __init__(self, loss: Loss, seed: int, busy: float = 1.0, per_s: Mapping[str, int] = PACKETS_PER_S) -> None:
        self._loss, self._rng = loss, random.Random(seed)
        self._per_s = {way: rate * busy for way, rate in per_s.items()}
        self._core = PacketLoss("desk")
        self._probings = {way: Probing() for way in per_s}
        self._to_send = dict.fromkeys(per_s, 0)
        self.num_probes = 0

    def name_lossy(self, for_s: float) -> Iterator[tuple[float, Lossy]]:
        """What is found, and after how many seconds."""
        for step in range(round(for_s / EVERY_S)):
            for found in self._count(step * EVERY_S):
                yield (step + 1) * EVERY_S, found
            self._core.check()

    def _count(self, now: float) -> Iterator[Lossy]:
        probes, self._to_send = self._to_send, {}
        self.num_probes += sum(probes.values())
        for way, rate in self._per_s.items():
            near, far = way.removesuffix(", chunks").split("->")
            num_sent = round(rate * EVERY_S * self._rng.uniform(0.5, 1.5))
            num_sent += probes[way] + probes.get(_OTHER_END.get(way, ""), 0)  # and answers to the other end's
            share = self._loss(near, far)
            num_lost = sum(self._rng.random() < share for _ in range(num_sent)) if share else 0
            self._to_send[way] = self._probings[way].count(num_sent, num_lost, now)
            if (found := self._core.count(near, far, num_sent, num_lost, now)) is not None:
                yield found


def of_node(node: str, share: float) -> Loss:
    return lambda near, far: share if node in (near, far) else 0.0


def of_way(way: Part, share: float) -> Loss:
    return lambda near, far: share if way_between(near, far) == way else 0.0
