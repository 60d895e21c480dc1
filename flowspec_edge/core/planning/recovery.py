"""What becomes of a text whose ring was lost: it goes on over another ring, waits for boards, or ends."""

from __future__ import annotations

from dataclasses import dataclass

MAX_LOSSES = 6
"""How many rings in a row a text may lose without a new token. A ring of five that loses node after node loses four."""
RETRY_S = 1.0
"""How often to look whether a ring can be opened while a text waits: memory becomes free without a sign."""

# --------------------------------------------------------------------- events


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

    ``had_room`` says whether there has been a ring before, or a board was lost while the first one opened. Where
    neither is so, nothing was lost that may come back.
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
