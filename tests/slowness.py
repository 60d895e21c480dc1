"""How slow the core at hand is, for tests that allow a callback or a parser a share of a second."""

import time

LOOP, USUAL_S = 200_000, 0.02


def slowness() -> float:
    """How many times as long as a usual core this one takes for a loop; 1 at least."""
    began, total = time.thread_time(), 0
    for number in range(LOOP):
        total += number * number
    return max(1.0, (time.thread_time() - began) / USUAL_S)
