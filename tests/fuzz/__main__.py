"""``python -m tests.fuzz --num 1000000 --seed N``: many broken inputs, in as many processes as there are cores.

The exit status is 1 where anything but a named error was raised, and where memory grew; the number of the input and the
seed make it again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from tests.fuzz.many_inputs import try_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--num", type=int, default=1_000_000, help="inputs of all kinds (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"), help="default: by chance")
    parser.add_argument("--processes", type=int, default=0, help="default: as many as there are cores")
    options = parser.parse_args()
    print(f"fuzz: {options.num} inputs, --seed {options.seed}", file=sys.stderr, flush=True)
    report = try_all(
        options.num, options.seed, lambda done: print(done, file=sys.stderr, flush=True), options.processes
    )
    print(json.dumps(report))
    return 1 if report["found"] else 0


if __name__ == "__main__":
    sys.exit(main())
