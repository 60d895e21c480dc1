"""How far a comparison is, on standard error: one line that is rewritten on a terminal, a few plain ones elsewhere."""

from __future__ import annotations

import sys
import time

PLAIN_EVERY_S = 10.0


class Progress:
    """Counts ``num_tasks`` tasks that take about as long each; ``noun`` says what they are."""

    def __init__(self, what: str, num_tasks: int, noun: str = "prompts") -> None:
        self._what, self._num_tasks, self._noun = what, num_tasks, noun
        self._num_done = 0
        self._began = self._shown_at = time.monotonic()
        self._is_rewritten = sys.stderr.isatty()
        self._show("starting")

    def step(self) -> None:
        """Count one more task as done."""
        self._num_done += 1
        now = time.monotonic()
        passed = now - self._began
        if self._num_done == self._num_tasks:
            self._show(f"done in {passed:.0f} s")
        elif self._is_rewritten or now - self._shown_at >= PLAIN_EVERY_S:
            self._shown_at = now
            left = passed / self._num_done * (self._num_tasks - self._num_done)
            self._show(f"about {left:.0f} s left")

    def close(self) -> None:
        """End the line, also where some tasks were not done."""
        if self._is_rewritten:
            print(file=sys.stderr)

    def _show(self, state: str) -> None:
        line = f"{self._what}: {self._num_done} of {self._num_tasks} {self._noun}, {state}"
        start, end = ("\r\033[K", "") if self._is_rewritten else ("", "\n")
        print(start + line, end=end, file=sys.stderr, flush=True)
