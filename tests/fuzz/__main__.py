"""Many broken inputs, and what came of them: ``python -m tests.fuzz --num 1000000 --seed N``.

A hundredth of the inputs goes to what is alive: links to a node and HTTP requests. The exit status is 1 where anything
but a named error was raised; the number of the input and the seed make it again.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import faulthandler
import json
import logging
import os
import random
import resource
import sys
import time
import traceback

from tests.fuzz.kinds import KINDS, TryOne
from tests.fuzz.live import Tally, try_http, try_node

HANG_S = 30.0
"""A single input that takes this long ends the run, with the stacks of all threads."""
LIVE_SHARE = 0.01
MAX_SHOWN = 5
WARM_UP = 2000
"""Inputs after which the memory of the process is looked at for the first time."""


def try_kind(name: str, try_one: TryOne, num: int, seed: int, end: float) -> dict[str, object]:
    """``num`` inputs of a kind, or as many as there is time for until ``end``."""
    counts: collections.Counter[str] = collections.Counter()
    slowest_s, began, grown_from, done = 0.0, time.monotonic(), 0, 0
    for number in range(num):
        started = time.monotonic()
        if started > end:
            break
        if number % 1000 == 0:
            faulthandler.dump_traceback_later(HANG_S, exit=True, file=sys.__stderr__ or 2)
        if number == WARM_UP:
            grown_from = resident_bytes()
        try:
            counts[try_one(random.Random(f"{seed}/{name}/{number}"))] += 1
        except Exception:
            counts["found"] += 1
            if counts["found"] <= MAX_SHOWN:
                print(f"found: {name}, input {number} of seed {seed}", file=sys.stderr)
                traceback.print_exc(limit=-6)
        slowest_s = max(slowest_s, time.monotonic() - started)
        done = number + 1
    faulthandler.cancel_dump_traceback_later()
    return {
        "num": done,
        **counts,
        "per_s": round(done / (time.monotonic() - began + 1e-9)),
        "slowest_ms": round(slowest_s * 1000, 1),
        "grown_mb": round((resident_bytes() - grown_from) / 2**20, 1) if grown_from else 0.0,
    }


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def live_report(tally: Tally, began: float) -> dict[str, object]:
    return {
        "num": sum(tally.counts.values()),
        **tally.counts,
        "witness_texts": tally.num_texts,
        "s": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--num", type=int, default=1_000_000, help="inputs of all kinds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"), help="default: by chance")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this long (default: %(default)s)")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    end = began + options.seconds
    reports: dict[str, dict[str, object]] = {}
    num_live = int(options.num * LIVE_SHARE)
    for name, run, num in (("HTTP requests", try_http, num_live // 2), ("links to a node", try_node, num_live // 4)):
        started = time.monotonic()
        try:
            reports[name] = live_report(asyncio.run(run(num, options.seed)), started)
        except Exception:
            reports[name] = {"found": 1}
            traceback.print_exc(limit=-6)
        print(f"{name}: {json.dumps(reports[name])}", flush=True)
    left = options.num - _sum(reports, "num")
    for name, (try_one, share) in KINDS.items():
        shares_left = sum(other for key, (_, other) in KINDS.items() if key not in reports)
        until = time.monotonic() + (end - time.monotonic()) * share / shares_left
        reports[name] = try_kind(name, try_one, int(left * share), options.seed, until)
        print(f"{name}: {json.dumps(reports[name])}", flush=True)
    num_found, num = _sum(reports, "found"), _sum(reports, "num")
    summary = {"seed": options.seed, "num": num, "found": num_found, "s": round(time.monotonic() - began, 1)}
    print(json.dumps({**summary, "kinds": reports}))
    return 1 if num_found else 0


def _sum(reports: dict[str, dict[str, object]], name: str) -> int:
    return sum(int(str(report.get(name, 0))) for report in reports.values())


if __name__ == "__main__":
    sys.exit(main())
