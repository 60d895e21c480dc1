"""``python -m tests.chaos``: random faults over rings of 3 to 5 real processes in namespaces, which need root."""

import argparse
import json
import os
import random
import sys

from tests.chaos.faults import FAULTS
from tests.chaos.many_rounds import try_rounds
from tests.chaos.rounds import as_markdown
from tests.lan import why_not


def tell(num_done: int, what: str) -> None:
    print(f"{num_done:4} {what}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="faults, one after another (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="repeat a run (default: a random one, which is printed)")
    parser.add_argument("--fault", choices=sorted(FAULTS), help="this fault alone (default: a random one each time)")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/reliability.md, not JSON")
    options = parser.parse_args()
    if reason := why_not():
        print(f"chaos: {reason}", file=sys.stderr)
        return 1
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    print(f"chaos: {options.rounds} rounds, --seed {seed}, pid {os.getpid()}", file=sys.stderr, flush=True)
    figures = try_rounds(options.rounds, seed, tell, options.fault)
    print(as_markdown(figures) if options.markdown else json.dumps(figures, indent=2))
    is_right = figures["equal"] == figures["texts"] and figures["asked_again_equal"] == figures["asked_again"]
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
