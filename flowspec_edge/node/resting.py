"""A stage that rests between its blocks, so that its board stays under its caps.

It rests where a forward asks whether it is given up, before each block: what has been computed leaves without delay,
and time in which there is nothing to do counts as rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flowspec_edge.core import events as ev
from flowspec_edge.core.device.caps import MAX_REST_S, RestDebt
from flowspec_edge.core.rows import SlotMove
from flowspec_edge.node.pacing import Runner

NAP_S = 0.02
"""How long a rest lasts before it is asked again whether the forward is given up: a stage that ends does not wait."""


class RestingRunner:
    """A stage's runner that computes for ``duty()`` of its time, on one thread."""

    def __init__(self, runner: Runner, duty: Callable[[], float]) -> None:
        self._runner, self._duty = runner, duty
        self._debt = RestDebt()
        self.rested_s = 0.0
        """How long it has rested in the last forward."""

    def open_cache(self, session: int, capacity: int) -> None:
        self._runner.open_cache(session, capacity)

    def free_cache(self, session: int) -> None:
        self._runner.free_cache(session)

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None:
        self._runner.keep_cache(session, moves)

    def take_over_cache(self, session: int, kept: int) -> bool:
        return self._runner.take_over_cache(session, kept)

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished:
        self.rested_s = 0.0
        since = time.monotonic()

        def rest() -> bool:
            nonlocal since
            self._owe_since(since)
            self._rest(is_cancelled)
            since = time.monotonic()
            return is_cancelled()

        try:
            return self._runner.run(forward, rest)
        finally:
            self._owe_since(since)

    def _owe_since(self, began: float) -> None:
        now = time.monotonic()
        self._debt.add(now - began, self._duty(), now)

    def _rest(self, is_cancelled: Callable[[], bool]) -> None:
        began = time.monotonic()
        until = began + MAX_REST_S - self.rested_s
        while (now := time.monotonic()) < until and (left_s := self._debt.left_s(now)) and not is_cancelled():
            time.sleep(min(left_s, NAP_S))
        self.rested_s += time.monotonic() - began
