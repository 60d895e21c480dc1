"""Makes one matrix of several that multiply the same rows, so that a graph has the operators of one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from exporter.matrices import FloatMatrix, Matrix, PerTokenMatrix, SplitMatrix

Form = TypeVar("Form")


def joined(matrices: Sequence[Matrix]) -> Matrix | None:
    """A matrix with the outputs of all, one after the other, each with the bits that it has alone.

    None where they are not all in bytes with a scale for each output, whose sums are exact: what blocks give an output
    may depend on how many there are beside it. Nor would these save much, with three operators to a product.
    """
    if per_token := _all_of(PerTokenMatrix, matrices):
        levels, scales = ([getattr(matrix, name) for matrix in per_token] for name in ("levels", "scales"))
        return PerTokenMatrix(np.concatenate(levels), np.concatenate(scales))
    if split := _all_of(SplitMatrix, matrices):
        rest = joined([matrix.rest for matrix in split])
        columns = split[0].columns
        if rest is not None and all(np.array_equal(matrix.columns, columns) for matrix in split):
            return SplitMatrix(rest, columns, FloatMatrix(np.concatenate([matrix.kept.weights for matrix in split])))
    return None


def _all_of(form: type[Form], matrices: Sequence[object]) -> list[Form]:
    """The matrices where all are of that form, else none."""
    found = [matrix for matrix in matrices if isinstance(matrix, form)]
    return found if len(found) == len(matrices) else []
