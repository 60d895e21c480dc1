"""Runs the whole training of the demo model in one directory: text, target, texts that the target writes, head.

Each is made once and kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from exporter.config import LayerShape
from exporter.training.batches import Order, Texts
from exporter.training.files import load_head, open_source, read_target, save_head, save_target
from exporter.training.head_training import HeadSettings, HeadTraining
from exporter.training.kept_files import check_same_run
from exporter.training.loop import Plan, Training
from exporter.training.network import DraftHead, Drafting, Target, initialize
from exporter.training.own_texts import Beginning, OwnTexts
from exporter.training.shapes import llama_shape
from exporter.training.text import DEMO_MODEL, Limits, candidates, gather, held_out_tokens
from exporter.training.workers import Report, Worker, run_workers
from flowspec_edge.errors import TrainingError

TOKENIZER = DEMO_MODEL / "target/tokenizer.json"
VOCAB_SIZE, NUM_LAYERS = 2048, 8
TEMPERATURES = (0.6, 0.0, 0.6, 0.8)  # at which the target writes its texts, in turn; demo and benchmark use them
PROMPT_ROWS = 64  # tokens of training text with which each of these texts starts


@dataclass(frozen=True)
class Settings:
    """What a run trains. Sizes are in tokens. A micro batch is ``windows`` texts of ``rows`` tokens."""

    directory: Path
    extra_text: tuple[Path, ...] = ()
    start_from: Path | None = None
    target_tokens: int = 10_000_000
    head_tokens: int = 2_500_000
    own_tokens: int = 400_000
    target_peak: float = 3e-3
    head_peak: float = 1e-3
    rows: int = 512
    windows: int = 4
    micro_batches: int = 2
    head_rows: int = 256
    measured_windows: int = 1000  # at most, each time the held-out loss is measured
    num_workers: int = 2
    seed: int = 0
    is_compiled: bool = True
    num_layers: int = NUM_LAYERS
    shape: LayerShape = field(default_factory=partial(llama_shape, 256, 704, 4, 2, 64))
    limits: Limits = field(default_factory=Limits)

    @property
    def keeps_target(self) -> bool:
        """Whether the target stays as it is, and only a head is trained for it."""
        return self.target_tokens == 0

    @property
    def of_head(self) -> HeadSettings:
        return HeadSettings(
            peak=self.head_peak,
            micro_batches=self.micro_batches,
            most_measured=self.measured_windows,
            seed=self.seed + 2,
        )

    def fixed(self) -> dict[str, Any]:
        """The settings that may not change while a run is continued."""
        return {
            "text": [str(path) for path in self.extra_text],
            "start_from": str(self.start_from) if self.start_from else None,
            "keeps_target": self.keeps_target,
            "rows": self.rows,
            "windows": self.windows,
            "micro_batches": self.micro_batches,
            "num_workers": self.num_workers,
            "seed": self.seed,
        }

    def target_plan(self) -> Plan:
        tokens_per_step = self.windows * self.rows * self.micro_batches * self.num_workers
        return Plan.for_tokens("target", self.target_tokens, tokens_per_step, self.micro_batches, self.target_peak)


def train(settings: Settings, report: Report, num_steps: int | None = None) -> bool:
    """Begin or continue the run in ``settings.directory``. True when all is done, False when it was stopped.

    Raises:
        TrainingError: there is nothing to train, the directory holds a run of other settings, a worker was lost, or
            there is no text.
    """
    directory = settings.directory
    if settings.keeps_target and settings.start_from is None:
        raise TrainingError(
            "no target tokens and no target to keep; name one with --start-from, or ask for --target-tokens"
        )
    directory.mkdir(parents=True, exist_ok=True)
    check_same_run(directory, settings.fixed())
    if not (directory / "tokens.npy").exists():
        found = list(candidates(settings.extra_text))
        gather(directory, Tokenizer.from_file(str(TOKENIZER)), found, settings.limits, report)
    return run_workers(partial(work, settings, num_steps), settings.num_workers, directory, report)


def work(settings: Settings, num_steps: int | None, worker: Worker, report: Report) -> bool:
    """Do all parts of the run as one of its workers."""
    tokens = np.load(settings.directory / "tokens.npy", mmap_mode="r")
    held_out = held_out_tokens(Tokenizer.from_file(str(TOKENIZER)))
    target = new_target(settings)
    if not train_target(settings, target, tokens, held_out, worker, report, num_steps):
        return False
    own = own_texts(settings, tokens).write(target.requires_grad_(False), worker, report)
    lessons = [Texts.in_windows(tokens, settings.head_rows), own]
    head = new_head(settings, target)
    training = HeadTraining(
        Drafting(target, head),
        lessons,
        Texts.in_windows(held_out, settings.head_rows),
        settings.of_head.plan(settings.head_tokens, lessons, settings.num_workers),
        settings.of_head,
        settings.directory,
        worker,
    )
    if settings.start_from is None:
        training.begin()
    done = training.run(report, num_steps)
    if done and worker.number == 0:
        save_head(head, settings.directory / "model/eagle", VOCAB_SIZE, bos_token_id=0, eos_token_id=0)
    return done


def new_target(settings: Settings) -> Target:
    if settings.start_from:
        return read_target(open_source(settings.start_from / "target")).requires_grad_(not settings.keeps_target)
    target = Target(settings.shape, settings.num_layers, VOCAB_SIZE)
    initialize(target, settings.seed)
    return target


def new_head(settings: Settings, target: Target) -> DraftHead:
    if settings.start_from:
        return load_head(settings.start_from / "eagle", target.shape)
    head = DraftHead(target.shape)
    initialize(head, settings.seed + 2)
    return head


def train_target(
    settings: Settings,
    target: Target,
    tokens: np.ndarray,
    held_out: np.ndarray,
    worker: Worker,
    report: Report,
    num_steps: int | None,
) -> bool:
    if settings.keeps_target:
        if worker.number == 0:
            save_target(target, settings.directory / "model/target", TOKENIZER)
        return True
    order = Order(Texts.in_windows(tokens, settings.rows), settings.windows, settings.seed)
    forward = torch.compile(target) if settings.is_compiled else target

    def loss_of(number: int) -> torch.Tensor:
        batch = order.batch(number).tokens
        loss: torch.Tensor = forward(batch[:, :-1], batch[:, 1:])
        return loss

    measured = Texts.in_windows(held_out, settings.rows)
    measured = measured.part(range(min(len(measured), settings.measured_windows)))
    training = Training(target, settings.target_plan(), settings.directory, worker, report)
    done = training.run(loss_of, lambda: {"held_out": mean_loss(target, measured, worker)}, num_steps)
    if done and worker.number == 0:
        save_target(target, settings.directory / "model/target", TOKENIZER)
    return done


@torch.no_grad()
def mean_loss(target: Target, texts: Texts, worker: Worker) -> float:
    """Nats per token over all texts, which are of one length, shared between the workers."""
    total = torch.zeros(1, dtype=torch.float64)
    for number in range(worker.number, len(texts), worker.num_workers):
        window = texts.batch([number]).tokens
        total += target(window[:, :-1], window[:, 1:]).double()
    worker.exchange(total)
    return float(total) / len(texts)


def own_texts(settings: Settings, tokens: np.ndarray) -> OwnTexts:
    """Texts that begin with some tokens of the training text, and have ``head_rows + 1``."""
    batch_size = 64
    num_texts = batch_size * -(-settings.own_tokens // (batch_size * settings.head_rows))
    starts = Order(Texts.in_windows(tokens, PROMPT_ROWS), num_texts, settings.seed + 1).batch(0).tokens
    beginnings = [
        Beginning(start[:PROMPT_ROWS], TEMPERATURES[number % len(TEMPERATURES)])
        for number, start in enumerate(starts.tolist())
    ]
    return OwnTexts(
        settings.directory / "own",
        beginnings,
        settings.head_rows + 1,
        settings.seed,
        batch_size,
        learns_prompts=True,
    )
