"""What a service tells of a real ring, and how far a prompt is."""

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.node.sensors import BoardPower
from flowspec_edge.origin import ring as rings
from flowspec_edge.origin.ring import Ring
from tests.narrowing import present
from tests.node.test_sensors import ORIN_NANO, tree
from tests.ring.conftest import ring_of

pytestmark = pytest.mark.slow


@pytest.fixture
async def ring(int8_bundle: Bundle, tmp_path: Path) -> AsyncIterator[Ring]:
    """Of boards that tell what they take."""
    async with ring_of(2, int8_bundle, BoardPower(["VDD_IN"], tree(tmp_path, ORIN_NANO))) as found:
        yield found


async def test_stages_count_what_they_do_and_boards_tell_what_they_take_for_it(ring: Ring) -> None:
    assert [stage.work.num_rows for stage in ring.status] == [0, 0]
    began, found = time.monotonic(), dict[str, Any]()
    while not found.get("joules") or len(found["metered_nodes"]) < 2:  # a sensor that was read once tells nothing yet
        pieces = [piece async for piece in ring.generate("def main(argv):", GenerateOptions(max_new_tokens=12))]
        found = present(pieces[-1].statistics)
    first, second = ring.status
    assert [(stage.start, stage.stop) for stage in (first, second)] == [(0, 4), (4, 8)]
    for stage in (first, second):
        assert stage.work.num_chunks >= 12 and stage.work.num_rows >= 12
        assert 0 < stage.work.busy_s < 60 and stage.work.waited_s >= 0
    sent, received = ring.num_bytes
    assert sent > 0
    assert received > 256 * 4 * 12, "hidden rows came back"
    assert pieces[-1].finish_reason == "length"
    assert 0 < found["joules"] <= 2 * 6.02 * (time.monotonic() - began)
    assert found["joules_per_token"] == pytest.approx(found["joules"] / 12, abs=1e-3)
    assert (found["metered_nodes"], found["unmetered_nodes"]) == (["node-0", "node-1"], ["origin"])


async def test_whoever_looks_is_shown_what_is_and_was_done_and_for_nobody_else_it_is_noted(
    ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerateOptions(max_new_tokens=24, label="mine")
    assert ring.look().texts == []
    pictures = []
    async for _ in ring.generate("def main(argv):", options):
        pictures.append(ring.look())
    written = [picture.texts[0] for picture in pictures if picture.texts]
    assert written and {text.label for text in written} == {"mine"}
    assert written[-1].num_read == written[-1].num_prompt > 0 and written[-1].counts.num_tokens > 12
    last = pictures[-1]
    assert last.trips and {job.kind for job in last.jobs} == {"head", "draft"}
    for trip in last.trips:
        assert len(trip.stages) == 2 and trip.way.began <= trip.stages[0].began <= trip.stages[1].began
    monkeypatch.setattr(rings, "LOOKED_S", -1.0)
    assert [piece async for piece in ring.generate("x", GenerateOptions(max_new_tokens=1))]
    assert ring.look().trips == [], "nobody had looked for so long"


async def test_a_long_prompt_says_how_far_it_is(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "PROGRESS_S", 0.001)
    prompt, notices = list(range(100, 900)), []
    async with contextlib.aclosing(ring.generate(prompt, GenerateOptions(max_new_tokens=1))) as pieces:
        async for piece in pieces:
            if piece.notice is not None:
                notices.append(int(piece.notice.split()[0]))
                assert piece.notice.endswith("of the prompt's 800 tokens are read")
    assert len(set(notices)) > 2 and notices == sorted(notices) and 0 < notices[-1] <= 800


async def test_a_client_that_leaves_stops_its_work_within_a_trip(ring: Ring) -> None:
    async with contextlib.aclosing(ring.generate("def main(", GenerateOptions(max_new_tokens=900))) as pieces:
        await anext(pieces)
    chunks = ring.status[0].work.num_chunks
    follower = [
        piece async for piece in ring.generate("def f(", GenerateOptions(max_new_tokens=1, schedule="autoregressive"))
    ]
    assert follower[-1].finish_reason == "length"
    assert ring.status[0].work.num_chunks <= chunks + 6, "what was under way, and the next text's own"
