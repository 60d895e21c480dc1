"""The one model of cost: a line ``fixed + per_row * n`` for ``n`` rows, and two ways of fitting it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from msgspec import Struct

FORGETTING = 0.98
"""Weight of the past at each new sample: a throttling board is noticed within some fifty chunks."""


class Line(Struct, frozen=True):
    """The time of ``n`` rows, ``fixed + per_row * n``: milliseconds in plans, seconds of a ring that runs."""

    fixed: float = 0.0
    per_row: float = 0.0

    def at(self, num_rows: float) -> float:
        return self.fixed + num_rows * self.per_row

    def growing_share(self, num_rows: float) -> float:
        """The share of the time of so many rows that grows with them; a half where they take none."""
        return num_rows * self.per_row / whole if (whole := self.at(num_rows)) else 0.5

    def rows_within(self, limit: float, most: int) -> int:
        """How many rows take no longer than ``limit``: 0 to ``most``."""
        if self.per_row <= 0:
            return most if self.fixed <= limit else 0
        return max(min(int((limit - self.fixed) / self.per_row), most), 0)

    def scaled(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.per_row * factor)

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.per_row + other.per_row)


NOTHING = Line()


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> Line:
    """The line with the least squares of the relative errors over all samples; neither part is below 0.

    Relative errors count, because most schedules send small chunks, whose times are short.
    """
    ones = [1 / time for time in times]
    rows = [size / time for size, time in zip(sizes, times, strict=True)]
    # The normal equations of fixed * ones + per_row * rows = 1.
    aa, ab, bb = _dot(ones, ones), _dot(ones, rows), _dot(rows, rows)
    determinant = aa * bb - ab * ab
    if determinant <= 1e-12 * aa * bb:  # all samples have one size
        return Line(median(times), 0.0)
    fixed = (sum(ones) * bb - sum(rows) * ab) / determinant
    per_row = (sum(rows) * aa - sum(ones) * ab) / determinant
    if per_row < 0:
        return Line(median(times), 0.0)
    if fixed < 0:
        return Line(0.0, median(time / size for size, time in zip(sizes, times, strict=True)))
    return Line(fixed, per_row)


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


class LineFit:
    """Least squares over samples as they come; older ones count less. ``line`` is the fit so far, no part below 0.

    As long as all samples have one size, as much of their time grows with the rows as of the ``expected`` line.
    """

    def __init__(self, expected: Line = NOTHING) -> None:
        self._expected = expected
        self.line = Line()
        self._weight = self._n = self._y = self._nn = self._ny = 0.0

    @property
    def has_samples(self) -> bool:
        return self._weight > 0

    @property
    def mean_size(self) -> float:
        """The mean number of rows of the samples; 1 where there are none."""
        return self._n / self._weight if self._weight else 1.0

    @property
    def knows_slope(self) -> bool:
        """Whether sizes have differed; where they have not, the line's slope is a guess."""
        return self._spread > 1e-9 * self._nn * self._weight

    def add(self, n: float, y: float) -> None:
        self._weight = self._weight * FORGETTING + 1
        self._n = self._n * FORGETTING + n
        self._y = self._y * FORGETTING + y
        self._nn = self._nn * FORGETTING + n * n
        self._ny = self._ny * FORGETTING + n * y
        slope = self._y / self._n * self._expected.growing_share(n)
        if self.knows_slope:
            slope = min(max((self._ny * self._weight - self._n * self._y) / self._spread, 0.0), self._y / self._n)
        self.line = Line((self._y - slope * self._n) / self._weight, slope)

    @property
    def _spread(self) -> float:
        return self._nn * self._weight - self._n**2
