"""The training loop that target and head share: workers, steps, checkpoints, progress, the curve.

A run is a function of its settings: batches follow from seed and step, and gradients are summed in a fixed order. So a
run that was killed and resumed ends with the bits of one that was not.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch
from torch import nn

from exporter.training.optimizer import MuonAdamW, Rates
from exporter.training.workers import Worker
from flowspec_edge.errors import TrainingError

CHECKPOINT_EVERY_S = 180.0  # a kill costs at most this much work
PROGRESS_EVERY = 10  # steps
FIRST_ESTIMATE = 3  # steps after which a run says how long it will take
EVALUATIONS = 8  # over a run
WARMUP_STEPS = 40


@dataclass(frozen=True)
class Plan:
    """What one part of a run does. Its files begin with ``name``.

    ``work_until`` tells how much of the work lies in a first part of the steps, in units of its own.
    """

    name: str
    num_steps: int
    tokens_per_step: int
    micro_batches: int  # per step and worker
    rates: Rates
    weight_decay: float = 0.1
    work_until: Callable[[float], float] = float  # all steps cost the same

    @classmethod
    def for_tokens(cls, name: str, num_tokens: float, tokens_per_step: int, micro_batches: int, peak: float) -> Plan:
        """Learn from so many tokens, at a rate that rises to ``peak``."""
        num_steps = max(1, int(num_tokens // tokens_per_step))
        return cls(name, num_steps, tokens_per_step, micro_batches, Rates(peak, min(WARMUP_STEPS, num_steps // 5)))

    def left_s(self, step: int, spent_s: float) -> float:
        """How long the steps behind ``step`` will take, by what those before it took."""
        done = self.work_until(step / self.num_steps)
        return spent_s * (self.work_until(1.0) - done) / done


LossOf = Callable[[int], torch.Tensor]  # the loss of a micro batch by its number over all steps and workers
Measure = Callable[[], dict[str, float]]  # figures of the held-out text by name, "held_out" (nats) among them


class Training:
    """Trains ``module`` by ``plan``, and continues from the checkpoint in ``directory`` if there is one."""

    def __init__(
        self, module: nn.Module, plan: Plan, directory: Path, worker: Worker, report: Callable[[str], None]
    ) -> None:
        self.module, self.plan, self.directory, self.worker, self.report = module, plan, directory, worker, report
        self.optimizer = MuonAdamW(module, plan.weight_decay, worker.number, worker.num_workers)
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.step, self.cpu_s, self.wall_s = 0, 0.0, 0.0
        self.curve: list[dict[str, float]] = []
        self._is_stopping = False
        self._resume()

    @property
    def path(self) -> Path:
        return self.directory / f"{self.plan.name}.pt"

    def run(self, loss_of: LossOf, measure: Measure, num_steps: int | None = None) -> bool:
        """Train to the plan's end, or for ``num_steps`` steps.

        True when the plan is done, False when it was stopped.
        """
        end = min(self.plan.num_steps, self.step + (num_steps or self.plan.num_steps))
        every = max(1, self.plan.num_steps // EVALUATIONS)
        saved = time.monotonic()
        with self._stop_on_signals():
            while self.step < end and not self._is_stopping:
                started, cpu_before = time.monotonic(), time.process_time()
                loss = self._one_step(loss_of)
                measured = measure() if self.step % every == 0 or self.step == self.plan.num_steps else {}
                self._account(time.monotonic() - started, time.process_time() - cpu_before)
                self._record(loss, measured)
                if time.monotonic() - saved > CHECKPOINT_EVERY_S:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return self.step == self.plan.num_steps

    def _one_step(self, loss_of: LossOf) -> float:
        """Forward, backward, exchange, update. Returns the mean loss over all workers."""
        for parameter in self.parameters:
            parameter.grad = None
        total, shares = 0.0, self.plan.micro_batches * self.worker.num_workers
        for i in range(self.plan.micro_batches):
            loss = loss_of(self.step * shares + self.worker.number * self.plan.micro_batches + i) / shares
            loss.backward()
            total += float(loss.detach())
        total = self._exchange_gradients(total)
        if not total < 1e4:
            peak = self.plan.rates.peak
            raise TrainingError(
                f"{self.plan.name}: the loss is {total} at step {self.step}; lower the peak rate ({peak})"
            )
        self.optimizer.step(self.plan.rates.at(self.step, self.plan.num_steps), self.worker.exchange)
        self.step += 1
        return total

    def _exchange_gradients(self, loss: float) -> float:
        """Sum gradients, loss and the wish to stop over all workers in one message, and clip gradients to a norm of 1.

        Returns the sum of the losses.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        others = torch.tensor([loss, float(self._is_stopping)], device=gradients[0].device)
        flat = torch.cat([*(g.flatten() for g in gradients), others])
        self.worker.exchange(flat)
        body = flat[:-2]
        body.mul_(1.0 / max(1.0, float(body.norm())))
        for gradient, part in zip(gradients, body.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
        self._is_stopping = bool(flat[-1] > 0)
        return float(flat[-2])

    def _account(self, wall_s: float, cpu_s: float) -> None:
        spent = torch.tensor([cpu_s], dtype=torch.float64)
        self.worker.exchange(spent)
        self.cpu_s += float(spent)
        self.wall_s += wall_s

    def _record(self, loss: float, measured: dict[str, float]) -> None:
        self.curve.append({"step": self.step, "loss": loss, "cpu_s": self.cpu_s, "wall_s": self.wall_s, **measured})
        if self.step % PROGRESS_EVERY == 0 or self.step == FIRST_ESTIMATE or measured:
            recent = [p["loss"] for p in self.curve[-PROGRESS_EVERY:]]
            self.report(
                f"{self.plan.name}: step {self.step} of {self.plan.num_steps}, loss {sum(recent) / len(recent):.3f}"
                + "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in measured.items())
                + f", {self.step * self.plan.tokens_per_step / self.wall_s:.0f} tokens/s"
                + f", {self.cpu_s / 3600:.2f} CPU h, {self.plan.left_s(self.step, self.wall_s) / 60:.0f} min left"
            )

    def save(self) -> None:
        """Write the checkpoint aside, then rename: a kill leaves the old one or the new one."""
        if self.worker.number != 0:
            return
        aside = self.path.with_suffix(".part")
        state = {
            "step": self.step,
            "cpu_s": self.cpu_s,
            "wall_s": self.wall_s,
            "curve": self.curve,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            torch.save(state, aside)
            os.replace(aside, self.path)
            (self.directory / f"{self.plan.name}-curve.json").write_text(json.dumps(self.curve))
        except (OSError, RuntimeError) as cause:  # torch reports a full disk as RuntimeError
            raise TrainingError(f"{self.path}: the checkpoint cannot be written: {cause}") from cause

    def _resume(self) -> None:
        if not self.path.exists():
            return
        state = read_checkpoint(self.path)
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.cpu_s, self.wall_s, self.curve = (state[k] for k in ("step", "cpu_s", "wall_s", "curve"))
        if self.worker.number == 0:
            self.report(f"{self.plan.name}: going on from step {self.step} of {self.plan.num_steps}")

    @contextmanager
    def _stop_on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step, with a checkpoint."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._is_stopping = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, action in before.items():
                signal.signal(number, action)


def read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as cause:
        raise TrainingError(
            f"{path}: not a checkpoint of this trainer ({type(cause).__name__}); delete it to start over"
        ) from cause
    return state
