"""The names of the testbeds that come with the package; the help of commands lists them, so nothing heavy is needed."""

from __future__ import annotations

from pathlib import Path

TESTBEDS = Path(__file__).parent / "testbeds"


def known_testbeds() -> list[str]:
    """The testbeds that come with the package, the paper's own boards first."""
    return sorted(
        (path.stem for path in TESTBEDS.glob("*.toml")), key=lambda name: (not name.startswith("jetson"), name)
    )
