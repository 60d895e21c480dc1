"""Lookup proposes what followed earlier places with the same tokens."""

from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.speculation.lookup import MAX_MATCH, MAX_PLACES, MAX_PROPOSALS, MIN_MATCH, Lookup, pair_of


def test_the_longest_match_comes_first_and_the_latest_of_equals() -> None:
    lookup = Lookup([1, 2, 3, 9, 2, 3, 7, 2, 3, 8])
    assert lookup.proposals([3, 2, 1]) == {9: 3, 8: 2, 7: 2}
    assert list(lookup.proposals([3, 2, 4])) == [8, 7, 9]


def test_one_token_alone_proposes_nothing() -> None:
    lookup = Lookup([1, 2, 3])
    assert lookup.proposals([2]) == lookup.proposals([2, 7]) == {}
    assert pair_of(1, 2) in lookup.pairs and pair_of(7, 2) not in lookup.pairs


def test_the_end_of_the_text_proposes_nothing() -> None:
    assert Lookup([1, 2, 3]).proposals([3, 2]) == {}
    assert Lookup([1, 2]).proposals([2, 1]) == {}
    assert Lookup([1, 2]).end == (2, 1)
    assert Lookup(range(20)).end == tuple(range(19, 19 - MAX_MATCH, -1))


def test_what_was_added_is_found() -> None:
    lookup = Lookup([0, 1, 2])
    lookup.extend([0, 1])
    assert lookup.proposals([1, 0]) == {2: 2}
    lookup.extend([4])
    assert lookup.proposals([1, 0]) == {4: 2, 2: 2}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_what_is_proposed_is_what_a_walk_over_the_text_finds(text: list[int], path: list[int]) -> None:
    """Of each token the longest match counts, and of equally long ones the latest comes first."""
    longest = dict[int, int]()
    at_pair = [at for at in range(2, len(text)) if text[at - 2 : at] == path[-2:]]
    for at in reversed(at_pair[-MAX_PLACES:]):
        lengths = range(MIN_MATCH, min(MAX_MATCH, len(path), at) + 1)
        length = max(length for length in lengths if text[at - length : at] == path[-length:])
        longest[text[at]] = max(length, longest.get(text[at], 0))
    expected = sorted(longest.items(), key=lambda found: -found[1])[:MAX_PROPOSALS]
    assert list(Lookup(text).proposals(path[::-1]).items()) == expected
