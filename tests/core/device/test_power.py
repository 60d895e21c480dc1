"""Energy from samples that come now and then, and from counters that begin anew."""

import pytest

from flowspec_edge.core.device.power import MAX_GAP_S, MAX_WATTS, Counted, EnergyMeter, Rail, Watts


def metered(*samples: tuple[float, list[Rail]]) -> EnergyMeter:
    meter = EnergyMeter()
    for now, rails in samples:
        meter.add(rails, now)
    return meter


def test_samples_are_taken_for_straight_lines_between_them() -> None:
    meter = metered((10, [Watts(4)]), (12, [Watts(8)]), (13, [Watts(8)]))
    assert (meter.joules, meter.watts) == (12 + 8, 8)


def test_before_the_first_sample_nothing_is_known_and_nothing_is_no_zero() -> None:
    assert (metered().joules, metered().watts) == (None, None)
    assert (metered((1, [])).joules, metered((1, [])).watts) == (None, None)
    first = metered((1, [Watts(5)]))
    assert (first.joules, first.watts) == (0, 5)
    counter = metered((1, [Counted(900, 1000)]))
    assert (counter.joules, counter.watts) == (0, None)


def test_a_counter_that_begins_anew_is_followed() -> None:
    meter = metered((0, [Counted(990, 1000)]), (2, [Counted(5, 1000)]))
    assert (meter.joules, meter.watts) == (15, 7.5)


@pytest.mark.parametrize("range_j", [0.0, 1e6], ids=["of unknown range", "set back"])
def test_a_counter_that_was_set_back_tells_nothing_of_that_interval(range_j: float) -> None:
    meter = metered((0, [Counted(500, range_j)]), (1, [Counted(3, range_j)]), (2, [Counted(9, range_j)]))
    assert (meter.joules, meter.watts) == (6, 6)
    assert MAX_WATTS < 1e6 - 497


def test_rails_are_added_up_and_a_part_of_them_is_no_whole() -> None:
    both: list[Rail] = [Watts(3), Watts(2)]
    meter = metered((0, both), (1, both), (2, []), (3, both), (4, both))
    assert (meter.joules, meter.watts) == (10, 5), "nothing is known of the time around the gap"
    assert metered((0, both), (1, [])).watts is None
    mixed = metered((0, [Watts(3), Counted(0, 9)]), (2, [Watts(5), Counted(4, 9)]))
    assert (mixed.joules, mixed.watts) == (8 + 4, 5 + 2)


def test_a_board_that_slept_is_not_taken_for_one_that_worked() -> None:
    meter = metered((0, [Watts(5)]), (MAX_GAP_S + 1, [Watts(5)]), (MAX_GAP_S + 2, [Watts(5)]))
    assert (meter.joules, meter.watts) == (5, 5)
