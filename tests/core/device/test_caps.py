"""A board with a cap stays under it, settles, and is as quick as before once it is cool."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest

from flowspec_edge.core.device.caps import (
    MAX_DEBT_S,
    MIN_DUTY,
    MIN_REST_S,
    Caps,
    DutyControl,
    RestDebt,
)
from flowspec_edge.core.device.throttling import COOLED_S

IDLE_W, FULL_W = 3.0, 8.0
STEP_S = 0.25


@dataclass
class Board:
    """A die on a case, each of which has a resistance (degrees per watt) and a time constant."""

    die: tuple[float, float]
    case: tuple[float, float]
    room_c: float = 30.0

    def __post_init__(self) -> None:
        self.flows = [IDLE_W, IDLE_W]

    def run(self, watts: float, seconds: float) -> None:
        for number, (_, constant_s) in enumerate((self.die, self.case)):
            for _ in range(4):
                self.flows[number] += (watts - self.flows[number]) * seconds / 4 / constant_s

    @property
    def temperature_c(self) -> float:
        return self.room_c + self.die[0] * self.flows[0] + self.case[0] * self.flows[1]

    @property
    def shown_c(self) -> float:
        """As thermal zones show it, in steps of half a degree."""
        return round(self.temperature_c * 2) / 2

    @property
    def full_c(self) -> float:
        return self.room_c + FULL_W * (self.die[0] + self.case[0])


def watts_of(duty: float) -> float:
    return IDLE_W + duty * (FULL_W - IDLE_W)


BOARDS = [
    ((2, 4), (4, 300)),  # a Raspberry Pi 5 without a fan
    ((5, 1), (1, 60)),  # small, with a fan
    ((0.5, 10), (6, 600)),  # a large case
    ((6, 0.5), (2, 100)),
]


@pytest.mark.parametrize(("die", "case"), BOARDS)
def test_a_board_stays_under_its_temperature_settles_and_recovers(
    die: tuple[float, float], case: tuple[float, float]
) -> None:
    board = Board(die, case)
    cap_c = board.full_c - 12
    control = DutyControl(Caps(max_temperature_c=cap_c))
    temperatures, duties, now = [], [], 0.0
    while now < 3 * case[1]:
        board.run(watts_of(control.duty), STEP_S)
        now += STEP_S
        control.take(now, temperature_c=board.shown_c, is_busy=True)
        temperatures.append(board.temperature_c)
        duties.append(control.duty)
    assert max(temperatures) <= cap_c + 1
    settled = len(duties) // 2
    assert min(temperatures[settled:]) >= cap_c - 2.5, "no slower than it must be"
    assert max(duties[settled:]) - min(duties[settled:]) < 0.3
    turns = sum((b - a) * (c - b) < -1e-3 for (a, b), (_, c) in pairwise(pairwise(duties[settled:])))
    assert turns < 20, "it does not swing"
    slowdown = control.slowdown(now)
    assert slowdown == pytest.approx(1 / control.duty, rel=0.2)
    for _ in range(round(COOLED_S / 2 / STEP_S)):
        board.run(IDLE_W, STEP_S)
        now += STEP_S
        control.take(now, temperature_c=board.shown_c, is_busy=False)
    assert control.slowdown(now) == slowdown, "it would be as hot again"
    assert control.slowdown(now + COOLED_S) == 1
    board.room_c -= 25  # a window is opened
    for _ in range(round(3 * case[1] / STEP_S)):
        board.run(watts_of(control.duty), STEP_S)
        now += STEP_S
        control.take(now, temperature_c=board.shown_c, is_busy=True)
    assert control.duty == control.slowdown(now) == 1


@pytest.mark.parametrize("cap_w", [4.0, 5.5, 7.0])
def test_a_board_stays_under_its_watts_though_its_sensor_sees_bursts(cap_w: float) -> None:
    """A sensor shows what is taken at the moment: all, while a layer runs, or what an idle board takes."""
    control, chance = DutyControl(Caps(max_watts=cap_w)), random.Random(5)
    taken, num_steps = [], 2000
    for number in range(num_steps):
        control.take(number * STEP_S, watts=FULL_W if chance.random() < control.duty else IDLE_W, is_busy=True)
        taken.append(watts_of(control.duty))
    mean = sum(taken[200:]) / len(taken[200:])
    assert cap_w * 0.85 < mean <= cap_w
    halves = [sum(taken[at : at + 120]) / 120 for at in range(200, num_steps - 120, 40)]
    assert max(halves) <= cap_w * 1.1, "half a minute at a time"


def test_a_counters_watts_are_kept_to_the_per_cent() -> None:
    control = DutyControl(Caps(max_watts=5.0))
    for number in range(200):
        control.take(number * STEP_S, watts=watts_of(control.duty), is_busy=True)
    assert watts_of(control.duty) == pytest.approx(4.85, abs=0.01)
    before = control.duty
    for number in range(200, 400):
        control.take(number * STEP_S, watts=IDLE_W, is_busy=False)
    assert control.duty == before, "an idle board's watts say nothing about those of a busy one"
    for number in range(400, 800):
        control.take(number * STEP_S, watts=watts_of(control.duty) / 2, is_busy=True)
    assert control.duty == 1, "a smaller model takes less"


def test_both_caps_are_kept_and_what_cannot_be_is_as_slow_as_can_be() -> None:
    control = DutyControl(Caps(max_watts=6.0, max_temperature_c=60.0))
    for number in range(2000):
        control.take(number * STEP_S, watts=watts_of(control.duty), is_busy=True)
        control.take(number * STEP_S, temperature_c=90.0, is_busy=True)
    assert control.duty == MIN_DUTY
    assert DutyControl(Caps(max_temperature_c=60.0)).duty == 1, "nothing has been shown yet"


def test_a_sensor_that_is_gone_changes_nothing_and_what_follows_does_not_jump() -> None:
    control = DutyControl(Caps(max_temperature_c=70.0))
    for number in range(100):
        control.take(number * STEP_S, temperature_c=69.0 + number / 50, is_busy=True)
    before = control.duty
    assert before < 1
    control.take(1000.0, temperature_c=70.9, is_busy=True)
    assert control.duty == pytest.approx(before, abs=0.1)


def test_without_caps_a_board_is_at_its_full_pace() -> None:
    control = DutyControl(Caps())
    control.take(1.0, temperature_c=200.0, is_busy=True)
    control.take(1.0, watts=200.0, is_busy=True)
    assert (control.duty, control.slowdown(1.0), bool(control.caps)) == (1, 1, False)
    assert str(Caps(9.5, 70.0)) == "9.5 W and 70 degrees C"


def test_rest_is_owed_for_what_was_computed_and_idle_time_counts() -> None:
    debt = RestDebt()
    debt.add(0.1, 0.25, now=10.0)
    assert debt.left_s(10.0) == pytest.approx(0.3)
    assert debt.left_s(10.1) == pytest.approx(0.2)
    debt.add(0.1, 0.5, now=10.2)
    assert debt.left_s(10.2) == pytest.approx(0.3), "what was computed was no rest"
    assert debt.left_s(99.0) == 0


def test_rests_too_short_to_take_are_added_up() -> None:
    debt, now, rested = RestDebt(), 0.0, 0
    for _ in range(10):
        now += 0.0005
        debt.add(0.0005, 0.5, now)
        if left_s := debt.left_s(now):
            assert left_s >= MIN_REST_S
            rested += 1
            now += left_s
    assert 4 <= rested <= 6


def test_what_is_owed_has_a_bound() -> None:
    debt = RestDebt()
    debt.add(1000.0, MIN_DUTY, 0.0)
    assert debt.left_s(0.0) == MAX_DEBT_S
