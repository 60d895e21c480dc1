"""Texts to train on, in an order that follows from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

POOLED = 16
"""Batches among whose texts those of alike length come together, so that little is padding."""


@dataclass(frozen=True)
class Texts:
    """Texts in a stream of tokens, which they may share. A text's tokens from ``trained_from`` on are to be learned."""

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    trained_from: np.ndarray

    @classmethod
    def of_lists(cls, texts: Sequence[Sequence[int]], trained_from: Sequence[int]) -> Self:
        lengths = np.array([len(text) for text in texts], np.int64)
        starts = np.concatenate([[0], lengths.cumsum()[:-1]]).astype(np.int64)
        return cls(np.concatenate([np.array(t, np.int64) for t in texts]), starts, lengths, np.array(trained_from))

    @classmethod
    def in_windows(cls, tokens: np.ndarray, rows: int) -> Self:
        """Windows of ``rows + 1`` tokens, without the tokens that fill none. Each overlaps the next by one, so that a
        token is a label once.
        """
        num_windows = max(0, len(tokens) - 1) // rows
        return cls(
            tokens, np.arange(num_windows) * rows, np.full(num_windows, rows + 1), np.zeros(num_windows, np.int64)
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> np.ndarray:
        start = int(self.starts[number])
        text: np.ndarray = self.tokens[start : start + int(self.lengths[number])]
        return text

    def part(self, numbers: Sequence[int] | np.ndarray) -> Texts:
        chosen = np.asarray(numbers, np.int64)
        return Texts(self.tokens, self.starts[chosen], self.lengths[chosen], self.trained_from[chosen])

    def batch(self, numbers: Sequence[int]) -> Batch:
        lengths = torch.from_numpy(self.lengths[numbers])
        tokens = torch.zeros(len(numbers), int(lengths.max()), dtype=torch.int64)
        for row, number in enumerate(numbers):
            tokens[row, : lengths[row]] = torch.from_numpy(self[number].astype(np.int64))
        return Batch(list(numbers), tokens, lengths, torch.from_numpy(self.trained_from[numbers]))


@dataclass(frozen=True)
class Batch:
    """Some texts, with zeros behind the shorter ones: ``tokens`` [texts, longest]; the others are [texts]."""

    numbers: list[int]
    tokens: torch.Tensor
    lengths: torch.Tensor
    trained_from: torch.Tensor

    def is_learned(self) -> torch.Tensor:
        """Which tokens are there and to be learned: bool [texts, longest]."""
        places = torch.arange(self.tokens.shape[1])
        return (places >= self.trained_from[:, None]) & (places < self.lengths[:, None])


class Order:
    """The order of ``texts``, which each epoch shuffles, in batches of ``size``."""

    def __init__(self, texts: Texts, size: int, seed: int) -> None:
        self.texts, self.size, self.seed = texts, size, seed
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))

    def batch(self, number: int) -> Batch:
        return self.texts.batch([self._text(n) for n in range(number * self.size, (number + 1) * self.size)])

    def _text(self, number: int) -> int:
        epoch, place = divmod(number, len(self.texts))
        if self._order[0] != epoch:
            self._order = epoch, self._shuffled(np.random.default_rng((self.seed, epoch)))
        return int(self._order[1][place])

    def _shuffled(self, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(len(self.texts))
        batches: list[np.ndarray] = []
        for first in range(0, len(order), POOLED * self.size):
            pool = order[first : first + POOLED * self.size]
            pool = pool[np.argsort(self.texts.lengths[pool], kind="stable")]
            of_pool = [pool[at : at + self.size] for at in range(0, len(pool), self.size)]
            batches += [of_pool[int(at)] for at in rng.permutation(len(of_pool))]
        return np.concatenate(batches)
