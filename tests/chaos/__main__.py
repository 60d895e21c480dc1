"""``make chaos``: everything that is tried for long, one part after another, with one result.

* rounds: random faults strike nodes of rings of real processes, on hosts of their own (network namespaces, root)
* interleavings: faults in any order over the pure cores
* outsiders: everyone without the key, at a real node that serves a member (network namespaces, root)
* fuzz: broken inputs for everything that reads what others send

The exit status is 1 where any part found something, or could not be run. Figures go to a file as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.chaos.faults import FAULTS
from tests.chaos.parts import PARTS, Outcome

RESULT = Path("build/chaos.json")
SHOW_EVERY_S = 10.0
"""How often progress is told where nothing else is."""


class Progress:
    """Tells on standard error how far everything is, and how long it will still take."""

    def __init__(self, nums: Mapping[str, int]) -> None:
        self._began = self._told_at = time.monotonic()
        self._usual_s = {name: PARTS[name].usual_s * num / PARTS[name].num for name, num in nums.items()}
        self._part, self._part_began = "", self._began

    def begin(self, part: str) -> None:
        self._part, self._part_began = part, time.monotonic()
        self.tell(0.0, "begins")

    def tell(self, share: float, what: str) -> None:
        now = time.monotonic()
        if not what and now - self._told_at < SHOW_EVERY_S:
            return
        self._told_at = now
        print(
            f"{_clock(now - self._began)}, {_clock(self.left_s(share, now))} left: {self._part} {share:.0%} {what}",
            file=sys.stderr,
            flush=True,
        )

    def left_s(self, share: float, now: float) -> float:
        """Of this part as it went so far, of those behind it what is usual."""
        spent = now - self._part_began
        own = spent / share - spent if share > 0.02 else self._usual_s[self._part] * (1 - share)
        names = list(self._usual_s)
        return own + sum(self._usual_s[name] for name in names[names.index(self._part) + 1 :])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def run(nums: Mapping[str, int], seed: int, fault: str | None) -> dict[str, Any]:
    """Run the parts that are named, each so many times; returns what is written down. ``fault`` is that of rounds."""
    progress, parts = Progress(nums), {}
    for name, num in nums.items():
        progress.begin(name)
        began, more = time.monotonic(), {"fault": fault} if name == "rounds" else {}
        try:
            if (why_not := PARTS[name].why_not()) is not None:
                outcome = Outcome([why_not], "not run", {}, "")
            else:
                outcome = PARTS[name].run(num, seed, progress.tell, **more)
        except Exception:  # the others are tried all the same
            outcome = Outcome([traceback.format_exc()], "broke off", {}, "")
        for found in outcome.found:
            print(f"found: {name}: {found}", file=sys.stderr, flush=True)
        parts[name] = {
            "passed": not outcome.found,
            "num": num,
            "s": round(time.monotonic() - began, 1),
            "found": outcome.found,
            "summary": outcome.summary,
            "figures": outcome.figures,
            "markdown": outcome.markdown,
        }
    return {"seed": seed, "passed": all(part["passed"] for part in parts.values()), "parts": parts}


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
