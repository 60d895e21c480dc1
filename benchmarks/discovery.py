"""How long it takes until all nodes have seen each other, and until the first text comes.

Five hosts in network namespaces run real `flowspec node` processes with real mDNS. Time counts from the moment at which
the last node serves. Only the first host has the model, as files that no node has: each fetches its own layers before
the first text. Needs root and iproute2:

    python -m benchmarks.discovery
    python -m benchmarks.discovery --no-multicast      # nft drops multicast; the other hosts get the first one's
    address
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
from dataclasses import dataclass
from pathlib import Path

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.core.cluster.key_text import format_key
from flowspec_edge.files import write_private
from tests.bundles import unknown_bundle
from tests.lan import lan_of, why_not

SECRET = bytes(range(20))
LIMIT_S = 60.0
PROMPT = "def main(argv):"


async def see_all(process: asyncio.subprocess.Process, num_others: int) -> float:
    """Wait until this node has seen ``num_others`` others, and return when that was."""
    seen: set[str] = set()
    assert process.stderr is not None
    while len(seen) < num_others:
        line = (await process.stderr.readline()).decode()
        if not line:
            raise RuntimeError(f"a node ended; it had seen {sorted(seen)}")
        if found := re.search(r"joined: (\S+)", line):
            seen.add(found[1])
    return time.monotonic()


@dataclass(frozen=True, slots=True)
class Formed:
    """What one run measured. Seconds count from the moment at which the last node served.

    Attributes:
        seen_s: until all nodes had seen each other.
        text_s: until the first text of a command that was started then. Its search for nodes, and the fetching and
            loading of layers, are included.
        fetched_bytes: what all nodes fetched for that text.
    """

    seen_s: float
    text_s: float
    fetched_bytes: int


async def form_once(num_hosts: int, *, has_multicast: bool, place: Path, bundle: Bundle) -> Formed:
    """Start the hosts and ask for a text. ``place`` is a new directory, in which no node has run before."""
    async with lan_of(num_hosts) as lan:
        if not has_multicast:
            lan.drop_multicast()

        async def start(number: int) -> tuple[asyncio.subprocess.Process, float]:
            home = place / str(number)
            write_private(home / "cluster.key", format_key(SECRET) + "\n")
            peer = ("--peer", lan.address(0)) if number and not has_multicast else ()
            process, _ = await lan.start_node(number, *peer, env={"FLOWSPEC_HOME": str(home)}, is_verbose=True)
            return process, time.monotonic()

        async with asyncio.timeout(LIMIT_S):
            started = await asyncio.gather(*(start(number) for number in range(num_hosts)))
            seen = await asyncio.gather(*(see_all(process, num_hosts - 1) for process, _ in started))
        last = max(served for _, served in started)
        asked = ("--bundle", str(bundle.directory), "--nodes", str(num_hosts), "--max-new-tokens", "4")
        status, out, err = await lan.run(
            *(0, "generate", PROMPT, *asked, "--json"), env={"FLOWSPEC_HOME": str(place / "0")}
        )
        if status:
            raise RuntimeError(err)
        answer = json.loads(out)
        fetched = [stage["fetched_bytes"] for stage in answer["ring"]]
        if len(fetched) != num_hosts or not all(fetched):
            raise RuntimeError(f"{num_hosts} nodes were to fetch their layers, and {fetched} bytes came")
        return Formed(max(seen) - last, time.monotonic() - last - answer["decode_s"], sum(fetched))


async def main(options: argparse.Namespace) -> int:
    if reason := why_not():
        print(f"discovery: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        bundle = unknown_bundle(Bundle.load(DEMO_BUNDLE), Path(directory) / "bundle")
        places = [Path(directory) / f"run-{number}" for number in range(options.runs)]
        runs = [
            await form_once(options.hosts, has_multicast=not options.no_multicast, place=place, bundle=bundle)
            for place in places
        ]
    result = {
        "hosts": options.hosts,
        "multicast": not options.no_multicast,
        "seen_s": [round(run.seen_s, 2) for run in runs],
        "median_seen_s": round(statistics.median(run.seen_s for run in runs), 2),
        "text_s": [round(run.text_s, 2) for run in runs],
        "median_text_s": round(statistics.median(run.text_s for run in runs), 2),
        "fetched_bytes": [run.fetched_bytes for run in runs],
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
