"""Layers that moved to another kind of board are named, and those that moved among boards of one kind are not."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.planning.arithmetic import ChangedLayers, ComputedLayers, changed_layers

ARM, PC, FINE = "aarch64 int8", "x86_64 int8", "x86_64 fp32"
NUM_LAYERS = 6


def test_layers_that_move_among_boards_of_one_kind_have_not_changed() -> None:
    two, one = [ComputedLayers(0, 4, ARM), ComputedLayers(4, 8, ARM)], [ComputedLayers(0, 8, ARM)]
    assert changed_layers(two, one) == changed_layers(one, two) == []


def test_layers_that_move_to_another_kind_or_precision_are_named_as_long_ranges() -> None:
    before = [ComputedLayers(0, 4, ARM), ComputedLayers(4, 8, PC)]
    after = [ComputedLayers(0, 1, PC), ComputedLayers(1, 3, PC), ComputedLayers(3, 8, FINE)]
    assert changed_layers(before, after) == [
        ChangedLayers(0, 3, ARM, PC),
        ChangedLayers(3, 4, ARM, FINE),
        ChangedLayers(4, 8, PC, FINE),
    ]


RINGS = st.lists(st.sampled_from([ARM, PC, FINE]), min_size=NUM_LAYERS, max_size=NUM_LAYERS)


def ring_of(by_layer: list[str], cuts: set[int]) -> list[ComputedLayers]:
    """Stages that end at these cuts and wherever the arithmetic changes."""
    starts = [i for i in range(NUM_LAYERS) if not i or i in cuts or by_layer[i] != by_layer[i - 1]]
    return [
        ComputedLayers(start, stop, by_layer[start])
        for start, stop in zip(starts, [*starts[1:], NUM_LAYERS], strict=True)
    ]


@given(RINGS, RINGS, st.sets(st.integers(1, 5)), st.sets(st.integers(1, 5)))
def test_however_they_are_cut_just_the_layers_that_differ_are_named(
    before: list[str], after: list[str], cuts: set[int], other_cuts: set[int]
) -> None:
    changed = changed_layers(ring_of(before, cuts), ring_of(after, other_cuts))
    named = {layer: (c.before, c.after) for c in changed for layer in range(c.start, c.stop)}
    assert named == {i: pair for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}
    for one, next_one in itertools.pairwise(changed):
        assert one.stop < next_one.start or (one.before, one.after) != (next_one.before, next_one.after)
