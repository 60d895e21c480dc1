"""What boards take belongs to the texts that are written meanwhile, and no joule is counted twice or lost."""

import random

import pytest

from flowspec_edge.core.device.energy_shares import SILENT_S, EnergyShares


def test_one_text_has_what_all_boards_took_from_its_beginning_to_its_end() -> None:
    shares = EnergyShares(["pi", "hall"])
    for now in (0.0, 0.5, 1.0):
        shares.take("pi", "m1", 5 * now, 5.0, now)
        shares.take("hall", "m2", 100 + 2 * now, 2.0, now)
    text = shares.begin(1, 1.0)
    for now in (1.5, 2.0, 2.5):
        shares.take("pi", "m1", 5 * now, 5.0, now)
        shares.take("hall", "m2", 100 + 2 * now, 2.0, now)
    shares.end(1, 2.75)
    assert text.joules == pytest.approx(7 * 1.75), "up to its end, which no board has told of yet"
    assert (text.telling, text.silent) == ({"pi", "hall"}, set())
    shares.take("pi", "m1", 500.0, 5.0, 3.0)
    assert text.joules == pytest.approx(7 * 1.75)


def test_texts_at_the_same_time_share_and_nothing_is_lost() -> None:
    shares = EnergyShares(["pi"])
    shares.take("pi", "m", 0, 6, 0.0)
    first = shares.begin(1, 0.0)
    shares.take("pi", "m", 6, 6, 1.0)
    second = shares.begin(2, 1.0)
    shares.take("pi", "m", 12, 6, 2.0)
    shares.end(1, 2.0)
    shares.take("pi", "m", 18, 6, 3.0)
    shares.end(2, 3.0)
    assert first.joules == pytest.approx(9) and second.joules == pytest.approx(9)


def test_all_texts_together_have_what_was_told_whatever_comes_when() -> None:
    chance, shares = random.Random(3), EnergyShares(["pi"])
    joules, now, texts, open_texts = 0.0, 0.0, [shares.begin(0, 0.0)], [0]
    shares.take("pi", "m", joules, 4.0, now)
    for number in range(1, 300):
        step = chance.random()
        watts = chance.uniform(2, 9)
        now, joules = now + step, joules + step * watts
        match chance.randrange(3):
            case 0:
                texts.append(shares.begin(number, now))
                open_texts.append(number)
            case 1 if len(open_texts) > 1:
                shares.end(open_texts.pop(chance.randrange(len(open_texts))), now)
        shares.take("pi", "m", joules, watts, now)
    assert sum(text.joules for text in texts) == pytest.approx(joules)


def test_who_does_not_tell_is_named_and_nothing_is_nothing() -> None:
    shares = EnergyShares(["pi", "hall"])
    text = shares.begin(1, 0.0)
    assert (text.joules, text.telling, text.silent) == (0, set(), {"pi", "hall"})
    shares.take("pi", "m", 9, 5, 1.0)
    shares.take("pi", "m", 14, 5, 2.0)
    shares.end(1, 2.0)
    assert (text.joules, text.telling, text.silent) == (5, {"pi"}, {"hall"})
    later = shares.begin(2, 2.0 + SILENT_S + 1)
    assert later.telling == set(), "it has told nothing for so long"
    shares.end(3, 9.0)


def test_nodes_of_one_machine_see_the_same_sensor_which_counts_once() -> None:
    shares = EnergyShares(["a", "b"])
    text = shares.begin(1, 0.0)
    for now in (0.0, 1.0, 2.0):
        shares.take("a", "m", 5 * now, 5, now)
        shares.take("b", "m", 5 * now + 70, 5, now)
    shares.settle(2.0)
    assert text.joules == pytest.approx(10) and text.telling == {"a", "b"}
    shares.take("b", "m", 95, 5, 4.5)
    shares.take("b", "m", 100, 5, 5.5)
    assert text.joules == pytest.approx(10 + 5 * SILENT_S + 5), "the other one goes on where the first is gone"


def test_a_board_that_falls_silent_is_counted_on_for_a_moment_only() -> None:
    shares = EnergyShares(["pi"])
    shares.take("pi", "m", 0, 5, 0.0)
    text = shares.begin(1, 0.0)
    shares.settle(100.0)
    assert text.joules == pytest.approx(5 * SILENT_S)
    shares.take("pi", "m", 500, 5, 100.0)
    assert text.joules == pytest.approx(5 * SILENT_S), "nobody knows when"


def test_a_node_that_names_another_machine_each_time_has_one() -> None:
    shares = EnergyShares(["pi"])
    text = shares.begin(1, 0.0)
    for number in range(100):
        shares.take("pi", f"m{number}", 7.0 * number, 5, number / 100)
    assert len(shares._boards) == 1
    shares.end(1, 1.0)
    assert text.joules == pytest.approx(5 * 1.0)
