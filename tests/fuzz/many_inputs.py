"""Many broken inputs, and what came of them. A hundredth of them goes to what is alive: links to a node and HTTP
requests.

None of this is in ``__main__``, where a process that is spawned finds nothing.
"""

from __future__ import annotations

import asyncio
import collections
import faulthandler
import logging
import multiprocessing
import os
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tests.fuzz.kinds import KINDS
from tests.fuzz.live import Tally, try_http, try_node
from tests.yielding import yield_to_others

HANG_S = 30.0
"""A single input that takes this long ends the run, with the stacks of all threads."""
PATIENCE = 20.0
"""So many times as long where others come first, for they may leave little time."""
LIVE_SHARE = 0.01
MAX_SHOWN = 5
WARM_UP = 2000
"""Inputs after which the memory of the process is looked at for the first time."""
MAX_GROWN_MB = 8.0
"""What a process may take more at the end of a kind of input than after WARM_UP: pools of the allocator, no leak."""
RANGES_PER_KIND = 4
"""Into so many tasks the inputs of a kind are divided, for the processes to share."""


def try_kind(name: str, first: int, stop: int, seed: int, patience: float = 1.0) -> dict[str, Any]:
    """The inputs of a kind with the numbers from ``first`` up to ``stop``. ``patience`` multiplies HANG_S."""
    logging.disable(logging.CRITICAL)
    try_one, _ = KINDS[name]
    counts: collections.Counter[str] = collections.Counter()
    slowest_s, began, grown_from = 0.0, time.monotonic(), 0
    for number in range(first, stop):
        started = time.monotonic()
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HANG_S * patience, exit=True, file=sys.__stderr__ or 2)
        if number == first + WARM_UP:
            grown_from = resident_bytes()
        try:
            counts[try_one(random.Random(f"{seed}/{name}/{number}"))] += 1
        except Exception:
            counts["found"] += 1
            if counts["found"] <= MAX_SHOWN:
                print(f"found: {name}, input {number} of seed {seed}", file=sys.stderr)
                traceback.print_exc(limit=-6)
        slowest_s = max(slowest_s, time.monotonic() - started)
    faulthandler.cancel_dump_traceback_later()
    grown_mb = round((resident_bytes() - grown_from) / 2**20, 1) if grown_from else 0.0
    if grown_mb > MAX_GROWN_MB:
        print(f"found: {name}, seed {seed}: {stop - first} inputs left {grown_mb} MB behind", file=sys.stderr)
        counts["found"] += 1
    return {
        "num": stop - first,
        **counts,
        "s": round(time.monotonic() - began, 2),
        "slowest_ms": round(slowest_s * 1000, 1),
        "grown_mb": grown_mb,
    }


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def try_live(num: int, seed: int) -> dict[str, dict[str, Any]]:
    """``num`` inputs to what is alive, by kind."""
    logging.disable(logging.CRITICAL)
    reports: dict[str, dict[str, Any]] = {}
    num_links = num // 3
    for name, run, part in (("HTTP requests", try_http, num - num_links), ("links to a node", try_node, num_links)):
        began = time.monotonic()
        try:
            tally = asyncio.run(run(part, seed))
        except Exception:
            reports[name] = {"num": 0, "found": 1}
            traceback.print_exc(limit=-6)
        else:
            reports[name] = _live_report(tally, began)
    return reports


def _live_report(tally: Tally, began: float) -> dict[str, Any]:
    return {
        "num": sum(tally.counts.values()),
        **tally.counts,
        "witness_texts": tally.num_texts,
        "s": round(time.monotonic() - began, 1),
    }


def try_all(
    num: int, seed: int, tell: Callable[[int], None], num_processes: int = 0, *, yields: bool = False
) -> dict[str, Any]:
    """``num`` inputs of all kinds, in as many processes as there are cores; where it ``yields``, in the time that
    others leave. ``tell`` hears how many are done, and ends it where it raises.
    """
    began = time.monotonic()
    logging.disable(logging.CRITICAL)
    num_live = int(num * LIVE_SHARE)
    kinds = (_try_live_beside if yields else try_live)(num_live, seed) if num_live else {}
    tell(num_live)
    nums = {name: int((num - num_live) * share) for name, (_, share) in KINDS.items()}
    nums[next(iter(nums))] += num - num_live - sum(nums.values())  # what rounding has left out
    tasks = [
        (name, first, stop, seed, PATIENCE if yields else 1.0)
        for name, num_kind in nums.items()
        for first, stop in _ranges(num_kind, RANGES_PER_KIND)
    ]
    for name, report in _performed(tasks, num_processes or os.cpu_count() or 1, yields=yields):
        kinds[name] = _sum_of(kinds[name], report) if name in kinds else report
        tell(_total(kinds, "num"))
    found = _total(kinds, "found")
    return {"seed": seed, "num": _total(kinds, "num"), "found": found, "s": _since(began), "kinds": kinds}


def _try_live_beside(num: int, seed: int) -> dict[str, dict[str, Any]]:
    """``try_live`` in a process that yields to others."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, yield_to_others) as pool:
        return pool.submit(try_live, num, seed).result()


def _performed(
    tasks: list[tuple[str, int, int, int, float]], num_processes: int, *, yields: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The reports of all tasks, in any order."""
    if num_processes == 1:
        yield from ((task[0], try_kind(*task)) for task in tasks)
        return
    context, initializer = multiprocessing.get_context("spawn"), yield_to_others if yields else None
    with ProcessPoolExecutor(num_processes, context, initializer) as pool:
        futures: dict[Future[dict[str, Any]], str] = {pool.submit(try_kind, *task): task[0] for task in tasks}
        try:
            for future in as_completed(futures):
                try:
                    yield futures[future], future.result()
                except BrokenProcessPool:  # an input hangs, or brought the interpreter down; the process has told which
                    yield futures[future], {"num": 0, "found": 1}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _ranges(num: int, most: int) -> list[tuple[int, int]]:
    size = max(-(-num // most), 1)
    return [(first, min(first + size, num)) for first in range(0, num, size)]


def _sum_of(report: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Counts and seconds of processes are added; of slowest inputs and of growth the largest counts."""
    return {
        key: max(report.get(key, 0), other.get(key, 0))
        if key in ("slowest_ms", "grown_mb")
        else round(report.get(key, 0) + other.get(key, 0), 2)
        for key in {**report, **other}
    }


def _total(reports: dict[str, dict[str, Any]], name: str) -> int:
    return sum(int(report.get(name, 0)) for report in reports.values())


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)
