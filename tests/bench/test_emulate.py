"""Emulated boards keep to a testbed's times, never faster, and write the unsplit model's text."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from flowspec_edge.bench.emulate import Comparison, EmulatedAnswer, format_comparison, time_answer
from flowspec_edge.bench.emulated_board import EmulatedBoard, Lateness, PacedEngine, PacedRunner, PreciseTimer, Wire
from flowspec_edge.bench.testbed import StageCost, Testbed
from flowspec_edge.bench.virtual_clock import TimedAnswer
from flowspec_edge.bundle import Bundle
from flowspec_edge.cli.main import main
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.rows import NO_PARENT, Chunk, Row, SlotMove
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.wire import ROW_BYTES
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import LinkLostError, StageFailedError
from flowspec_edge.net.connection import Link
from flowspec_edge.node.node import Node
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring

GIB = 2**30
HOP_S = 0.003  # of the testbed that the fixture two_stages makes; a row of hidden values takes 1 ms on its wire
ROW_S = 0.001 + ROW_BYTES / 1e6


def chunk(number: int, num_rows: int, hidden: bool = True) -> wire.ChunkMessage:
    rows = tuple(Row(index, index, 0) for index in range(num_rows))
    return wire.ChunkMessage(number, Chunk(1, rows, num_rows, np.zeros((num_rows, 2), np.float32) if hidden else None))


def test_a_chunk_arrives_after_its_bytes_and_the_latency(two_stages: Testbed) -> None:
    assert Wire(two_stages).arrival(chunk(0, 4), 10.0) == pytest.approx(10.0 + 4 * ROW_S + HOP_S)
    assert Wire(two_stages).arrival(chunk(0, 4, hidden=False), 10.0) == pytest.approx(
        10.0 + 4 * ROW_BYTES / 1e6 + HOP_S
    )


def test_chunks_wait_for_each_other_on_the_wire(two_stages: Testbed) -> None:
    hop = Wire(two_stages)
    times = [hop.arrival(chunk(number, 4), now) for number, now in enumerate((10.0, 10.001, 20.0))]
    assert times == pytest.approx([10.0 + 4 * ROW_S + HOP_S, 10.0 + 8 * ROW_S + HOP_S, 20.0 + 4 * ROW_S + HOP_S])


def test_small_messages_take_the_latency_and_never_overtake(two_stages: Testbed) -> None:
    hop = Wire(two_stages)
    assert hop.arrival(wire.Credit(1), 10.0) == pytest.approx(10.0 + HOP_S)
    assert hop.arrival(chunk(0, 100), 10.0) == hop.arrival(wire.Credit(1), 10.0)


class FakeRunner:
    """A stage that computes nothing."""

    def open_cache(self, session: int, capacity: int) -> None:
        pass

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None:
        pass

    def take_over_cache(self, session: int, kept: int) -> bool:
        return True

    def free_cache(self, session: int) -> None:
        pass

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool] = lambda: False) -> ev.ForwardFinished:
        return ev.ForwardFinished(np.zeros((len(forward.rows), 2), np.float32))


def forward_of(num_rows: int) -> ev.RunForward:
    rows = tuple(Row(index, index - 1 if index else NO_PARENT, 0) for index in range(num_rows))
    return ev.RunForward(1, rows, None, KvSlots(num_rows).place(rows))


@pytest.mark.parametrize("num_rows", [1, 16])
def test_a_forward_lasts_at_least_as_long_as_the_board_takes(num_rows: int) -> None:
    told: list[Lateness] = []
    runner = PacedRunner(FakeRunner(), StageCost(fixed_ms=10, row_ms=1, num_layers=5), told.append)
    runner.open_cache(1, 100)
    began = time.monotonic()
    assert runner.run(forward_of(num_rows), lambda: False).hidden.shape == (num_rows, 2)
    assert time.monotonic() - began >= 0.010 + num_rows * 0.001
    runner.free_cache(1)
    assert told[0].asked_s == pytest.approx(0.010 + num_rows * 0.001)
    assert told[0].late_s >= 0


def test_a_forward_that_is_given_up_ends_behind_the_layer_that_runs() -> None:
    told: list[Lateness] = []
    runner = PacedRunner(FakeRunner(), StageCost(fixed_ms=10, row_ms=1, num_layers=5), told.append)
    runner.open_cache(1, 100)
    asked = iter([False, False, True])
    runner.run(forward_of(4), lambda: next(asked))
    runner.free_cache(1)
    assert told[0].asked_s == pytest.approx(3 * 14 / 5 / 1000)


async def test_a_timer_that_is_set_anew_expires_once_and_never_early() -> None:
    expired: asyncio.Queue[float] = asyncio.Queue()
    timer = PreciseTimer(lambda: expired.put_nowait(time.monotonic()))
    try:
        began = time.monotonic()
        timer.set(began + 60)
        timer.set(began + 0.01)
        async with asyncio.timeout(10):
            assert await expired.get() >= began + 0.01
        assert expired.empty()
    finally:
        timer.close()


class FakeLink:
    """Takes messages until it is lost."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[tuple[float, wire.Message]] = asyncio.Queue()
        self.is_lost = False

    def send(self, message: wire.Message) -> None:
        if self.is_lost:
            raise LinkLostError("lost")
        self.sent.put_nowait((time.monotonic(), message))


async def test_a_board_holds_messages_back_in_order_and_forgets_links_that_have_ended(two_stages: Testbed) -> None:
    board, link, lost = EmulatedBoard(two_stages), FakeLink(), FakeLink()
    lost.is_lost = True
    messages: list[wire.Message] = [chunk(0, 20), chunk(1, 1), wire.Credit(1)]
    try:
        began = time.monotonic()
        board.send(cast(Link, lost), wire.Credit(1))
        for message in messages:
            board.send(cast(Link, link), message)
        other = FakeLink()
        board.send(cast(Link, other), wire.Credit(2))
        async with asyncio.timeout(10):
            sent_at, first = await other.sent.get()
            assert first == wire.Credit(2) and sent_at >= began + HOP_S
            arrived = [await link.sent.get() for _ in messages]
    finally:
        board.close()
    assert [message for _, message in arrived] == messages
    for (at, _), num_rows in zip(arrived, (20, 21, 21), strict=True):
        assert at >= began + num_rows * ROW_S + HOP_S


def test_a_ring_of_more_stages_than_the_testbed_is_refused(two_stages: Testbed) -> None:
    with pytest.raises(StageFailedError, match="two-stages has 2 stages; this would be number 3"):
        EmulatedBoard(two_stages).pace(cast(StageRunner, FakeRunner()), 2)


@contextlib.asynccontextmanager
async def emulated_ring(
    testbed: Testbed, bundle: Bundle, told: list[Lateness]
) -> AsyncIterator[tuple[Ring, PacedEngine]]:
    """A ring of emulated boards in this process."""
    nodes = []

    async def start(name: str, board: EmulatedBoard) -> Node:
        settings = NodeSettings(name=name, cluster="test", bundles=(bundle,), memory_bytes=GIB, is_announced=False)
        nodes.append(await Node.start(settings, board))
        return nodes[-1]

    engine = PacedEngine(bundle, testbed)
    try:
        serving = [await start(f"node-{number}", EmulatedBoard(testbed, told.append)) for number in range(2)]
        origin = await start("origin", EmulatedBoard(testbed))
        found = [node.announcement for node in serving]
        async with open_ring(origin, bundle, found, lambda *_: engine) as ring:
            yield ring, engine
    finally:
        await asyncio.gather(*(node.close() for node in nodes))


@pytest.mark.parametrize("schedule", ["autoregressive", "flowspec"])
async def test_an_emulated_ring_writes_the_unsplit_models_text_and_is_no_faster_than_its_boards(
    two_stages: Testbed, bundle: Bundle, schedule: str
) -> None:
    testbed = dataclasses.replace(two_stages, stages=(StageCost(fixed_ms=30, row_ms=0.5, num_layers=4),) * 2)
    options = GenerateOptions(max_new_tokens=12, schedule=schedule)
    prompt = list(range(5, 25))
    told: list[Lateness] = []
    async with emulated_ring(testbed, bundle, told) as (ring, engine):
        async with asyncio.timeout(60):
            answer = await time_answer(ring, prompt, options)
    unsplit = UnsplitModel(bundle.directory, bundle.manifest)
    assert answer.tokens == list(unsplit.generate(prompt, options))
    assert answer.origin_s > 0
    assert engine.lateness.asked_s > 0
    # The root's row leaves with the first token's time; each further token without drafts takes a whole trip.
    num_trips = 11 if schedule == "autoregressive" else 1
    assert answer.decode_s >= num_trips * testbed.trip_ms(1) / 1000 - HOP_S


def test_comparison_rows_and_what_is_said_of_them(two_stages: Testbed) -> None:
    comparison = Comparison("flowspec", 0.6)
    emulated = EmulatedAnswer([1, 2, 3], [0.0, 1.0, 2.0], Lateness(10.0, 1.0), 0.5)
    comparison.add(emulated, TimedAnswer([1, 2, 3], [0.0, 0.5, 1.6]))
    row = comparison.to_row()
    assert row == {
        **{"schedule": "flowspec", "temperature": 0.6, "num_prompts": 1, "tokens_per_s": 1.0},
        **{"virtual_tokens_per_s": 1.25, "difference": pytest.approx(-0.2), "late": 0.1, "origin": 0.25},
    }
    text = format_comparison(two_stages, [row])
    assert "-20.0%" in text and "Not valid: flowspec" in text and "More than 10% apart" in text
    assert "Not valid" not in format_comparison(two_stages, [{**row, "late": 0.01}])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--testbed", "nope"), "choose one of"),
        (("--schedules", "galaxy"), "schedule 'galaxy' is not known"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--plot", "plots"), "go with --virtual"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--emulate", *arguments]) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and said in printed[0]


FAST = """
summary = "quick boards"

[model]
hidden_size = 512
bytes_per_value = 2
source = "for a test"

[network]
hop_ms = 1.0
rate_mbit_per_s = 1000
source = "for a test"

[origin]
head_ms = 2.0
draft_pass_ms = 3.0
draft_row_ms = 0.1
source = "for a test"

[[stages]]
count = 2
device = "a board"
num_layers = 4
fixed_ms = 10.0
row_ms = 0.1
source = "for a test"
"""


@pytest.mark.slow
def test_the_command_runs_processes_and_prints_both_clocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    testbed = tmp_path / "two.toml"
    testbed.write_text(FAST)
    arguments = ["--testbed", str(testbed), "--schedules", "chunked,flowspec", "--prompts", "tables", "--json"]
    assert main(["bench", "--emulate", *arguments, "--num-prompts", "1", "--max-new-tokens", "8"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["testbed"], [row["schedule"] for row in report["rows"]]) == ("two", ["chunked", "flowspec"])
    for row in report["rows"]:
        assert row["num_prompts"] == 1 and row["late"] >= 0
        assert row["tokens_per_s"] > 0 and row["virtual_tokens_per_s"] > 0
    assert "2 of 2 generations" in printed.err
