"""Lookup proposes what followed earlier places with the same tokens."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.speculation.lookup import MAX_MATCH, MAX_PROPOSALS, MIN_MATCH, Lookup


def test_the_longest_match_comes_first_and_the_latest_of_equals() -> None:
    lookup = Lookup([1, 2, 3, 9, 2, 3, 7, 2, 3, 8])
    assert lookup.proposals([1, 2, 3]) == {9: 3, 8: 2, 7: 2}
    assert list(lookup.proposals([4, 2, 3])) == [8, 7, 9]


def test_one_token_alone_proposes_nothing() -> None:
    lookup = Lookup([1, 2, 3])
    assert lookup.proposals([2]) == lookup.proposals([7, 2]) == {}
    assert lookup.has(1, 2)
    assert not lookup.has(7, 2)


def test_the_end_of_the_text_proposes_nothing() -> None:
    assert Lookup([1, 2, 3]).proposals([2, 3]) == {}
    assert Lookup([1, 2]).proposals([1, 2]) == {}


def test_what_was_added_is_found() -> None:
    lookup = Lookup([0, 1, 2])
    lookup.extend([0, 1])
    assert lookup.proposals([0, 1]) == {2: 2}
    lookup.extend([4])
    assert lookup.proposals([0, 1]) == {4: 2, 2: 2}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_every_proposal_stands_in_the_text_behind_its_match(text: Sequence[int], path: Sequence[int]) -> None:
    for token, length in Lookup(text).proposals(path).items():
        assert MIN_MATCH <= length <= MAX_MATCH
        found = [*path[-length:], token]
        assert any(text[at : at + len(found)] == found for at in range(len(text)))
    assert len(Lookup(text).proposals(path)) <= MAX_PROPOSALS
