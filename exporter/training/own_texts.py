"""Texts that the target writes itself, kept in files as they come. A kill costs at most the batch under way."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from exporter.training.batches import Texts
from exporter.training.kept_files import write_array
from exporter.training.network import Target
from exporter.training.sampling import continue_texts
from exporter.training.workers import Report, Worker

MOST_BATCHES = 1_000_003
"""By which the seeds of runs differ, so that no two of their batches have one."""
NONE = -1
"""Stands behind texts that end before the longest of their file."""


@dataclass(frozen=True)
class Beginning:
    """How a text begins, and the temperature at which the target goes on with it."""

    prompt: list[int]
    temperature: float


@dataclass(frozen=True)
class OwnTexts:
    """The texts of ``beginnings``, which end after ``most`` tokens or with one of ``ends``, in files of ``directory``.

    ``learns_prompts`` says whether a head is to learn from what each text begins with too.
    """

    directory: Path
    beginnings: Sequence[Beginning]
    most: int
    seed: int
    batch_size: int = 64
    ends: Collection[int] = ()
    learns_prompts: bool = False

    @property
    def num_batches(self) -> int:
        return -(-len(self.beginnings) // self.batch_size)

    def write(self, target: Target, worker: Worker, report: Report) -> Texts:
        """Write what is not there yet, together with the other workers, and return all of it."""
        self.directory.mkdir(exist_ok=True)
        lacking = [number for number in range(self.num_batches) if not self._path(number).exists()]
        worker.exchange(torch.zeros(1))  # all have looked before one writes
        began = time.monotonic()
        for done, number in enumerate(lacking[worker.number :: worker.num_workers], 1):
            num_tokens = self._write_batch(target, number)
            spent = time.monotonic() - began
            num_left = len(lacking) - done * worker.num_workers
            report(
                f"{self.directory.name}: {self.num_batches - max(num_left, 0)} of {self.num_batches} batches of "
                f"{self.batch_size}, {num_tokens} tokens in this one, "
                f"{spent / done * max(num_left, 0) / worker.num_workers / 60:.0f} min left"
            )
        worker.exchange(torch.zeros(1))  # all have written
        return self._read()

    def _write_batch(self, target: Target, number: int) -> int:
        """Returns how many tokens the target wrote."""
        beginnings = self._of_batch(number)
        texts = continue_texts(
            target,
            [beginning.prompt for beginning in beginnings],
            self.most,
            torch.tensor([beginning.temperature for beginning in beginnings]),
            torch.Generator().manual_seed(self.seed * MOST_BATCHES + number),
            self.ends,
        )
        longest = max(map(len, texts))
        filled = np.array([text + [NONE] * (longest - len(text)) for text in texts], np.int32)
        write_array(self._path(number), filled)
        return sum(map(len, texts)) - sum(len(beginning.prompt) for beginning in beginnings)

    def _read(self) -> Texts:
        rows = [row for number in range(self.num_batches) for row in np.load(self._path(number))]
        prompts = [0 if self.learns_prompts else len(beginning.prompt) for beginning in self.beginnings]
        return Texts.of_lists([row[row != NONE] for row in rows], prompts)

    def _of_batch(self, number: int) -> Sequence[Beginning]:
        return self.beginnings[number * self.batch_size : (number + 1) * self.batch_size]

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:05}.npy"
