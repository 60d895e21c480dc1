"""Streams of one real ring get their texts, and what they got is counted."""

import asyncio

import pytest

from benchmarks.serving import record_texts, serve
from flowspec_edge.bench.request import Request
from flowspec_edge.bench.sessions import row_of
from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from tests.ring.conftest import ring_of


@pytest.mark.slow
async def test_streams_share_a_real_ring() -> None:
    bundle = Bundle.load(DEMO_BUNDLE)
    request = Request(
        testbeds="mixed",
        schedules="flowspec",
        prompts="functions",
        temperatures="0.8",
        num_prompts=2,
        max_new_tokens=12,
    )
    asked = await asyncio.to_thread(record_texts, bundle, request)
    async with ring_of(2, bundle) as ring:
        alone = row_of(await serve(ring, asked, 1), None)
        shared = await serve(ring, asked, 3)
    row = row_of(shared, alone)
    assert (alone["sessions"], row["sessions"]) == (1, 3)
    assert any(len(texts) == 2 and len(texts[-1].tokens) == 12 for texts in shared.texts), "one stream has all"
    assert row["over_one_session"] == row["tokens_per_s"] / alone["tokens_per_s"]
    assert 0 < row["lowest_share"] <= 1 < sum(shared.num_tokens(stream) for stream in range(3))
