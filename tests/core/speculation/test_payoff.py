"""Speculation that does not pay pauses, and is tried again."""

from flowspec_edge.core.speculation.payoff import FIRST_PAUSE_TOKENS, MOST_LOST, Payoff

PLAIN_S = 0.1


def states(payoff: Payoff, seconds_per_token: float, num_tokens: int, now: float) -> tuple[list[bool], float]:
    """Whether speculation is on after each token."""
    found = []
    for _ in range(num_tokens):
        now += seconds_per_token
        payoff.count(1, now, PLAIN_S)
        found.append(payoff.is_on)
    return found, now


def test_what_pays_stays_on() -> None:
    payoff = Payoff()
    assert all(states(payoff, 0.05, 500, 0.0)[0])


def test_what_does_not_pay_pauses_twice_as_long_each_time() -> None:
    """Each token loses the time of another one, and the second is too many."""
    payoff = Payoff()
    payoff.count(1, 0.0, PLAIN_S)
    found, _ = states(payoff, 0.2, 200, 0.0)
    changes = [index + 1 for index in range(1, 200) if found[index] != found[index - 1]]
    second_start = 2 + FIRST_PAUSE_TOKENS
    assert changes[:4] == [2, second_start, second_start + 2, second_start + 2 + 2 * FIRST_PAUSE_TOKENS]


def test_a_small_loss_adds_up() -> None:
    payoff = Payoff()
    payoff.count(1, 0.0, PLAIN_S)
    found, _ = states(payoff, 1.05 * PLAIN_S, 200, 0.0)
    assert found.index(False) == int(MOST_LOST / 0.05)


def test_what_was_won_is_taken_off_and_soon_forgotten() -> None:
    payoff = Payoff()
    _, now = states(payoff, 0.5 * PLAIN_S, 100, 0.0)
    found, _ = states(payoff, 1.5 * PLAIN_S, 20, now)
    assert found.index(False) == int(2 * MOST_LOST / 0.5)


def test_a_moment_in_which_all_stands_still_is_no_reason_to_pause() -> None:
    payoff = Payoff()
    payoff.count(1, 0.0, PLAIN_S)
    payoff.count(1, 100 * PLAIN_S, PLAIN_S)
    assert payoff.is_on


def test_what_begins_to_pay_is_noticed() -> None:
    payoff = Payoff()
    _, now = states(payoff, 0.2, 4, 0.0)
    assert not payoff.is_on
    found, _ = states(payoff, 0.05, 200, now)
    assert all(found[FIRST_PAUSE_TOKENS:])
