"""What processes take as time goes on, and whether it grows."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

COUNT_S = 2.0
"""How long a process may take to tell its counts."""
MIN_SAMPLES = 6
"""A process with fewer samples in one state was not in it for long enough to be judged."""
MAX_GROWTH = 0.05
"""Of memory, from the first third of a process's samples to the last."""
MIN_GROWN_MB = 1.0
"""Less is noise: an arena of Python's own allocator is a quarter of that."""
MAX_MORE = 1.0
"""Tasks, threads or descriptors by which the least of a third may differ though nothing stays."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one time.

    ``pss_mb`` counts pages that several processes share in parts, ``anonymous_mb`` only those that no file backs.
    ``num_threads`` leaves out those of the event loop's pool.
    """

    at_s: float
    pss_mb: float
    rss_mb: float
    anonymous_mb: float
    num_descriptors: int
    num_threads: int
    num_tasks: int
    num_blocks: int
    num_layers: int
    num_stages: int

    @property
    def state(self) -> str:
        """What the process does, which it takes memory, tasks and descriptors for."""
        return f"{self.num_layers} layers, {'serving' if self.num_stages else 'idle'}"


@dataclass(slots=True)
class Watched:
    """A process and its samples. ``counts`` is the file to which it tells its counts; see ``counted.py``."""

    name: str
    pid: int
    counts: Path

    async def sample(self, began: float) -> Sample | None:
        """None where the process has ended, or is too busy to count."""
        self.counts.unlink(missing_ok=True)
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, TimeoutError):
            os.kill(self.pid, signal.SIGUSR1)
            async with asyncio.timeout(COUNT_S):
                while not self.counts.exists():
                    await asyncio.sleep(0.02)
            told = json.loads(self.counts.read_text())
            process = Path(f"/proc/{self.pid}")
            memory = dict(line.split(":") for line in (process / "smaps_rollup").read_text().splitlines()[1:])
            pss_mb, rss_mb, anonymous_mb = (int(memory[name].split()[0]) / 1024 for name in ("Pss", "Rss", "Anonymous"))
            num_descriptors, num_threads = (len(list((process / name).iterdir())) for name in ("fd", "task"))
            num_threads -= told.pop("num_pooled")
            return Sample(
                round(time.monotonic() - began, 1), pss_mb, rss_mb, anonymous_mb, num_descriptors, num_threads, **told
            )
        return None


def growth(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """What a process took in each state that it was in, of the first and the last third of these samples, and
    ``grown``: what has become more. Memory is the median; of what is counted it is the least, for whoever is greeted
    or asked just then has a few tasks more.
    """
    found = {}
    for state in sorted({sample.state for sample in samples}):
        alike = [sample for sample in samples if sample.state == state]
        if len(alike) >= MIN_SAMPLES:
            found[state] = _growth(alike)
    return found


def _growth(samples: Sequence[Sample]) -> dict[str, Any]:
    third = len(samples) // 3
    figures: dict[str, Any] = {"num_samples": len(samples)}
    grown = []
    for name in [field.name for field in fields(Sample) if field.name not in ("at_s", "num_layers", "num_stages")]:
        is_memory = name.endswith("_mb")
        judge = statistics.median if is_memory else min
        first, last = (
            judge([getattr(sample, name) for sample in part]) for part in (samples[:third], samples[-third:])
        )
        figures[name] = [round(first, 2), round(last, 2)]
        if is_memory:
            is_grown = last > first * (1 + MAX_GROWTH) and last > first + MIN_GROWN_MB
        else:
            is_grown = name != "num_blocks" and last > first + MAX_MORE
        if is_grown:
            grown.append(name)
    return {**figures, "grown": grown}
