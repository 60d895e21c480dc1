"""How slow the core at hand is, for tests that allow a callback or a parser a share of a second."""

import gc
import json
import time

BODY = json.dumps([{"role": "user", "content": []}] * 30_000)
USUAL_S = 0.02
NUM_TRIES = 3


def slowness() -> float:
    """How many times as long as a usual core this one takes to read a megabyte of JSON; 1 at least.

    It is the slowest of some tries: shared cores are several times slower for moments.
    """
    times = []
    gc.disable()  # collections take as long as a test process has objects
    for _ in range(NUM_TRIES):
        began = time.thread_time()
        json.loads(BODY)
        times.append(time.thread_time() - began)
    gc.enable()
    return max(1.0, max(times) / USUAL_S)
