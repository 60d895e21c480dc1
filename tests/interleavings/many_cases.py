"""Many cases of ``cases.py``, in as many processes as there are cores.

None of this is in ``__main__``, where a process that is spawned finds nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tests.interleavings.cases import FAULTS, Case, play
from tests.interleavings.strategies import cases
from tests.yielding import yield_to_others

CASES_PER_CHUNK = 50
"""Cases that hypothesis draws from one seed. Progress is told after each chunk, some four seconds of one core."""
OUTCOMES = (
    "text: stop",
    "text: length",
    "text: cancelled",
    "text: refused",
    "given up: no room",
    "given up: rings in a row",
    "rings of a text: 4",
    "rings lost",
    "rings moved",
    "texts moved",
    "openings failed",
    "waits for boards",
    "nodes used again",
    "ways used again",
)
"""What has to be met, or the cases are none."""


def play_chunk(chunk: tuple[int, int]) -> tuple[Counter[str], str | None]:
    """So many cases drawn from a seed: what was met, and the falsifying case with its error."""
    seed, num = chunk
    tally = Counter[str]()
    failing: Case | None = None

    @seeded(seed)
    @settings(
        max_examples=num,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(cases())
    def play_all(case: Case) -> None:
        nonlocal failing
        if failing is None:
            tally["cases"] += 1
        try:
            tally.update(play(case))
        except Exception:
            failing = case
            raise

    try:
        play_all()
    except Exception:
        return tally, f"{traceback.format_exc(limit=-4)}\n--case '{failing}'"
    return tally, None


def play_many(num: int, seed: int, tell: Callable[[int], None], *, yields: bool = False) -> dict[str, Any]:
    """``num`` cases on all cores; where it ``yields``, in the time that nobody else wants. ``tell`` hears how many are
    done, and ends it where it raises.
    """
    began, tally, found = time.monotonic(), Counter[str](), []
    rng = random.Random(seed)
    sizes = [CASES_PER_CHUNK] * (num // CASES_PER_CHUNK) + [num % CASES_PER_CHUNK] * (num % CASES_PER_CHUNK > 0)
    chunks = [(rng.getrandbits(64), size) for size in sizes]
    context, initializer = multiprocessing.get_context("spawn"), yield_to_others if yields else None
    with ProcessPoolExecutor(os.cpu_count(), context, initializer) as pool:
        try:
            for played in as_completed([pool.submit(play_chunk, chunk) for chunk in chunks]):
                counts, falsifying = played.result()
                tally += counts
                tell(tally["cases"])
                if falsifying is not None:
                    found.append(falsifying)
                    break
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    missed = [name for name in (*FAULTS, *OUTCOMES) if not tally[name]]
    return {
        "seed": seed,
        "cases": tally["cases"],
        "found": found,
        "missed": missed,
        "met": dict(sorted(tally.items())),
        "s": round(time.monotonic() - began, 1),
    }
