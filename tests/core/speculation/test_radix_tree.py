"""A radix tree against a list of the same sequences."""

from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.speculation.radix_tree import RadixTree

SEQUENCES = st.lists(st.integers(0, 2), max_size=8).map(tuple)


def num_alike(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


@given(st.lists(st.tuples(SEQUENCES, st.booleans()), max_size=12), SEQUENCES)
def test_it_finds_what_each_sequence_has_in_common_the_most_first(
    steps: list[tuple[tuple[int, ...], bool]], asked: tuple[int, ...]
) -> None:
    tree, there = RadixTree(), dict[int, tuple[int, ...]]()
    for session, (tokens, is_removed) in enumerate(steps):
        if is_removed and there:
            removed = min(there, key=lambda other: num_alike(there[other], tokens))
            tree.remove(removed)
            del there[removed]
        else:
            tree.add(session, tokens)
            there[session] = tokens
        tree.check()
        found = list(tree.common(asked))
        assert dict(found) == {number: num_alike(asked, known) for number, known in there.items()}
        assert [num for _, num in found] == sorted((num for _, num in found), reverse=True)
        assert len(tree) == len(there) == len(found)
