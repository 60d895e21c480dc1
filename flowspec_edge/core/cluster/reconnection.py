"""Which server to ask next for the rest of a text, and when, where the one that wrote it is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

FIRST_S, MOST_S = 0.25, 4.0
"""How long to wait when every server has been asked once, and at most; it doubles from one round to the next. A server
that is started anew answers after some three seconds, on a Raspberry Pi after ten."""


@dataclass(frozen=True, slots=True)
class PieceCame:
    """The server that was asked writes."""


@dataclass(frozen=True, slots=True)
class ServerLost:
    """The server that was asked does not go on at present; it may say after how long to ask again."""

    reason: str
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServerRefused:
    """The server that was asked will never go on with this text."""

    reason: str


@dataclass(frozen=True, slots=True)
class NothingCame:
    """Nothing came from the server that was asked, until the time for it was over."""


ReconnectionEvent = PieceCame | ServerLost | ServerRefused | NothingCame


@dataclass(frozen=True, slots=True)
class AskServer:
    """Ask this server for the rest, at that time, and until then. It is answered by any of the events."""

    server: int
    at: float
    until: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """No server goes on with the text; the reasons are what each server that was asked said last."""

    reasons: Mapping[int, str]


ReconnectionAction = AskServer | GiveUp


@dataclass(slots=True)
class Reconnection:
    """The decisions for one text, which may stand still for ``within_s``.

    ``num_servers`` servers have the numbers from 0; ``server`` was asked first. Of them the next one is asked at once,
    and when all were asked in vain, after a while that is spread by ``chance``, a number from 0 to 1, so that many
    clients do not come back in one moment.
    """

    num_servers: int
    within_s: float
    chance: Callable[[], float]
    server: int = 0
    _lost_at: float | None = None  # when the text came to stand still
    _num_asked: int = 0  # since then
    _reasons: dict[int, str] = field(default_factory=dict)
    _refused: set[int] = field(default_factory=set)
    _not_before: dict[int, float] = field(default_factory=dict)

    def handle(self, event: ReconnectionEvent, now: float) -> list[ReconnectionAction]:
        match event:
            case PieceCame():
                self._lost_at, self._num_asked = None, 0
                return []
            case ServerRefused(reason):
                self._refused.add(self.server)
                self._reasons[self.server] = reason
            case ServerLost(reason, retry_after_s):
                self._not_before[self.server] = now + retry_after_s
                self._reasons[self.server] = reason
            case NothingCame():
                self._reasons.setdefault(self.server, "it wrote nothing in time")
        if self._lost_at is None:
            self._lost_at = now
        return [self._next(now, self._lost_at + self.within_s)]

    def check(self) -> None:
        """Assert that a text that goes on has not been counted as lost."""
        assert self._lost_at is not None or not self._num_asked

    def _next(self, now: float, deadline: float) -> ReconnectionAction:
        left = [server for server in range(self.num_servers) if server not in self._refused]
        if not left:
            return GiveUp(dict(self._reasons))
        self._num_asked += 1
        num_rounds, within = divmod(self._num_asked, len(left))
        wait_s = 0.0
        if not within:
            wait_s = min(FIRST_S * 2 ** (num_rounds - 1), MOST_S) * (1 + self.chance()) / 2
        self.server = next((server for server in left if server > self.server), left[0])
        at = max(now + wait_s, self._not_before.get(self.server, now))
        return AskServer(self.server, at, deadline) if at < deadline else GiveUp(dict(self._reasons))
