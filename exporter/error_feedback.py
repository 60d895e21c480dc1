"""Rounds weights one column after the other, each of which takes up what rounding those before it has changed.

What counts is the product with the rows that a matrix meets, not each weight. The columns that are still to be rounded
are changed so that the product is as near as possible to what it was: GPTQ (Frantar et al., arXiv 2210.17323), with the
scales of blocks chosen before, and with the columns that stay in float32 at the end, which take up the rest.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from exporter.blocks import BLOCK_SIZE, Blocks
from exporter.calibration import WINDOW, Activations
from exporter.matrices import FloatMatrix, SplitMatrix

_SHRINKAGE = 0.5
"""By which share products of two different inputs are taken for chance: a text of some thousand tokens has many that
others do not have."""
_DAMPING = 0.003
"""Added to the squares, as a share of their mean, so that inputs that are always 0 have an inverse."""
_AT_ONCE = 32
"""Columns after which what they have changed is taken up by all that follow."""
_SCALES = (1.0, 0.9, 0.8, -1.0, -0.9)
"""Of a block's plain scale, by which its largest value has the lowest level: the steps may be finer, which cuts off the
largest values, and may give the highest level to it."""
_OUTPUTS_AT_ONCE = 256


def rounded_with_feedback(weights: np.ndarray, bits: int, columns: np.ndarray, activations: Activations) -> SplitMatrix:
    """Weights, [num_out, num_in], in blocks around 0, but for ``columns``, which stay in float32.

    ``activations`` has the squares of what enters the matrix.
    """
    num_out, num_in = weights.shape
    rest = weights.copy()
    rest[:, columns] = 0
    blocks = Blocks.rounded(rest, bits)
    middle = 2 ** (bits - 1)
    counts = np.concatenate([squares.diagonal() for squares in activations.squares])
    blocks = replace(blocks, scales=_chosen_scales(rest, blocks.scales, counts, middle))
    scales = np.repeat(blocks.scales, BLOCK_SIZE, axis=1).T[:num_in]  # [num_in, num_out]
    left = np.ascontiguousarray(weights.T)
    levels = np.zeros((blocks.levels[0].size, num_out), np.int8)
    for number, squares in enumerate(activations.squares):
        first = number * WINDOW
        window = np.arange(first, first + len(squares))
        is_kept = np.isin(window, columns)
        order = np.concatenate([window[~is_kept], window[is_kept]])
        num_rounded = len(window) - int(is_kept.sum())
        ordered = left[order]
        factor = _factor(squares[np.ix_(order - first, order - first)], num_rounded)
        levels[order[:num_rounded]] = _round_columns(ordered, scales[order], factor, num_rounded, middle)
        left[order] = ordered
    shape = blocks.levels.shape
    rounded = replace(blocks, levels=np.ascontiguousarray(levels.T).reshape(shape))
    return SplitMatrix(rounded, columns, FloatMatrix(np.ascontiguousarray(left[columns].T)))


def _chosen_scales(weights: np.ndarray, plain: np.ndarray, counts: np.ndarray, middle: int) -> np.ndarray:
    """The scales, [num_out, num_blocks], of the least squared error, in which an input counts as ``counts`` says.

    Each of _SCALES gives a block its levels, and these the scale that fits best.
    """
    num_out, num_in = weights.shape
    padding = plain.shape[1] * BLOCK_SIZE - num_in
    counts = np.pad(counts + 1e-3 * max(counts.mean(), 1e-20), (0, padding)).reshape(-1, BLOCK_SIZE)
    chosen = plain.copy()
    for start in range(0, num_out, _OUTPUTS_AT_ONCE):
        part = slice(start, start + _OUTPUTS_AT_ONCE)
        values = np.pad(weights[part], ((0, 0), (0, padding))).reshape(-1, *counts.shape)
        least = np.zeros(plain[part].shape, np.float32)  # of the error, without the squares of the values themselves
        for share in _SCALES:
            steps = np.where(plain[part] == 0, np.float32(1), np.float32(share) * plain[part])
            levels = np.clip(np.rint(values / steps[..., None]), -middle, middle - 1)
            counted = counts * levels
            products, squares = (counted * values).sum(axis=2), (counted * levels).sum(axis=2)
            fitted = products / np.where(squares == 0, np.float32(1), squares)
            error = -fitted * products
            chosen[part] = np.where(error < least, fitted, chosen[part])
            np.minimum(least, error, out=least)
    return chosen


def _factor(squares: np.ndarray, num_rounded: int) -> np.ndarray:
    """The upper triangle whose product with itself is the inverse of the squares: float32 [columns, columns].

    Its row of a column tells by how much the columns behind it change with its error.
    """
    damped = (1 - _SHRINKAGE) * squares.astype(np.float64)
    own = squares.diagonal().astype(np.float64)
    np.fill_diagonal(damped, own + _DAMPING * max(own[:num_rounded].mean(), 1e-20))
    lower: np.ndarray = np.linalg.cholesky(np.linalg.inv(damped))
    return lower.T.astype(np.float32)


def _round_columns(
    columns: np.ndarray, scales: np.ndarray, factor: np.ndarray, num_rounded: int, middle: int
) -> np.ndarray:
    """The levels, ``-middle`` to ``middle - 1``, of the first ``num_rounded`` columns: int8 [num_rounded, num_out].

    ``columns``, [columns, num_out], are changed: those behind them have taken up what rounding has changed.
    """
    levels = np.empty((num_rounded, columns.shape[1]), np.int8)
    steps = np.where(scales == 0, np.float32(1), scales)
    for start in range(0, num_rounded, _AT_ONCE):
        stop = min(start + _AT_ONCE, num_rounded)
        errors = np.empty((stop - start, columns.shape[1]), np.float32)
        for column in range(start, stop):
            level = np.clip(np.rint(columns[column] / steps[column]), -middle, middle - 1)
            levels[column] = level
            error = (columns[column] - level * scales[column]) / factor[column, column]
            columns[column + 1 : stop] -= factor[column, column + 1 : stop, None] * error
            errors[column - start] = error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    return levels
