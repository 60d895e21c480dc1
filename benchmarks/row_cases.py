"""What engines are measured by: rows behind others, and prompts."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

PAST = 512
"""Rows in the cache when rows are timed."""
CONTEXT = 1024
Case = dict[str, int]
"""``rows`` or ``prompt``: how many; and how many ``times``."""


def some_tokens(num_tokens: int) -> list[int]:
    """Ordinary tokens that every vocabulary has."""
    return [40 + number * 7919 % 200 for number in range(num_tokens)]


class Engine(Protocol):
    def times(self, case: Case) -> list[float]:
        """Seconds of each run of a case."""
        ...


def clock_of(cpu_time: bool) -> Callable[[], float]:
    """Tells seconds: of the processor, or of the clock."""
    return time.process_time if cpu_time else time.perf_counter


class Alone(ABC):
    """An engine whose model is in its own process, with ``num_cached`` rows in its cache."""

    def __init__(self, cpu_time: bool) -> None:
        self.num_cached = 0
        self._clock = clock_of(cpu_time)

    @abstractmethod
    def keep(self, num_rows: int) -> None:
        """Forget all rows of the cache but the first ``num_rows``."""

    @abstractmethod
    def run(self, tokens: Sequence[int], num_logits: int) -> None:
        """Run a chain of rows behind those of the cache, and have the logits of the last ones."""

    def times(self, case: Case) -> list[float]:
        past = PAST if "rows" in case else 0
        tokens = some_tokens(case["rows"] if past else case["prompt"])
        if self.num_cached < past:
            self.keep(0)
            self.run(some_tokens(past), 1)
        found = []
        for _ in range(case["times"]):
            self.keep(past)
            began = self._clock()
            self.run(tokens, len(tokens) if past else 1)
            found.append(self._clock() - began)
        return found
