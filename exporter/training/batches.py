"""Windows of a token stream in an order that follows from the seed alone."""

from __future__ import annotations

import numpy as np
import torch


class Windows:
    """Windows of ``rows + 1`` tokens. Each overlaps the next by one, so that a token is a label once per epoch."""

    def __init__(self, tokens: np.ndarray, rows: int, seed: int) -> None:
        self.tokens, self.rows, self.seed = tokens, rows, seed
        self.num_windows = (len(tokens) - 1) // rows
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def batch(self, number: int, size: int) -> torch.Tensor:
        """The ``size`` windows from ``number * size`` on, in an order that each epoch shuffles: int64 [size,
        rows + 1].
        """
        chosen = [self._window(n) for n in range(number * size, (number + 1) * size)]
        return torch.from_numpy(np.stack(chosen).astype(np.int64))

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.num_windows)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_windows)
        start = int(self._order[1][place]) * self.rows
        window: np.ndarray = self.tokens[start : start + self.rows + 1]
        return window


def in_windows(tokens: np.ndarray, rows: int) -> torch.Tensor:
    """The whole stream as windows in order, without the tokens that fill none: int64 [windows, rows + 1]."""
    num_windows = (len(tokens) - 1) // rows
    return torch.from_numpy(
        np.stack([tokens[i * rows : (i + 1) * rows + 1] for i in range(num_windows)]).astype(np.int64)
    )
