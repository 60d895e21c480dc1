"""The one model of cost: a line ``fixed + per_row * n`` for ``n`` rows, and two ways of fitting it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FORGETTING = 0.98
"""Weight of the past at each new sample: a throttling board is noticed within some fifty chunks."""


@dataclass(frozen=True, slots=True)
class Line:
    """The time of ``n`` rows, ``fixed + per_row * n``: milliseconds in plans, seconds where a ring has shown it."""

    fixed: float = 0.0
    per_row: float = 0.0

    def at(self, num_rows: float) -> float:
        return self.fixed + num_rows * self.per_row

    def scaled(self, factor: float) -> Line:
        return Line(self.fixed * factor, self.per_row * factor)

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.per_row + other.per_row)


def fit_line(sizes: Sequence[float], times: Sequence[float]) -> Line:
    """Least squares over samples that are all there, each weighed by its own time; neither part below 0.

    Weighing keeps the relative error even: small chunks are what most schedules send.
    """
    x, y = np.array(sizes, np.float64), np.array(times, np.float64)
    samples = np.stack([np.ones_like(x), x], axis=1)  # [samples, 2]
    fixed, per_row = np.linalg.lstsq(samples / y[:, None], np.ones_like(y), rcond=None)[0]
    if per_row < 0:
        return Line(float(np.median(y)), 0.0)
    if fixed < 0:
        return Line(0.0, float(np.median(y / x)))
    return Line(float(fixed), float(per_row))


class LineFit:
    """Least squares over samples as they come, which fade; ``line`` is the fit so far, with no part below 0."""

    def __init__(self) -> None:
        self.line = Line()
        self._weight = self._n = self._y = self._nn = self._ny = 0.0

    @property
    def has_samples(self) -> bool:
        return self._weight > 0

    @property
    def mean_size(self) -> float:
        """The mean number of rows of the samples; 1 where there are none."""
        return self._n / self._weight if self._weight else 1.0

    def add(self, n: float, y: float) -> None:
        self._weight = self._weight * FORGETTING + 1
        self._n = self._n * FORGETTING + n
        self._y = self._y * FORGETTING + y
        self._nn = self._nn * FORGETTING + n * n
        self._ny = self._ny * FORGETTING + n * y
        spread = self._nn * self._weight - self._n**2
        slope = self._y / self._n / 2  # while all samples have one size: half of the time, until better is known
        if spread > 1e-9 * self._nn * self._weight:
            slope = min(max((self._ny * self._weight - self._n * self._y) / spread, 0.0), self._y / self._n)
        self.line = Line((self._y - slope * self._n) / self._weight, slope)
