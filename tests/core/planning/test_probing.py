"""When to probe a link, and how often: counts of one end in, numbers of probes out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.planning.packet_loss import COUNT_S
from flowspec_edge.core.planning.probing import MAX_AT_ONCE, MAX_PROBES, PROBES_PER_S, Probing

NUM_SENT = st.integers(0, 1000)
COUNTS = st.lists(st.tuples(NUM_SENT, NUM_SENT, st.floats(0.0, 60.0)), max_size=30)
"""How many packets were sent and lost, and seconds since the last count."""


def test_a_first_loss_brings_as_many_probes_as_refute_it() -> None:
    probing = Probing()
    assert probing.count(20, 0, 0.0) == 0
    num_probes = probing.count(1, 1, 0.2)
    assert 20 < num_probes < 40
    left = probing.count(num_probes - 1, 0, 0.4)
    assert left == 1, "one has not left yet"
    assert probing.count(left, 0, 0.6) == 0


def test_a_bad_link_gets_as_many_as_there_is_time_for_until_there_is_no_doubt() -> None:
    probing = Probing()
    nums = [probing.count(50, 15, at * COUNT_S) for at in range(5)]
    assert nums[0] == MAX_AT_ONCE == nums[1] and nums[-1] == 0
    assert nums == sorted(nums, reverse=True)


def test_what_was_lost_before_nothing_was_sent_is_not_forgotten() -> None:
    """The system may send nothing for a while: probes wait in it as everything does."""
    probing = Probing()
    first = probing.count(20, 2, 0.0)
    assert probing.count(0, 0, 0.2) == first > 0


@given(st.lists(NUM_SENT, max_size=30))
def test_a_link_that_loses_nothing_is_never_probed(counts: list[int]) -> None:
    probing = Probing()
    assert not any(probing.count(num_sent, 0, at * COUNT_S) for at, num_sent in enumerate(counts))


@given(COUNTS)
def test_no_end_sends_more_probes_than_it_may_whatever_is_counted(counts: list[tuple[int, int, float]]) -> None:
    probing, now, num_probes = Probing(), 0.0, 0
    for num_sent, num_lost, later in counts:
        now += later
        due = probing.count(num_sent, num_lost, now)
        num_probes += due
        assert 0 <= due <= MAX_AT_ONCE
        assert num_probes <= MAX_PROBES + PROBES_PER_S * now + 1e-6


def test_a_link_that_is_suspected_again_and_again_takes_its_probes_as_they_grow_again() -> None:
    probing, num_probes = Probing(), 0
    for at in range(0, 3000, 2):
        num_probes += probing.count(100, 10, at * COUNT_S)
        assert probing.count(400, 0, (at + 1) * COUNT_S) == 0
    assert num_probes == pytest.approx(MAX_PROBES + PROBES_PER_S * 3000 * COUNT_S, rel=0.01)
