"""The chunks of a prompt: sizes worked out by hand, and the least of all sizes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec_edge.core.line import Line
from flowspec_edge.core.speculation.prefill import RingTimes, best_chunk_rows

COSTS = st.sampled_from([0.0, 0.001, 0.02, 0.3])
LINES = st.builds(Line, COSTS, COSTS)


def seconds(times: RingTimes, num_rows: int, size: int) -> float:
    """When the last row is back: each chunk waits at stages and on wires for the one before it."""
    free_at = [0.0] * 2 * len(times.stages)
    back_at = 0.0
    for first in range(0, num_rows, size):
        at, num_sent = 0.0, min(size, num_rows - first)
        for number, (stage, hop) in enumerate(zip(times.stages, times.hops, strict=True)):
            at = free_at[2 * number] = max(at, free_at[2 * number]) + stage.at(num_sent)
            at = free_at[2 * number + 1] = max(at, free_at[2 * number + 1]) + hop.per_row * num_sent
            at += hop.fixed
        back_at = at
    return back_at


@settings(deadline=None)
@given(st.lists(st.tuples(LINES, LINES), min_size=1, max_size=4), st.integers(1, 60), st.integers(1, 40))
def test_no_other_size_brings_a_prompt_through_much_sooner(
    parts: list[tuple[Line, Line]], num_rows: int, most: int
) -> None:
    """All chunks count as equal. The last one may be smaller, by a row less than there are chunks."""
    times = RingTimes(tuple(stage for stage, _ in parts), tuple(hop for _, hop in parts))
    best = best_chunk_rows(times, num_rows, most)
    assert 1 <= best <= most
    row_s = sum(line.per_row for pair in parts for line in pair)
    least_s = min(seconds(times, num_rows, size) for size in range(1, min(num_rows, most) + 1))
    assert seconds(times, num_rows, best) <= least_s + row_s * num_rows + 1e-9


def test_many_stages_and_dear_rows_make_chunks_small_and_dear_forwards_make_them_large() -> None:
    def best(num_stages: int, fixed_s: float, row_s: float, wire_s: float = 0.0) -> int:
        return best_chunk_rows(
            RingTimes((Line(fixed_s, row_s),) * num_stages, (Line(0.001, wire_s),) * num_stages), 2000, 512
        )

    assert best(1, 0.060, 0.00025) == 500, "one stage alone: as few as may be, of one size"
    assert best(4, 0.060, 0.00025) == 400
    assert best(8, 0.060, 0.00025) == 250
    assert best(4, 0.032, 0.010) == 50
    assert best(4, 0.060, 0.00025, wire_s=0.000437) == 223, "a wire that is as slow as the stages"
