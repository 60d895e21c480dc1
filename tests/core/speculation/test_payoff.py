"""Speculation that does not pay pauses, and is tried again."""

from flowspec_edge.core.speculation.payoff import FIRST_PAUSE_TOKENS, TRIAL_TOKENS, Payoff

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
    payoff = Payoff()
    payoff.count(1, 0.0, PLAIN_S)
    found, _ = states(payoff, 0.2, 200, 0.0)
    changes = [index + 1 for index in range(1, 200) if found[index] != found[index - 1]]
    first_end = TRIAL_TOKENS
    second_start = first_end + FIRST_PAUSE_TOKENS
    second_end = second_start + TRIAL_TOKENS
    assert changes[:4] == [first_end, second_start, second_end, second_end + 2 * FIRST_PAUSE_TOKENS]


def test_what_begins_to_pay_is_noticed() -> None:
    payoff = Payoff()
    _, now = states(payoff, 0.2, 40, 0.0)
    assert not payoff.is_on
    found, _ = states(payoff, 0.05, 200, now)
    assert all(found[FIRST_PAUSE_TOKENS:])
