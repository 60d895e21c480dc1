"""What is told of a hop: medians of the laps behind the first ones, and a real ring of two processes."""

import argparse
from typing import Any

import pytest

from benchmarks.hop import FUNCTIONS, MOMENTS, STEPS, WARM_LAPS, format_summary, run, summarise
from flowspec_edge.net.addresses import LOOPBACK

NUM_LAPS = WARM_LAPS + 5
PLACES = {name: place for place, name in enumerate(("sent", *MOMENTS, "back"))}


def told(names: tuple[str, ...]) -> dict[str, Any]:
    """Moments of which each comes 100 us after the one before; laps that take one another 10 us of each function."""
    noted = {name: [lap + 1e-4 * PLACES[name] for lap in range(NUM_LAPS)] for name in names}
    laps = [{"processor": 3e-5 * lap, **dict.fromkeys(FUNCTIONS, 1e-5 * lap)} for lap in range(NUM_LAPS)]
    laps[0] = {name: -9.0 for name in laps[0]}  # which is left out
    return {"noted": noted, "laps": laps}


def test_steps_are_told_from_moment_to_moment_and_functions_per_hop() -> None:
    measured = {
        "origin": told(("sent", "back")),
        "stage": told(MOMENTS),
        "bytes_per_s": 9.5e6,
        "raw_bytes_per_s": 1e7,
    }
    summary = summarise(measured, measured)
    expected = {name: pytest.approx(100 * (PLACES[stop] - PLACES[start])) for name, start, stop in STEPS}
    assert summary["steps_us"] == expected
    assert summary["functions_us"] == dict.fromkeys(FUNCTIONS, pytest.approx(10))
    assert summary["processor_us"] == dict.fromkeys(("origin", "stage"), pytest.approx(30))
    assert "76 Mbit/s of rows, 80 by TCP alone (95.0%)" in format_summary(summary)


@pytest.mark.slow
async def test_chunks_go_round_a_real_ring_of_two_processes() -> None:
    options = argparse.Namespace(
        bytes=65536,
        rows=16,
        laps=5,
        plain=False,
        watched=False,
        stage_host="",
        stage_address=LOOPBACK,
        origin_address=LOOPBACK,
    )
    measured = await run(options)
    summary = summarise(measured, measured | {"origin": told(()), "stage": told(())})
    assert all(spent > 0 for spent in summary["steps_us"].values())
    assert len(measured["origin"]["laps"]) == NUM_LAPS and measured["bytes_per_s"] > 0
