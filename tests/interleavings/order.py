"""What happens next, where anything may: messages wait on lanes, and each lane keeps its order."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Hashable

Callback = Callable[[], None]
DROP, REPEAT, REPEAT_LATER, SWAP = "drop", "repeat", "repeat later", "swap"


class Order:
    """Takes what is due from any lane, as ``rng`` chooses. Time passes in steps of at most ``pace_s``, or leaps where
    nothing is due.

    Where it ``is_strict``, the lane of the highest rank is emptied before any other moves, and ranks change now and
    then. So one lane may overtake all others by far, which hardly happens where each step chooses anew.
    """

    def __init__(self, rng: random.Random, *, pace_s: float, is_strict: bool) -> None:
        self.now_s = 0.0
        self.played: Counter[str] = Counter()
        """What was done to single messages."""
        self._rng, self._paces, self._is_strict = rng, (0.0, 0.0, pace_s / 10, pace_s), is_strict
        self._lanes: dict[Hashable, deque[Callback]] = {}
        self._later: list[tuple[float, int, Callback]] = []
        self._numbers = itertools.count()
        self._held: dict[Hashable, float] = {}
        self._ranks: dict[Hashable, float] = {}
        self._tricks: dict[Hashable, str] = {}
        self._kept: dict[Hashable, tuple[str, int, Callback]] = {}

    def after(self, delay_ms: float, lane: Hashable | None, callback: Callback) -> None:
        """Call back in ``delay_ms``, which only what has no lane may ask for; on a lane behind what waits there."""
        if delay_ms > 0:
            assert lane is None, "delays on a lane are made by hold()"
            heapq.heappush(self._later, (self.now_s + delay_ms / 1000, next(self._numbers), callback))
            return
        waiting = self._lanes.setdefault(next(self._numbers) if lane is None else lane, deque())
        match self._tricks.pop(lane, None) if lane is not None else None:
            case "drop":
                self.played[DROP] += 1
            case "repeat":
                self.played[REPEAT] += 1
                waiting += (callback, callback)
            case "repeat later":
                waiting.append(callback)
                self._kept[lane] = REPEAT_LATER, 2, callback
            case "swap":
                self._kept[lane] = SWAP, 1, callback
            case _:
                waiting.append(callback)
                if lane in self._kept:
                    self._let_pass(lane, waiting)
        if not waiting:
            del self._lanes[lane]

    def after_all(self, lane: Hashable, callback: Callback) -> None:
        """The last thing on a lane, with which nobody meddles."""
        self._tricks.pop(lane, None)
        self._lanes.setdefault(lane, deque()).append(callback)

    def meddle(self, lane: Hashable, trick: str) -> None:
        """What becomes of the next message on the lane: ``DROP``, ``REPEAT`` it at once or behind the two after it
        (``REPEAT_LATER``), or ``SWAP`` it with the one after it.
        """
        self._tricks[lane] = trick

    def hold(self, lane: Hashable, until_s: float) -> None:
        """Nothing moves on the lane until then."""
        self._held[lane] = max(until_s, self._held.get(lane, 0.0))

    def clear(self, lane: Hashable) -> None:
        """What waits on the lane is lost."""
        self._lanes.pop(lane, None)

    def step(self) -> bool:
        """Let one thing happen; False where nothing is left to happen."""
        while self._later and self._later[0][0] <= self.now_s:
            self._lanes[next(self._numbers)] = deque([heapq.heappop(self._later)[2]])
        due = [lane for lane in self._lanes if self._held.get(lane, 0.0) <= self.now_s]
        if not due:
            times = [self._held[lane] for lane in self._lanes] + [at for at, _, _ in self._later[:1]]
            if not times:
                return False
            self.now_s = min(times)
            return self.step()
        lane = min(due, key=self._rank) if self._is_strict else self._rng.choice(due)
        waiting = self._lanes[lane]
        callback = waiting.popleft()
        if not waiting:
            del self._lanes[lane]
        self.now_s += self._rng.choice(self._paces)
        callback()
        return True

    def _let_pass(self, lane: Hashable, waiting: deque[Callback]) -> None:
        """A message was put on a lane of which one is kept back until so many have passed."""
        trick, num_left, kept = self._kept.pop(lane)
        if num_left > 1:
            self._kept[lane] = trick, num_left - 1, kept
        else:
            self.played[trick] += 1
            waiting.append(kept)

    def _rank(self, lane: Hashable) -> float:
        if lane not in self._ranks or self._rng.random() < 0.01:
            self._ranks[lane] = self._rng.random()
        return self._ranks[lane]
