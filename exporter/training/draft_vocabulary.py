"""Which tokens a head drafts: those that are most frequent in what it learns from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from exporter.training.batches import Texts

LEAST_BY_DEFAULT = 8192
"""Where the model has as many."""


def num_drafted(wanted: int | None, vocab_size: int) -> int:
    """As many as are wanted, or a quarter of the model's."""
    return min(wanted or max(LEAST_BY_DEFAULT, vocab_size // 4), vocab_size)


class TokenCounts:
    """How often each token is to be learned in ``lessons``."""

    def __init__(self, lessons: Sequence[Texts], vocab_size: int) -> None:
        self._counts = np.zeros(vocab_size, np.int64)
        for texts in lessons:
            for number in range(len(texts)):
                learned = texts[number][int(texts.trained_from[number]) :]
                self._counts += np.bincount(learned, minlength=vocab_size)

    def most_frequent(self, number: int) -> torch.Tensor:
        """So many tokens, [number] in ascending order."""
        return torch.from_numpy(np.sort(np.argsort(-self._counts, kind="stable")[:number]))

    def share(self, tokens: torch.Tensor) -> float:
        """Of all that is to be learned."""
        return float(self._counts[tokens.numpy()].sum() / max(1, self._counts.sum()))
