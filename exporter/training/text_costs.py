"""What a text costs on this machine: to be written, to be run, and to be learned from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from exporter.training.batches import Texts
from exporter.training.draft_loss import draft_loss
from exporter.training.head_training import ONE_DEEP
from exporter.training.network import Drafting
from exporter.training.sampling import continue_texts

BEGUN, STEPS = 16, 8
DEEPER = (1 - ONE_DEEP) / 2
"""Of what the deepest drafts cost more than single ones, that share is spent on average: depth rises evenly."""


@dataclass(frozen=True)
class TextCosts:
    """Seconds of one process for a text of so many rows, every one of which the target writes."""

    writing_s: float
    running_s: float
    learning_s: float


def measure_text_costs(drafting: Drafting, rows: int, at_once: int, draft_steps: int) -> TextCosts:
    """Of texts that are written ``at_once``. Takes some seconds, and leaves gradients in the head."""
    target = drafting.target
    batch = Texts.of_lists([[1] * (rows + 1)], [0]).batch([0])
    tokens = batch.tokens.to(target.device)
    features = target.features(tokens)

    def write(num_new: int) -> None:
        continue_texts(target, [[1] * BEGUN] * at_once, BEGUN + num_new, torch.ones(at_once), torch.Generator())

    def learn(depth: int) -> None:
        draft_loss(drafting, batch, features, depth).backward()

    begun_s, written_s = _seconds_of(lambda: write(1)), _seconds_of(lambda: write(1 + STEPS))
    step_s = max(0.0, written_s - begun_s) / STEPS
    running_s = _seconds_of(lambda: target.features(tokens))
    shallow_s, deep_s = _seconds_of(lambda: learn(1)), _seconds_of(lambda: learn(draft_steps))
    return TextCosts(step_s * rows / at_once, running_s, shallow_s + DEEPER * (deep_s - shallow_s))


def _seconds_of(action: Callable[[], object]) -> float:
    """Of the faster of two times."""
    spent = []
    for _ in range(2):
        began = time.monotonic()
        action()
        spent.append(time.monotonic() - began)
    return min(spent)
