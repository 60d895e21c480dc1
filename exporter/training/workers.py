"""Processes of one thread each that share the work of a run: two threads of one process wait for each other whenever
the machine does something else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from flowspec_edge.errors import FlowspecError, TrainingError

LOST_WORKER_S = 900.0  # a step takes seconds; on a busy machine a minute

Report = Callable[[str], None]


@dataclass(frozen=True)
class Worker:
    """One of the processes that share a step. The worker with ``number`` 0 writes files and progress."""

    number: int = 0
    num_workers: int = 1

    def exchange(self, tensor: torch.Tensor) -> None:
        """Replace ``tensor`` by its sum over all workers.

        Raises:
            TrainingError: another worker is gone.
        """
        if self.num_workers == 1:
            return
        try:
            distributed.all_reduce(tensor)
        except RuntimeError as cause:
            raise TrainingError(
                f"worker {self.number} of {self.num_workers}: another worker is gone ({str(cause).splitlines()[0]}); "
                "start again with the same --run directory to go on from the last checkpoint"
            ) from cause

    def join(self, meeting: Path) -> None:
        """Meet the other workers through the file ``meeting``, which must not exist before.

        Raises:
            TrainingError: another worker did not come.
        """
        if self.num_workers == 1:
            return
        try:
            distributed.init_process_group(
                "gloo",
                init_method=f"file://{meeting}",
                rank=self.number,
                world_size=self.num_workers,
                timeout=timedelta(seconds=LOST_WORKER_S),
            )
        except RuntimeError as cause:
            raise TrainingError(
                f"worker {self.number} of {self.num_workers}: not all workers came within {LOST_WORKER_S:.0f} s "
                f"({str(cause).splitlines()[0]}); try --workers 1"
            ) from cause

    def leave(self) -> None:
        if self.num_workers > 1:
            distributed.destroy_process_group()


Work = Callable[[Worker, Report], bool]
"""What each worker does: True when all is done, False when it was stopped. It is pickled for other processes."""


def run_workers(work: Work, num_workers: int, directory: Path, report: Report) -> bool:
    """Do ``work`` in this process and in ``num_workers - 1`` others, which meet through a file in ``directory``.

    Raises:
        TrainingError: a worker was lost.
        FlowspecError: what the work raises in this process.
    """
    meeting = directory / f"meeting-{os.getpid()}"
    meeting.unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_work_quietly, args=(work, Worker(i, num_workers), meeting), daemon=True)
        for i in range(1, num_workers)
    ]
    for process in others:
        process.start()
    try:
        return _work(work, Worker(0, num_workers), meeting, report)
    finally:
        for process in others:
            process.join(timeout=10)
            process.kill()
        meeting.unlink(missing_ok=True)


def _work_quietly(work: Work, worker: Worker, meeting: Path) -> None:
    try:
        _work(work, worker, meeting, lambda line: None)
    except (FlowspecError, KeyboardInterrupt):
        raise SystemExit(1) from None  # worker 0 says why


def _work(work: Work, worker: Worker, meeting: Path, report: Report) -> bool:
    torch.set_num_threads(1)
    worker.join(meeting)
    try:
        return work(worker, report)
    finally:
        worker.leave()
