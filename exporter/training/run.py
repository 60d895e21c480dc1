"""Runs the whole training in one directory: text, target, texts that the target writes, head.

Each is made once and kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import multiprocessing

from exporter.training.batches import Windows, in_windows
from exporter.training.draft_loss import draft_loss
from exporter.training.loop import Plan, Training, Worker
from exporter.training.network import (
    DraftHead,
    Shape,
    Target,
    initialize,
    load_head,
    load_target,
    save_head,
    save_target,
)
from exporter.training.optimizer import Rates
from exporter.training.sampling import continue_texts
from exporter.training.text import DEMO_MODEL, Limits, candidates, gather, held_out_tokens, write_array
from flowspec_edge.errors import TrainingError

TOKENIZER = DEMO_MODEL / "target/tokenizer.json"
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
    head_peak: float = 3e-3
    rows: int = 512
    windows: int = 4
    micro_batches: int = 2
    head_rows: int = 256
    head_windows: int = 4
    draft_steps: int = 4
    measured_windows: int = 1000  # at most, each time the held-out loss is measured
    num_workers: int = 2
    seed: int = 0
    is_compiled: bool = True
    shape: Shape = field(default_factory=Shape)
    limits: Limits = field(default_factory=Limits)

    @property
    def keeps_target(self) -> bool:
        """Whether the target stays as it is, and only a head is trained for it."""
        return self.target_tokens == 0

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

    def plan(self, name: str, tokens: int, peak: float, windows: int, rows: int) -> Plan:
        tokens_per_step = windows * rows * self.micro_batches * self.num_workers
        num_steps = max(1, tokens // tokens_per_step)
        return Plan(name, num_steps, tokens_per_step, self.micro_batches, Rates(peak, min(40, num_steps // 5)))


Report = Callable[[str], None]


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
    check_same_run(settings)
    if not (directory / "tokens.npy").exists():
        found = list(candidates(settings.extra_text))
        gather(directory, Tokenizer.from_file(str(TOKENIZER)), found, settings.limits, report)
    meeting = directory / f"meeting-{os.getpid()}"
    meeting.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=work_quietly, args=(settings, Worker(i, settings.num_workers), meeting), daemon=True)
        for i in range(1, settings.num_workers)
    ]
    for process in others:
        process.start()
    try:
        return work(settings, Worker(0, settings.num_workers), meeting, report, num_steps)
    finally:
        for process in others:
            process.join(timeout=10)
            process.kill()
        meeting.unlink(missing_ok=True)


def check_same_run(settings: Settings) -> None:
    path = settings.directory / "run.json"
    wanted = settings.fixed()
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1))
        return
    found = json.loads(path.read_text())
    for key, value in wanted.items():
        if found.get(key) != value:
            raise TrainingError(
                f"{settings.directory}: holds a run with {key} = {found.get(key)}, not {value}; "
                "give the same options to go on with it, or another --run directory"
            )


def work_quietly(settings: Settings, worker: Worker, meeting: Path) -> None:
    try:
        work(settings, worker, meeting, lambda line: None)
    except TrainingError:
        raise SystemExit(1) from None  # worker 0 says why


def work(settings: Settings, worker: Worker, meeting: Path, report: Report, num_steps: int | None = None) -> bool:
    """Do all parts of the run as one of its workers."""
    torch.set_num_threads(1)  # two threads of one process wait for each other on a busy machine
    worker.join(meeting)
    try:
        tokens = np.load(settings.directory / "tokens.npy", mmap_mode="r")
        held_out = held_out_tokens(Tokenizer.from_file(str(TOKENIZER)))
        target = new_target(settings)
        if not train_target(settings, target, tokens, held_out, worker, report, num_steps):
            return False
        own = write_own_texts(settings, target, tokens, worker, report)
        return train_head(settings, target, tokens, own, held_out, worker, report, num_steps)
    finally:
        worker.leave()


def new_target(settings: Settings) -> Target:
    if settings.start_from:
        return load_target(settings.start_from / "target")
    target = Target(settings.shape)
    initialize(target, settings.seed)
    return target


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
    plan = settings.plan("target", settings.target_tokens, settings.target_peak, settings.windows, settings.rows)
    windows = Windows(tokens, settings.rows, settings.seed)
    forward = torch.compile(target) if settings.is_compiled else target

    def loss_of(number: int) -> torch.Tensor:
        batch = windows.batch(number, settings.windows)
        loss: torch.Tensor = forward(batch[:, :-1], batch[:, 1:])
        return loss

    measured = in_windows(held_out, settings.rows)[: settings.measured_windows]
    training = Training(target, plan, settings.directory, worker, report)
    done = training.run(loss_of, partial(mean_loss, target, measured, worker), num_steps)
    if done and worker.number == 0:
        save_target(target, settings.directory / "model/target", TOKENIZER)
    return done


@torch.no_grad()
def mean_loss(target: Target, windows: torch.Tensor, worker: Worker) -> float:
    """Nats per token over all windows, shared between the workers."""
    total = torch.zeros(1, dtype=torch.float64)
    for number in range(worker.number, len(windows), worker.num_workers):
        window = windows[number : number + 1]
        total += target(window[:, :-1], window[:, 1:]).double()
    worker.exchange(total)
    return float(total) / len(windows)


def write_own_texts(
    settings: Settings, target: Target, tokens: np.ndarray, worker: Worker, report: Report
) -> np.ndarray:
    """Have the target write texts, [texts, head_rows + 1]. A kill costs at most the batch under way."""
    batch_size = 64
    num_batches = -(-settings.own_tokens // (batch_size * settings.head_rows))
    directory = settings.directory / "own"
    directory.mkdir(exist_ok=True)
    prompts = Windows(tokens, PROMPT_ROWS, settings.seed + 1)
    for number in range(worker.number, num_batches, worker.num_workers):
        path = directory / f"{number:05}.npy"
        if path.exists():
            continue
        temperature = torch.tensor([TEMPERATURES[i % len(TEMPERATURES)] for i in range(batch_size)])
        texts = continue_texts(
            target,
            prompts.batch(number, batch_size)[:, :PROMPT_ROWS],
            settings.head_rows + 1 - PROMPT_ROWS,
            temperature,
            torch.Generator().manual_seed(settings.seed * num_batches + number),
        )
        write_array(path, texts.numpy().astype(np.uint16))
        report(f"own texts: batch {number + 1} of {num_batches}")
    worker.exchange(torch.zeros(1))  # waits until all workers have written
    return np.concatenate([np.load(directory / f"{number:05}.npy") for number in range(num_batches)])


def train_head(
    settings: Settings,
    target: Target,
    tokens: np.ndarray,
    own: np.ndarray,
    held_out: np.ndarray,
    worker: Worker,
    report: Report,
    num_steps: int | None,
) -> bool:
    """Train the head on the target's own texts and on the training text in turn."""
    target.requires_grad_(False)
    head = DraftHead(target.shape)
    initialize(head, settings.seed + 2)
    if settings.start_from:
        head = load_head(settings.start_from / "eagle", target.shape)
    plan = settings.plan("head", settings.head_tokens, settings.head_peak, settings.head_windows, settings.head_rows)
    windows = Windows(tokens, settings.head_rows, settings.seed + 2)
    own_windows = Windows(own.reshape(-1), own.shape[1], settings.seed + 3)
    loss_on = torch.compile(draft_loss) if settings.is_compiled else draft_loss

    def loss_of(number: int) -> torch.Tensor:
        source = own_windows if number % 2 else windows
        batch = source.batch(number // 2, settings.head_windows)[:, : settings.head_rows + 1]
        loss: torch.Tensor = loss_on(head, target, batch, settings.draft_steps)
        return loss

    training = Training(head, plan, settings.directory, worker, report)
    measured = in_windows(held_out, settings.head_rows)[: settings.measured_windows]
    done = training.run(loss_of, partial(mean_draft_loss, head, target, measured, settings, worker), num_steps)
    if done and worker.number == 0:
        save_head(head, settings.directory / "model/eagle")
    return done


@torch.no_grad()
def mean_draft_loss(
    head: DraftHead, target: Target, windows: torch.Tensor, settings: Settings, worker: Worker
) -> float:
    total = torch.zeros(1, dtype=torch.float64)
    for number in range(worker.number, len(windows), worker.num_workers):
        total += draft_loss(head, target, windows[number : number + 1], settings.draft_steps).double()
    worker.exchange(total)
    return float(total) / len(windows)
