"""How long until all nodes have seen all, and until text flows: five hosts in network namespaces, real `flowspec node` processes, real mDNS.

Measured from the moment at which the last node serves. Needs root and iproute2:

    python -m benchmarks.discovery
    python -m benchmarks.discovery --no-multicast      # dropped by nft; the others are given the first one's address
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from flowspec_edge.core.key_text import format_key
from flowspec_edge.state import write_private
from tests.lan import lan_of, why_not

SECRET = bytes(range(20))
LIMIT_S = 60.0
PROMPT = "def main(argv):"


async def see_all(process: asyncio.subprocess.Process, num_others: int) -> float:
    """When this node had seen so many others."""
    seen: set[str] = set()
    assert process.stderr is not None
    while len(seen) < num_others:
        line = (await process.stderr.readline()).decode()
        if not line:
            raise RuntimeError(f"a node ended; it had seen {sorted(seen)}")
        if found := re.search(r"joined: (\S+)", line):
            seen.add(found[1])
    return time.monotonic()


async def form_once(num_hosts: int, *, has_multicast: bool, place: Path) -> tuple[float, float]:
    """Seconds from when the last node served until all had seen all, and until the first text was there: a command started
    after that, its search and the loading of the layers included.
    """
    async with lan_of(num_hosts) as lan:
        if not has_multicast:
            lan.drop_multicast()

        async def start(number: int) -> tuple[asyncio.subprocess.Process, float]:
            home = place / str(number)
            write_private(home / "cluster.key", format_key(SECRET) + "\n")
            (home / "peers.json").unlink(missing_ok=True)
            peer = ("--peer", lan.address(0)) if number and not has_multicast else ()
            process, _ = await lan.start_node(number, *peer, env={"FLOWSPEC_HOME": str(home)}, is_verbose=True)
            return process, time.monotonic()

        async with asyncio.timeout(LIMIT_S):
            started = await asyncio.gather(*(start(number) for number in range(num_hosts)))
            seen = await asyncio.gather(*(see_all(process, num_hosts - 1) for process, _ in started))
        last = max(served for _, served in started)
        status, out, err = await lan.run(
            *(0, "generate", PROMPT, "--nodes", str(num_hosts), "--max-new-tokens", "4", "--json", "--equal-split"),
            env={"FLOWSPEC_HOME": str(place / "0")},
        )
        if status:
            raise RuntimeError(err)
        answer = json.loads(out)
        return max(seen) - last, time.monotonic() - last - answer["decode_s"]


async def main(options: argparse.Namespace) -> int:
    if reason := why_not():
        print(f"discovery: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as place:
        runs = [
            await form_once(options.hosts, has_multicast=not options.no_multicast, place=Path(place))
            for _ in range(options.runs)
        ]
    result = {
        "hosts": options.hosts,
        "multicast": not options.no_multicast,
        "seen_s": [round(seen, 2) for seen, _ in runs],
        "median_seen_s": round(statistics.median(seen for seen, _ in runs), 2),
        "text_s": [round(text, 2) for _, text in runs],
        "median_text_s": round(statistics.median(text for _, text in runs), 2),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores for all hosts, load {os.getloadavg()[0]:.1f}",
    }
    print(json.dumps(result) if options.json else "\n".join(f"{name:10} {value}" for name, value in result.items()))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-multicast", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(parse())))
