"""A board that is slower than its curve for half a minute is re-weighted; a hiccup is not."""

import pytest

from flowspec_edge.core.device.throttling import (
    COOLED_S,
    MAX_SLOWDOWN,
    QUICK_FORWARDS,
    SLOW_S,
    StepWatch,
    ThermalReport,
)


def run(watch: StepWatch, factor: float, start: float, stop: float, step: float = 1.0) -> None:
    while start < stop:
        watch.observe(50.0, 50.0 * factor, start)
        start += step


def test_slow_for_half_a_minute_counts_and_not_before() -> None:
    watch = StepWatch()
    run(watch, 1.0, 0, 20)
    assert watch.slowdown(20.0) == 1.0
    run(watch, 2.0, 20, 45)
    assert watch.slowdown(45.0) == 1.0
    run(watch, 2.0, 45, 120)
    assert watch.slowdown(120.0) == pytest.approx(2.0, rel=0.05)


def test_a_hiccup_and_a_board_that_has_cooled_down_do_not_count() -> None:
    watch = StepWatch()
    run(watch, 1.0, 0, 20)
    watch.observe(50.0, 400.0, 20.0)
    run(watch, 1.0, 21, 70)
    assert watch.slowdown(70.0) == 1.0
    run(watch, 3.0, 70, 170)
    assert watch.slowdown(170.0) > 2.5
    run(watch, 1.0, 170, 250)
    assert watch.slowdown(250.0) == 1.0


def test_the_limit_lies_where_it_is_said_to() -> None:
    watch = StepWatch()
    run(watch, 1.14, 0, 200)
    assert watch.slowdown(200.0) == 1.0
    watch = StepWatch()
    run(watch, 1.3, 0, SLOW_S, 0.5)
    assert watch.slowdown(SLOW_S) == 1.0
    watch.observe(50.0, 65.0, SLOW_S)
    assert watch.slowdown(SLOW_S) == pytest.approx(1.3)


def test_time_without_forwards_makes_no_board_slow() -> None:
    watch = StepWatch()
    run(watch, 2.0, 0, 10)
    assert watch.slowdown(10.0 + 2 * SLOW_S) == 1.0


def test_a_slow_board_that_is_left_out_gets_another_chance() -> None:
    watch = StepWatch()
    run(watch, 2.0, 0, 61)
    assert watch.slowdown(60.0 + COOLED_S) == pytest.approx(2.0)
    assert watch.slowdown(61.0 + COOLED_S) == 1.0


def test_a_board_that_was_measured_while_it_was_busy_is_quick() -> None:
    watch = StepWatch()
    run(watch, 0.4, 0, QUICK_FORWARDS - 1)
    assert watch.quick_share is None
    run(watch, 0.4, QUICK_FORWARDS - 1, QUICK_FORWARDS)
    assert watch.quick_share == pytest.approx(0.4)
    assert watch.slowdown(60.0) == 1.0
    run(watch, 2.0, 100, 105)
    assert watch.quick_share is None, "not in a row"
    watch = StepWatch()
    run(watch, 0.8, 0, 200)
    assert watch.quick_share is None, "a short text"


def test_a_boards_own_report_counts_at_once() -> None:
    watch = StepWatch()
    assert watch.slowdown(0.0, ThermalReport(85.0, 85.0, clock_share=0.5)) == 2.0
    assert watch.slowdown(0.0, ThermalReport(60.0, 85.0, clock_share=0.25)) == 1.0, "idle, not hot"
    assert watch.slowdown(0.0, ThermalReport(99.0, 85.0, clock_share=0.0)) == MAX_SLOWDOWN


def test_of_a_hot_board_the_forwards_count_at_once() -> None:
    """Firmware may take the clock down without telling."""
    watch = StepWatch()
    run(watch, 1.8, 0, 5)
    assert watch.slowdown(5.0, ThermalReport(60.0, 80.0)) == 1.0
    assert watch.slowdown(5.0, ThermalReport(81.0, 80.0)) == pytest.approx(1.8)
    assert watch.slowdown(5.0, ThermalReport(81.0, 80.0, clock_share=0.5)) == 2.0
