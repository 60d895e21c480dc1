"""``python -m tests.interleavings``: many cases of ``cases.py``, in as many processes as there are cores.

The exit status is 1 where a case ended wrongly, which is then printed as small as it can be made (``--case`` plays it
again), and where something that was to be tried never happened.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from flowspec_edge.config import GenerateOptions
from tests.interleavings.cases import Case, Fault, Request, play
from tests.interleavings.many_cases import play_many


def case_from(text: str) -> Case:
    """A case from what was printed of it."""
    known = {"Case": Case, "Fault": Fault, "Request": Request, "GenerateOptions": GenerateOptions}
    case = eval(text, {"__builtins__": {}}, known)  # the user's own text
    assert isinstance(case, Case)
    return case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.interleavings", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"), help="default: by chance")
    parser.add_argument("--case", help="play this one case, as it was printed")
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(play(case_from(options.case))))
        return 0
    print(f"interleavings: {options.cases} cases, --seed {options.seed}", file=sys.stderr, flush=True)
    report = play_many(options.cases, options.seed, lambda done: print(done, file=sys.stderr, flush=True))
    for text in report["found"]:
        print(text, file=sys.stderr)
    print(json.dumps(report))
    return 1 if report["found"] or report["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
