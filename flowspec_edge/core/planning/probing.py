"""Decides when one end of a link sends probes: small packets whose only use is that they are counted.

Where little is sent, losses are told late (``packet_loss.py``), so a first loss brings packets: as many as would refute
the suspicion if none of them were lost. What is lost of them raises the suspicion, and with it the number of the next
ones. A link that loses nothing is never probed, one that loses little is cleared by a few probes, and one that loses
much is told as soon as its packets can tell it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flowspec_edge.core.planning.packet_loss import COUNT_S, Evidence

PROBE_EVERY_S = 0.002
"""How long after a probe the next one leaves. Packets that leave together are lost together, and a small congestion
window makes one out of them. With its answer a probe takes some 200 bytes and 0.1 ms of each end's processor."""
MAX_AT_ONCE = int(COUNT_S / PROBE_EVERY_S)
"""Probes from one count to the next."""
MAX_PROBES = 500
"""Probes of one end that has sent none for a while: both ends of two links tell 5 % with half of that."""
PROBES_PER_S = 50
"""Probes of one end in the long run, as of a link that goes on losing 3 %, which is neither good nor bad: 10 KB/s. In a
ring of three boards that loses 1 % of its packets on all ways of one of them, an end sends 10 per second."""


@dataclass(slots=True)
class Probing:
    """What one end of a link knows of its own packets."""

    _evidence: Evidence = field(default_factory=Evidence)
    _num_left: float = MAX_PROBES
    _counted_at: float = -math.inf

    def count(self, num_sent: int, num_lost: int, now: float) -> int:
        """So many packets were sent since the last count, probes among them, of which so many were lost. Returns how
        many probes to send until the next count.
        """
        self._evidence.add(num_sent, min(num_lost, num_sent), now)
        self._num_left = min(self._num_left + PROBES_PER_S * (now - self._counted_at), MAX_PROBES)
        self._counted_at = now
        if self._evidence.is_enough:
            return 0
        num_probes = min(self._evidence.num_to_refute, MAX_AT_ONCE, int(self._num_left))
        self._num_left -= num_probes
        return num_probes
