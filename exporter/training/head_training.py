"""Trains a head on texts, whatever they are: the one way for the demo model's head and for any other."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from exporter.training.batches import Batch, Order, Texts
from exporter.training.draft_loss import draft_loss
from exporter.training.features import Features
from exporter.training.least_squares import fit_rows
from exporter.training.loop import Plan, Training
from exporter.training.network import Drafting
from exporter.training.recall import measure_recall
from exporter.training.workers import Report, Worker

MEASURED = 8
"""Texts that are measured together."""
FITTED_TOKENS = 60_000
"""Of all workers together, that a new head is fitted to before it learns."""
ONE_DEEP = 0.5
"""Of a training, its first part, in which single drafts are learned: they cost least, and all deeper ones rest on
them."""
DEEPER_COSTS = 0.7
"""Of a step with single drafts, what each further draft in a row adds: 1.5 and 4.7 s with one and with four, for a
target of 135 M parameters."""


@dataclass(frozen=True)
class HeadSettings:
    """How a head is trained.

    Attributes:
        peak: the highest learning rate.
        batch_size: texts of a micro batch.
        micro_batches: per step and worker.
        draft_steps: how deep the head drafts from its own rows at the end of its training.
        most_measured: held-out texts, each time that they are measured.
    """

    peak: float = 1e-3
    batch_size: int = 4
    micro_batches: int = 2
    draft_steps: int = 4
    most_measured: int = 1000
    seed: int = 0

    def depth_at(self, done: float) -> int:
        """How many drafts in a row are learned when so much of a training is done: one at first, then ever more."""
        return 1 + int(self.draft_steps * max(0.0, done - ONE_DEEP) / (1 - ONE_DEEP))

    def plan(self, num_tokens: float, lessons: Sequence[Texts], num_workers: int) -> Plan:
        """Of a training on ``num_tokens`` tokens."""
        mean = sum(float(texts.lengths.mean()) - 1 for texts in lessons) / len(lessons)
        tokens_per_step = max(1, round(mean * self.batch_size * self.micro_batches * num_workers))
        plan = Plan.for_tokens("head", num_tokens, tokens_per_step, self.micro_batches, self.peak)
        return replace(plan, work_until=self.work_until)

    def work_until(self, done: float) -> float:
        """In the first part ``done`` of a training, in units of one of single drafts alone."""
        deeper = max(0.0, done - ONE_DEEP) ** 2 / (1 - ONE_DEEP) / 2  # as the depth rises evenly
        return done + DEEPER_COSTS * (self.draft_steps - 1) * deeper


class HeadTraining:
    """A head that learns from ``lessons`` in turn, and is measured on ``held_out``. The files are in ``directory``."""

    def __init__(
        self,
        drafting: Drafting,
        lessons: Sequence[Texts],
        held_out: Texts,
        plan: Plan,
        settings: HeadSettings,
        directory: Path,
        worker: Worker,
    ) -> None:
        self.drafting, self.plan, self.settings, self.worker = drafting, plan, settings, worker
        self.directory = directory
        num_texts = plan.num_steps * plan.micro_batches * worker.num_workers * settings.batch_size / len(lessons)
        self._lessons = [
            (
                Order(texts, settings.batch_size, settings.seed + number),
                self._features(texts, f"lesson-{number}", num_texts > len(texts)),
            )
            for number, texts in enumerate(lessons)
        ]
        self._held_out = held_out.part(range(min(len(held_out), settings.most_measured)))
        self._held_out_features = self._features(self._held_out, "held-out", True)

    def begin(self) -> None:
        """Fit a new head by least squares. One that has a checkpoint is left as it is."""
        if not (self.directory / f"{self.plan.name}.pt").exists():
            fit_rows(self.drafting, list(self._fitted()), self.worker.exchange)

    def run(self, report: Report, num_steps: int | None = None) -> bool:
        """Train to the plan's end, or for ``num_steps`` steps. False when it was stopped before its end."""
        training = Training(self.drafting.head, self.plan, self.directory, self.worker, report)
        return training.run(self.loss_of, self.measure, num_steps)

    def loss_of(self, number: int) -> torch.Tensor:
        """Of a micro batch by its number over all steps and workers."""
        order, features = self._lessons[number % len(self._lessons)]
        batch = order.batch(number // len(self._lessons))
        done = number / (self.plan.num_steps * self.plan.micro_batches * self.worker.num_workers)
        return draft_loss(self.drafting, batch, features.batch(batch), self.settings.depth_at(done))

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The loss, the share of first guesses that are the target's likeliest token, and the tokens of a chain."""
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, features in self._measured():
            sums += torch.tensor([float(draft_loss(self.drafting, batch, features, self.settings.draft_steps)), 1.0])
        recall = measure_recall(self.drafting, self._measured(), self.settings.draft_steps)
        for part in (sums, recall.hits, recall.counts, recall.chains):
            self.worker.exchange(part)
        return {
            "held_out": float(sums[0] / sums[1]),
            "first_guess_right": recall.shares()[0][1],
            "tokens_per_chain": recall.tokens_per_chain,
        }

    def _fitted(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """This worker's part of the texts that a new head is fitted to: the first that it learns from."""
        for order, features in self._lessons:
            tokens_per_batch = float(order.texts.lengths.mean()) * order.size
            num_batches = math.ceil(FITTED_TOKENS / len(self._lessons) / tokens_per_batch)
            most = math.ceil(len(order.texts) / order.size)
            for number in range(self.worker.number, min(num_batches, most), self.worker.num_workers):
                batch = order.batch(number)
                yield batch, features.batch(batch)

    def _measured(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """This worker's part of the held-out texts."""
        firsts = range(0, len(self._held_out), MEASURED)
        for first in firsts[self.worker.number :: self.worker.num_workers]:
            batch = self._held_out.batch(range(first, min(first + MEASURED, len(self._held_out))))
            yield batch, self._held_out_features.batch(batch)

    def _features(self, texts: Texts, name: str, is_needed_again: bool) -> Features:
        num_bytes = 2 * int(texts.lengths.sum()) * self.drafting.target.shape.hidden_size
        path = self.directory / f"{name}.features"
        has_room = path.exists() or 2 * num_bytes < shutil.disk_usage(self.directory).free
        return Features(self.drafting.target, texts, path if is_needed_again and has_room else None)
