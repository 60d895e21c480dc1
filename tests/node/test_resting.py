"""A stage rests before its blocks, for as long as its duty asks, and never while nobody wants its rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from flowspec_edge.core import events as ev
from flowspec_edge.core.device.caps import MAX_REST_S
from flowspec_edge.node import resting
from flowspec_edge.node.resting import NAP_S, RestingRunner
from tests.node.test_stage_host import HIDDEN, MOVES, FakeRunner, forward_of

BLOCK_S = 0.1


class Clock:
    """Time that passes as somebody sleeps or computes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(resting, "time", found)
    return found


class Blocks(FakeRunner):
    """Each block takes BLOCK_S, and before each it asks whether it may go on."""

    def __init__(self, clock: Clock, num_blocks: int = 4) -> None:
        super().__init__()
        self._clock, self._num_blocks = clock, num_blocks

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished:
        for _ in range(self._num_blocks):
            if is_cancelled():
                break
            self._clock.now += BLOCK_S
        return ev.ForwardFinished(HIDDEN + 1)


def never() -> bool:
    return False


def test_it_computes_for_the_share_of_its_time_that_it_may(clock: Clock) -> None:
    runner, began = RestingRunner(Blocks(clock), lambda: 0.25), clock.now
    rested_s = 0.0
    for _ in range(10):
        finished = runner.run(forward_of(1), never)
        rested_s += runner.rested_s
    assert (finished.hidden == HIDDEN + 1).all()
    computed_s = 40 * BLOCK_S
    assert clock.now - began == pytest.approx(computed_s + rested_s)
    assert rested_s == pytest.approx(3 * computed_s, rel=0.1)
    assert max(clock.slept) <= NAP_S


def test_the_rows_of_a_forward_do_not_wait_for_the_rest_behind_it_and_idle_time_is_rest(clock: Clock) -> None:
    runner = RestingRunner(Blocks(clock, 1), lambda: 0.2)
    runner.run(forward_of(1), never)
    assert clock.slept == []
    clock.now += 0.3
    runner.run(forward_of(1), never)
    assert runner.rested_s == pytest.approx(0.1)


def test_at_its_full_pace_it_never_sleeps(clock: Clock) -> None:
    runner = RestingRunner(Blocks(clock), lambda: 1.0)
    for _ in range(5):
        runner.run(forward_of(1), never)
    assert clock.slept == [] and runner.rested_s == 0


def test_a_rest_ends_at_once_where_the_forward_is_given_up(clock: Clock) -> None:
    runner, began = RestingRunner(Blocks(clock), lambda: 0.05), clock.now
    runner.run(forward_of(1), lambda: clock.now > began + 0.5)
    assert clock.now <= began + 0.5 + NAP_S + 1e-9


def test_no_forward_rests_for_longer_than_a_ring_can_wait(clock: Clock) -> None:
    runner = RestingRunner(Blocks(clock, 20), lambda: 0.05)
    for _ in range(2):
        runner.run(forward_of(1), never)
        assert runner.rested_s == pytest.approx(MAX_REST_S, abs=NAP_S)


def test_caches_are_the_runners_own(clock: Clock) -> None:
    inner = FakeRunner()
    runner = RestingRunner(inner, lambda: 0.5)
    runner.open_cache(1, 100)
    runner.keep_cache(1, MOVES)
    assert runner.take_over_cache(2, 1)
    runner.free_cache(2)
    assert inner.done == [("open", 1, 100), ("keep", 1, MOVES), ("take over", 2, 1), ("free", 2)]
