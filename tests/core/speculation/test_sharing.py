"""Sessions share a ring by the time of its slowest stage."""

import random

import pytest

from flowspec_edge.core.rows import Passage
from flowspec_edge.core.speculation.pipeline import RingCosts
from flowspec_edge.core.speculation.sharing import CHUNKS_AHEAD, CHUNKS_BEHIND, Offer, Shares


def measured_costs(fixed_s: float = 0.060, row_s: float = 0.001) -> RingCosts:
    costs = RingCosts(1)
    for num_rows in (1, 10):
        costs.add_trip(1.0, [Passage(num_rows, 0.0, fixed_s + row_s * num_rows)])
    return costs


def shares_of(*sessions: int, costs: RingCosts | None = None) -> Shares:
    shares = Shares(costs or measured_costs())
    for session in sessions:
        shares.enter(session)
    return shares


@pytest.mark.parametrize("seed", range(30))
def test_who_always_has_something_to_send_gets_an_equal_share(seed: int) -> None:
    """Whatever their chunks cost and are worth, and whoever else has something now and then."""
    rng, costs = random.Random(seed), measured_costs()
    kinds = [(rng.randint(1, 100), rng.uniform(0, 10)) for _ in range(rng.randint(2, 6))]
    shares = shares_of(*range(len(kinds)), costs=costs)
    used_s = [0.0] * len(kinds)
    always = [0, 1]
    for _ in range(400):
        offering = [one for one in range(len(kinds)) if one in always or rng.random() < 0.5]
        chosen = shares.choose({one: Offer(kinds[one][0], (1,), kinds[one][1]) for one in offering})
        shares.charge(chosen, kinds[chosen][0])
        used_s[chosen] += costs.interval_s(kinds[chosen][0])
    slack_s = CHUNKS_AHEAD * costs.interval_s(1) + 2 * costs.interval_s(100)
    assert abs(used_s[0] - used_s[1]) <= slack_s
    assert max(used_s) <= min(used_s[:2]) + slack_s, "nobody has more"


def test_of_those_that_are_not_ahead_the_chunk_goes_that_wins_the_most_for_its_time() -> None:
    shares = shares_of(1, 2, 3)
    assert shares.choose({1: Offer(1, (7,), 1.0), 2: Offer(30, (8, 9), 3.0), 3: Offer(1, (7,), 1.5)}) == 2
    assert shares.choose({1: Offer(1, (7,), 1.0), 3: Offer(1, (7,), 1.5)}) == 3
    for _ in range(CHUNKS_AHEAD + 1):
        shares.charge(2, 1)
    assert shares.choose({1: Offer(1, (7,), 1.0), 2: Offer(30, (8, 9), 3.0)}) == 1, "the other one is ahead"
    assert shares.choose({2: Offer(30, (8, 9), 3.0)}) == 2, "and may send where nobody else would"


def test_a_prompt_goes_first() -> None:
    shares = shares_of(1, 2)
    assert shares.choose({1: Offer(1, (7,), 5.0), 2: Offer(128)}) == 2


def test_who_comes_later_has_no_more_to_claim_than_others() -> None:
    shares = shares_of(1, 2)
    for _ in range(100):
        shares.charge(1, 1)
        shares.charge(2, 1)
    shares.enter(3)
    sent = []
    for _ in range(30):
        sent.append(shares.choose({session: Offer(1, (7,), 1.0) for session in (1, 2, 3)}))
        shares.charge(sent[-1], 1)
    assert [sent.count(session) for session in (1, 2, 3)] == [pytest.approx(10, abs=CHUNKS_AHEAD)] * 3


def test_who_had_nothing_to_send_for_long_does_not_stop_the_others_when_it_has() -> None:
    shares = shares_of(1, 2)
    for _ in range(1000):
        shares.charge(1, 1)
    num_alone = 0
    while shares.choose({1: Offer(1, (7,), 2.0), 2: Offer(1, (7,), 1.0)}) == 2:
        shares.charge(2, 1)
        num_alone += 1
    assert CHUNKS_BEHIND - CHUNKS_AHEAD <= num_alone <= CHUNKS_BEHIND


def test_before_anything_is_measured_sessions_take_turns() -> None:
    shares = shares_of(1, 2, 3, costs=RingCosts(2))
    sent = []
    for _ in range(9):
        sent.append(shares.choose({session: Offer(128) for session in (1, 2, 3)}))
        shares.charge(sent[-1], 128)
    assert sent == [1, 2, 3] * 3


def test_they_come_in_the_order_of_what_they_have_used() -> None:
    shares = shares_of(1, 2, 3)
    shares.charge(1, 5)
    shares.charge(2, 1)
    assert shares.in_order() == [3, 2, 1]
    shares.leave(2)
    assert shares.in_order() == [3, 1]
