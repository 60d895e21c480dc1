"""One line of costs, and its two fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec_edge.core.line import Line, LineFit, fit_line

SIZES = st.lists(st.integers(1, 256), min_size=2, max_size=8, unique=True)


@given(SIZES, st.floats(0.1, 1e3), st.floats(0.01, 10))
def test_a_line_that_samples_lie_on_is_found(sizes: list[int], fixed: float, per_row: float) -> None:
    line = fit_line(sizes, [fixed + per_row * size for size in sizes])
    for size in sizes:
        assert line.at(size) == pytest.approx(fixed + per_row * size, rel=1e-6)


@given(SIZES, st.lists(st.floats(0.1, 1e3), min_size=8, max_size=8))
def test_no_part_is_below_zero(sizes: list[int], times: list[float]) -> None:
    line = fit_line(sizes, times[: len(sizes)])
    assert line.fixed >= 0 and line.per_row >= 0


def test_small_samples_weigh_as_much_as_large_ones() -> None:
    line = fit_line([1, 1, 100], [10.0, 20.0, 1000.0])
    assert line.at(1) < 15, "relative errors count, not absolute ones"


def test_samples_of_one_size_tell_nothing_of_rows() -> None:
    assert fit_line([4, 4, 4], [9.0, 10.0, 12.0]) == Line(10.0, 0.0)


def test_lines_add_up_and_scale() -> None:
    assert Line(1.0, 2.0) + Line(10.0, 20.0) == Line(11.0, 22.0)
    assert Line(1.0, 2.0).scaled(3) == Line(3.0, 6.0)
    assert Line(1.0, 2.0).at(10) == 21.0


def test_how_many_rows_fit_into_a_time() -> None:
    assert [Line(10.0, 2.0).rows_within(limit, 8) for limit in (9.0, 12.0, 15.9, 16.0, 90.0)] == [0, 1, 2, 3, 8]
    assert [Line(10.0).rows_within(limit, 8) for limit in (9.0, 10.0)] == [0, 8]


def test_the_share_that_grows_with_the_rows() -> None:
    assert Line(10.0, 2.0).growing_share(5) == 0.5 and Line(0.0, 2.0).growing_share(5) == 1.0
    assert Line().growing_share(5) == 0.5, "nothing is known"


def test_a_fit_forgets() -> None:
    fit = LineFit()
    assert not fit.has_samples and fit.mean_size == 1.0
    for _ in range(500):
        fit.add(1, 1.0)
        fit.add(9, 9.0)
    for _ in range(500):
        fit.add(1, 2.0)
        fit.add(9, 18.0)
    assert fit.line.at(4) == pytest.approx(8.0, rel=0.01)
