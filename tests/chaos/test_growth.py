"""What counts as growth, and that a process tells its counts."""

import asyncio
import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.growth import MIN_SAMPLES, Sample, Watched, growth
from tests.narrowing import present

FLAT = Sample(0.0, 50.0, 80.0, 40.0, 20, 5, 12, 9000, 3, 1)


@pytest.mark.parametrize(
    ("name", "step", "is_grown"),
    [
        ("pss_mb", 0.1, False),
        ("pss_mb", 0.5, True),
        ("anonymous_mb", -1.0, False),
        ("num_tasks", 0.1, False),
        ("num_tasks", 0.4, True),
        ("num_descriptors", 0.4, True),
        ("num_threads", 0.4, True),
        ("num_blocks", 100.0, False),
    ],
)
def test_growth_is_more_at_the_end_than_in_the_beginning(name: str, step: float, is_grown: bool) -> None:
    samples = [dataclasses.replace(FLAT, **{name: getattr(FLAT, name) + step * number}) for number in range(12)]
    assert growth(samples)["3 layers, serving"]["grown"] == ([name] if is_grown else [])


def test_a_single_peak_is_no_growth_and_few_samples_are_not_judged() -> None:
    peak = dataclasses.replace(FLAT, pss_mb=500.0, num_tasks=90)
    assert growth([FLAT] * 11 + [peak])["3 layers, serving"]["grown"] == []
    assert growth([FLAT] * 2 + [peak] * (MIN_SAMPLES - 3)) == {}


def test_a_process_is_compared_with_itself_in_the_same_state() -> None:
    idle, serving = dataclasses.replace(FLAT, num_stages=0), dataclasses.replace(FLAT, pss_mb=90.0, num_tasks=20)
    found = growth([idle] * 9 + [serving] * 9 + [dataclasses.replace(serving, num_layers=2)])
    assert {state: figures["grown"] for state, figures in found.items()} == {
        "3 layers, idle": [],
        "3 layers, serving": [],
    }


async def test_a_node_tells_its_counts(tmp_path: Path) -> None:
    options = ("node", "--host", "127.0.0.1", "--cluster", "counted", "--json", "--until-stdin-closes")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chaos.counted", str(tmp_path / "counts"), *options),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(60):
            assert await present(process.stdout).readline()
        watched = Watched("node", process.pid, tmp_path / "counts")
        sample = present(await watched.sample(time.monotonic()))
        assert sample.num_tasks > 1 and sample.num_descriptors > 3 and sample.num_blocks > 10_000
        assert sample.rss_mb > sample.anonymous_mb > 10
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()
    assert await watched.sample(time.monotonic()) is None
