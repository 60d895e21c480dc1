"""The target's rows of the texts that a head learns from, kept on disk where they are needed more than once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from exporter.training.batches import Batch, Texts
from exporter.training.network import Target


class Features:
    """The normed rows of ``texts``. With a ``path`` each text is run once, and its rows are kept there in float16.

    Several processes may share the files. A text is run by itself, so that its bits do not depend on what was kept.
    """

    def __init__(self, target: Target, texts: Texts, path: Path | None = None) -> None:
        self.target, self.texts = target, texts
        self._first = np.concatenate([[0], texts.lengths.cumsum()])
        self._kept = None if path is None else self._open(path)

    @torch.no_grad()
    def of(self, number: int) -> torch.Tensor:
        """[rows, hidden_size] of a text."""
        place, device = slice(int(self._first[number]), int(self._first[number + 1])), self.target.device
        if self._kept is not None and self._kept.is_there[number]:
            return torch.from_numpy(self._kept.rows[place].astype(np.float32)).to(device)
        tokens = torch.from_numpy(self.texts[number].astype(np.int64)).to(device)
        rows = self.target.features(tokens[None])[0].half()
        if self._kept is not None:
            self._kept.rows[place] = rows.cpu().numpy()
            self._kept.is_there[number] = True
        return rows.float()

    def batch(self, batch: Batch) -> torch.Tensor:
        """[texts, longest, hidden_size], with zeros behind shorter texts."""
        return torch.nn.utils.rnn.pad_sequence([self.of(number) for number in batch.numbers], batch_first=True)

    def _open(self, path: Path) -> _Kept:
        num_rows, width = int(self._first[-1]), self.target.shape.hidden_size
        rows = _open_array(path, np.float16, (num_rows, width))
        return _Kept(rows, _open_array(path.with_suffix(".kept"), np.bool_, (len(self.texts),)))


class _Kept(NamedTuple):
    rows: np.ndarray  # of all texts, one after the other
    is_there: np.ndarray  # of each text


def _open_array(path: Path, kind: type[np.generic], shape: tuple[int, ...]) -> np.ndarray:
    """An array in a file, which is made, or becomes longer, where it is too short."""
    path.touch()
    return np.memmap(path, kind, "r+" if path.stat().st_size else "w+", shape=shape)
