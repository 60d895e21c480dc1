"""``make chaos``: everything that is tried for long, with one result.

* rounds: random faults strike nodes of rings of real processes, on hosts of their own (network namespaces, root)
* interleavings: faults in any order over the pure cores
* outsiders: everyone without the key, at a real node that serves a member (network namespaces, root)
* fuzz: broken inputs for everything that reads what others send

Interleavings and fuzz run beside rounds and outsiders, in the time that these leave to the processor (SCHED_IDLE).
The exit status is 1 where any part found something, or could not be run. Figures go to a file as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.chaos.faults import FAULTS
from tests.chaos.parts import PARTS, Outcome, Tell

RESULT = Path("build/chaos.json")
SHOW_EVERY_S = 10.0
"""How often progress is told where nothing else is."""


class Progress:
    """Tells on standard error how far everything is, and how long it will still take.

    ``nums`` are the parts in their order, and ``beside`` those that run beside the others.
    """

    def __init__(self, nums: Mapping[str, int], beside: Collection[str] = ()) -> None:
        self._began = self._told_at = time.monotonic()
        self._usual_s = {name: PARTS[name].usual_s * num / PARTS[name].num for name, num in nums.items()}
        self._beside = beside
        self._part_began: dict[str, float] = {}
        self._shares = dict.fromkeys(nums, 0.0)
        self._lock = threading.Lock()

    def tell(self, part: str, share: float, what: str) -> None:
        """``share`` of a part is done. Where there is nothing to show of it, that is told now and then."""
        with self._lock:
            now = time.monotonic()
            self._part_began.setdefault(part, now)
            self._shares[part] = share
            if not what and now - self._told_at < SHOW_EVERY_S:
                return
            self._told_at = now
            told = f"{_clock(now - self._began)}, {_clock(self.left_s(now))} left: {part} {share:.0%} {what}"
            print(told, file=sys.stderr, flush=True)

    def left_s(self, now: float) -> float:
        """Of what has begun as it went so far, of the others what is usual."""
        left = {name: self._left_of(name, now) for name in self._usual_s}
        beside = sum(left.pop(name) for name in self._beside)
        return max(sum(left.values()), beside)

    def _left_of(self, part: str, now: float) -> float:
        share = self._shares[part]
        if share <= 0.02:
            return self._usual_s[part] * (1 - share)
        spent = now - self._part_began[part]
        return spent / share - spent


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class _Stopped(BaseException):
    """The user has ended the run."""


def run(nums: Mapping[str, int], seed: int, fault: str | None) -> dict[str, Any]:
    """Run the parts that are named, each so many times; returns what is written down. ``fault`` is that of rounds.

    Those that yield run one after another, beside the others, which do the same.
    """
    beside = [name for name in nums if PARTS[name].yields]
    if len(beside) == len(nums):
        beside = []
    progress, is_stopped = Progress(nums, beside), threading.Event()

    def tell(part: str, share: float, what: str) -> None:
        if is_stopped.is_set():
            raise _Stopped
        progress.tell(part, share, what)

    def try_part(name: str, **more: Any) -> dict[str, Any]:
        tell(name, 0.0, "begins")
        tried = _tried(name, nums[name], seed, functools.partial(tell, name), more)
        if not is_stopped.is_set():
            for found in tried["found"]:
                print(f"found: {name}: {found}", file=sys.stderr, flush=True)
        return tried

    with ThreadPoolExecutor(1, "beside") as thread:
        try:
            trying = {name: thread.submit(try_part, name, yields=True) for name in beside}
            tried = {
                name: try_part(name, **({"fault": fault} if name == "rounds" else {}))
                for name in nums
                if name not in beside
            }
            tried |= {name: part.result() for name, part in trying.items()}
        except BaseException:
            is_stopped.set()
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    parts = {name: tried[name] for name in nums}
    return {"seed": seed, "passed": all(part["passed"] for part in parts.values()), "parts": parts}


def _tried(name: str, num: int, seed: int, tell: Tell, more: Mapping[str, Any]) -> dict[str, Any]:
    """What is written down of one part."""
    began = time.monotonic()
    try:
        if (why_not := PARTS[name].why_not()) is not None:
            outcome = Outcome([why_not], "not run", {}, "")
        else:
            outcome = PARTS[name].run(num, seed, tell, **more)
    except Exception:  # the others are tried all the same
        outcome = Outcome([traceback.format_exc()], "broke off", {}, "")
    return {
        "passed": not outcome.found,
        "num": num,
        "s": round(time.monotonic() - began, 1),
        "found": outcome.found,
        "summary": outcome.summary,
        "figures": outcome.figures,
        "markdown": outcome.markdown,
    }


def table(result: dict[str, Any]) -> str:
    """One line for each part."""
    rows = [("part", "", "took", "what was tried")]
    for name, part in result["parts"].items():
        verdict = "passed" if part["passed"] else f"FAILED ({len(part['found'])})"
        rows.append((name, verdict, _clock(part["s"]), part["summary"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_markdown(result: dict[str, Any]) -> str:
    """The figures, for docs/reliability.md."""
    sections = []
    for name, part in result["parts"].items():
        command = f"`python -m tests.chaos --only {name} --seed {result['seed']}`"
        took = f"({_clock(part['s'])} min)"
        sections.append(f"{command} {took}: {part['summary']}.\n\n{part['markdown']}\n")
    return "\n".join(sections)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=list(PARTS), help="this part alone; repeatable")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run (default: by chance; it is printed)")
    for name, part in PARTS.items():
        unit = " seconds for each kind" if name == "outsiders" else ""
        parser.add_argument(f"--{name}", type=int, default=part.num, metavar="N", help=f"default: %(default)s{unit}")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="in rounds this alone (default: by chance each time)")
    parser.add_argument("--json", type=Path, default=RESULT, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--markdown", action="store_true", help="print the figures as docs/reliability.md has them")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    nums = {name: getattr(options, name) for name in PARTS if name in (options.only or PARTS)}
    print(f"chaos: {', '.join(nums)}; --seed {seed}, pid {os.getpid()}", file=sys.stderr, flush=True)
    result = run(nums, seed, options.fault)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(as_markdown(result) if options.markdown else table(result))
    print(f"{'passed' if result['passed'] else 'FAILED'}; figures: {options.json}", file=sys.stderr)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
