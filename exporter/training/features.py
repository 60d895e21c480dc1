"""The target's rows of the texts that a head learns from, kept on disk where they are needed more than once."""

from __future__ import annotations

from pathlib import Path

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
        self._rows, self._is_kept = (None, None) if path is None else self._open(path)

    @torch.no_grad()
    def of(self, number: int) -> torch.Tensor:
        """[rows, hidden_size] of a text."""
        kept = slice(int(self._first[number]), int(self._first[number + 1]))
        device = self.target.device
        if self._rows is None or self._is_kept is None or not self._is_kept[number]:
            tokens = torch.from_numpy(self.texts[number].astype(np.int64)).to(device)
            rows = self.target.features(tokens[None])[0].half()
            if self._rows is not None and self._is_kept is not None:
                self._rows[kept] = rows.cpu().numpy()
                self._is_kept[number] = True
            return rows.float()
        return torch.from_numpy(self._rows[kept].astype(np.float32)).to(device)

    def batch(self, batch: Batch) -> torch.Tensor:
        """[texts, longest, hidden_size], with zeros behind shorter texts."""
        return torch.nn.utils.rnn.pad_sequence([self.of(number) for number in batch.numbers], batch_first=True)

    def _open(self, path: Path) -> tuple[np.memmap, np.memmap]:
        sizes = {
            path: (int(self._first[-1]), self.target.shape.hidden_size),
            path.with_suffix(".kept"): (len(self.texts),),
        }
        found = []
        for (file, size), kind in zip(sizes.items(), (np.float16, np.bool_), strict=True):
            file.touch()
            found.append(np.memmap(file, kind, "r+" if file.stat().st_size else "w+", shape=size))
        return found[0], found[1]
