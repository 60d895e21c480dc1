"""Runs schedules on emulated boards in real time: node processes of this machine that take as long as a testbed says.

Everything else is as in any ring: processes, sockets, messages and forwards are real. Each generation is compared with
the
same generation on the virtual clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flowspec_edge.bench.compare import Bench, Plan, Task, check_text
from flowspec_edge.bench.emulated_board import EmulatedBoard, Lateness, PacedEngine
from flowspec_edge.bench.report import format_table
from flowspec_edge.bench.testbed import Testbed
from flowspec_edge.bench.virtual_clock import TimedAnswer
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.errors import BenchError, NodeUnavailableError
from flowspec_edge.net.directory import find_peers
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import SEARCH_S, NodeProcess, node_processes
from flowspec_edge.node.resources import NodeSettings, unique_name
from flowspec_edge.origin.engine import LoadedParts
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from flowspec_edge.version import __version__

TOLD_S = 5.0
"""How long a node may take to report how late it was, after its session has ended."""
LATE_LIMIT = 0.05
"""A run is not valid where computing took more than this share longer than the testbed says. That would be half of what
the clocks may differ by.
"""
AGREEMENT = 0.1
"""A valid figure that differs from the virtual clock by more than this share is explained in the output."""


async def _told_lateness(node: NodeProcess) -> Lateness:
    stdout = node.process.stdout
    assert stdout is not None
    try:
        async with asyncio.timeout(TOLD_S):
            line = await stdout.readline()
    except TimeoutError:
        raise NodeUnavailableError(f"node {node.name}: did not say within {TOLD_S:.0f} s how late it was") from None
    if not line:
        raise NodeUnavailableError(f"node {node.name}: ended")
    return Lateness(*json.loads(line))


@dataclass(slots=True)
class EmulatedAnswer(TimedAnswer):
    """One generation in real time.

    ``origin_s`` is the processor time of the origin's event loop after the first tokens. It goes into planning, packing
    and sending, which the virtual clock leaves out.
    """

    lateness: Lateness = field(default_factory=Lateness)
    origin_s: float = 0.0


class Emulation:
    """The boards of one testbed as processes of this machine. Made by :func:`emulated_boards`."""

    def __init__(
        self,
        testbed: Testbed,
        bundle: Bundle,
        parts: LoadedParts,
        node: Node,
        processes: Sequence[NodeProcess],
        found: Sequence[Announcement],
    ) -> None:
        self.testbed = testbed
        self._bundle, self._parts = bundle, parts
        self._node, self._processes, self._found = node, processes, found

    async def generate(self, prompt: Sequence[int], options: GenerateOptions) -> EmulatedAnswer:
        """Generate one text on a new ring, which has learned nothing from earlier texts, as on the virtual clock.

        Raises:
            BenchError: the bundle cannot be cut into as many stages.
            FlowspecError: the ring was lost.
        """
        async with self.ring() as (ring, engine):
            answer = await time_answer(ring, prompt, options)
            answer.lateness = await self.told_lateness(engine)
        return answer

    @contextlib.asynccontextmanager
    async def ring(self, kept_bytes: int = 0) -> AsyncIterator[tuple[Ring, PacedEngine]]:
        """A new ring of the boards, and what its origin computes with. It keeps ended sessions in so much memory.

        Raises:
            BenchError: the bundle cannot be cut into as many stages.
            FlowspecError: it could not be opened.
        """
        engine = PacedEngine(self._bundle, self.testbed, self._parts)
        opening = open_ring(self._node, self._bundle, self._found, lambda *_: engine, kept_bytes=kept_bytes)
        async with opening as ring:
            if len(ring.stages) != len(self.testbed.stages):
                raise BenchError(
                    f"testbed {self.testbed.name} has {len(self.testbed.stages)} stages; this bundle can be cut into "
                    f"{len(ring.stages)}"
                )
            yield ring, engine

    async def told_lateness(self, engine: PacedEngine) -> Lateness:
        """How late the boards of an open ring and its origin have been."""
        told = await asyncio.gather(*(_told_lateness(process) for process in self._processes))
        return sum(told, engine.lateness)


async def time_answer(ring: Ring, prompt: Sequence[int], options: GenerateOptions) -> EmulatedAnswer:
    """Generate one text, and note when each of its tokens was final."""
    answer = EmulatedAnswer()
    began_at = 0.0
    async with contextlib.aclosing(ring.generate(prompt, options)) as pieces:
        async for piece in pieces:
            if piece.token_ids:
                began_at = began_at or time.thread_time()
                answer.origin_s = time.thread_time() - began_at
                answer.tokens += piece.token_ids
                answer.token_times_s += [time.monotonic()] * len(piece.token_ids)
    return answer


@contextlib.asynccontextmanager
async def emulated_boards(testbed: Testbed, source: str, bundle: Bundle) -> AsyncIterator[Emulation]:
    """Start the boards of a testbed, whose name or file is ``source``. They end with the context.

    Raises:
        NodeUnavailableError: a node process did not start, or was not found.
    """
    num_nodes = len(testbed.stages)
    parts = await asyncio.to_thread(LoadedParts.load, bundle, 1, DraftShape())
    async with node_processes(num_nodes, bundle.directory, "--emulate", source) as (cluster, processes):
        settings = NodeSettings(name=unique_name(), cluster=cluster, bundles=(bundle,), is_announced=False)
        found = await find_peers(
            settings.neighbourhood,
            node=settings.name,
            version=__version__,
            num_nodes=num_nodes,
            timeout_s=SEARCH_S,
        )
        node = await Node.start(settings, EmulatedBoard(testbed))
        try:
            yield Emulation(testbed, bundle, parts, node, processes, found)
        finally:
            await node.close()


@dataclass(slots=True)
class Comparison:
    """Sums over all generations with one schedule at one temperature."""

    schedule: str
    temperature: float
    num_prompts: int = 0
    num_decoded: int = 0
    emulated_s: float = 0.0
    virtual_s: float = 0.0
    origin_s: float = 0.0
    lateness: Lateness = field(default_factory=Lateness)

    def add(self, emulated: EmulatedAnswer, virtual: TimedAnswer) -> None:
        self.num_prompts += 1
        self.num_decoded += emulated.num_decoded
        self.emulated_s += emulated.decode_s
        self.virtual_s += virtual.decode_s
        self.origin_s += emulated.origin_s
        self.lateness += emulated.lateness

    def to_row(self) -> dict[str, Any]:
        """The figures as a row of the table.

        ``difference`` compares tokens/s with the virtual clock; ``late`` and ``origin`` are shares of time.
        """
        has_decoded = self.num_decoded > 0
        emulated = self.num_decoded / self.emulated_s if has_decoded else 0.0
        virtual = self.num_decoded / self.virtual_s if has_decoded else 0.0
        return {
            "schedule": self.schedule,
            "temperature": self.temperature,
            "num_prompts": self.num_prompts,
            "tokens_per_s": emulated,
            "virtual_tokens_per_s": virtual,
            "difference": emulated / virtual - 1 if has_decoded else 0.0,
            "late": self.lateness.share,
            "origin": self.origin_s / self.emulated_s if has_decoded else 0.0,
        }


async def compare_with_virtual(
    boards: Emulation, bench: Bench, plan: Plan, tasks: Sequence[Task], on_finish: Callable[[], None]
) -> list[dict[str, Any]]:
    """Run every schedule on every task, on the boards and on the virtual clock. ``on_finish`` is called after each run.

    Raises:
        LosslessError: a schedule wrote another text than the target.
        FlowspecError: a run failed.
    """
    sums: dict[tuple[str, float], Comparison] = {}
    for task in tasks:
        options = task.options(plan)
        tape = await asyncio.to_thread(bench.record, task, options)
        for schedule in plan.schedules:
            chosen = replace(options, schedule=schedule)
            virtual = await asyncio.to_thread(bench.play, boards.testbed, tape, chosen)
            emulated = await boards.generate(tape.prompt, chosen)
            check_text(emulated.tokens, tape.continuation, f"{schedule} on emulated {boards.testbed.name}")
            key = (schedule, task.temperature)
            sums.setdefault(key, Comparison(*key)).add(emulated, virtual)
            on_finish()
    return [comparison.to_row() for comparison in sums.values()]


def format_comparison(testbed: Testbed, rows: Sequence[dict[str, Any]]) -> str:
    """A table, and below it remarks on figures that are not valid or need an explanation."""
    header = ["schedule", "temperature", "prompts", "emulated", "virtual", "difference", "late", "origin"]
    lines = [
        [
            row["schedule"],
            f"{row['temperature']:g}",
            str(row["num_prompts"]),
            *(f"{row[name]:.2f}" for name in ("tokens_per_s", "virtual_tokens_per_s")),
            f"{row['difference']:+.1%}",
            *(f"{row[name]:.1%}" for name in ("late", "origin")),
        ]
        for row in rows
    ]
    parts = [f"### {testbed.name}, emulated: tokens/s in real time", format_table(header, lines), *_remarks(rows)]
    return "\n\n".join(parts)


def _remarks(rows: Sequence[dict[str, Any]]) -> list[str]:
    remarks = []
    late = [row["schedule"] for row in rows if row["late"] > LATE_LIMIT]
    if late:
        remarks.append(
            f"Not valid: {', '.join(late)}. Computing took over {LATE_LIMIT:.0%} longer than the testbed says, because "
            "this machine is too slow or was busy; end what else runs here, or take a slower testbed."
        )
    if any(abs(row["difference"]) > AGREEMENT for row in rows):
        remarks.append(
            f"More than {AGREEMENT:.0%} apart: the virtual clock leaves out what the origin's own code takes (origin: "
            "its share of the time) and what messages between processes of one machine take beyond the testbed's "
            "latency."
        )
    return remarks
