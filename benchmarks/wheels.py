"""Whether the package can be installed without a compiler: ``python -m benchmarks.wheels``.

pip resolves the runtime dependencies, and theirs, for each Python and processor that boards have, from wheels alone,
and says which it would install. Nothing is installed, and of wheels little more than their metadata is read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
MACHINES = ("aarch64", "x86_64")
GLIBC = ("2_31", "2_28", "2_27", "2_26", "2_24", "2_17")
"""The C libraries that wheels may ask for: Debian 11 and Ubuntu 20.04 have 2.31, whatever is newer has a later one."""
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def pip_command(requirements: Sequence[str], python: str, machine: str, target: str) -> list[str]:
    """What prints, as JSON, the wheels that would be installed for this Python on a machine with glibc."""
    platforms = [f"manylinux_{glibc}_{machine}" for glibc in GLIBC] + [f"manylinux2014_{machine}"]
    return [
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-"),
        *("--only-binary", ":all:", "--python-version", python, "--implementation", "cp", "--target", target),
        *(option for platform in platforms for option in ("--platform", platform)),
        *requirements,
    ]


def find_wheels(requirements: Sequence[str], python: str, machine: str) -> tuple[list[str], str]:
    """The wheels that there are, as ``name version``; and why there are not all of them, in pip's words."""
    with tempfile.TemporaryDirectory() as target:
        command = pip_command(requirements, python, machine, target)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [done.stderr]
        return [], errors[-1].strip()
    found = [entry["metadata"] for entry in json.loads(done.stdout)["install"]]
    return sorted(f"{entry['name']} {entry['version']}" for entry in found), ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.wheels", description=__doc__)
    parser.add_argument("--python", action="append", metavar="VERSION", help=f"default: {', '.join(PYTHONS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object: the wheels of each combination")
    options = parser.parse_args()
    requirements = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    report, is_whole = {}, True
    for python in options.python or PYTHONS:
        for machine in MACHINES:
            wheels, error = find_wheels(requirements, python, machine)
            is_whole = is_whole and not error
            report[f"{python} {machine}"] = {"wheels": wheels, "error": error or None}
            print(f"Python {python} on {machine}: {error or f'{len(wheels)} wheels'}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps(report))
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
