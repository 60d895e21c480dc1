"""Lost rings leave nothing, at the origin or at the nodes, that Python would have to look for."""

import asyncio
import contextlib
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import ForwardFinished
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.errors import StageFailedError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.origin.service import GenerationService
from tests.left_behind import uncollected
from tests.narrowing import present
from tests.ring.conftest import nodes_of, unsplit_tokens
from tests.ring.test_lost_origins import Wire, wires_to

LIMIT_S = 60
NUM_LOSSES = 3
NUM_BEFORE = 8
"""Tokens of a text that are written before its ring is lost."""
OPTIONS = GenerateOptions(max_new_tokens=24)


class Fault:
    """Has the stage of a node fail in its next forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_due = False
        run = StageRunner.run

        def run_or_fail(runner: StageRunner, *arguments: Any) -> ForwardFinished:
            if self.is_due:
                self.is_due = False
                raise StageFailedError("no forward")
            return run(runner, *arguments)

        monkeypatch.setattr(StageRunner, "run", run_or_fail)


async def write(
    service: GenerationService, prompt: list[int], wires: dict[str, Wire], fault: Fault | None
) -> list[int]:
    """A text whose ring is lost in the middle: a stage fails, or the first one is cut off."""
    tokens: list[int] = []
    ring = None
    async with asyncio.timeout(LIMIT_S), contextlib.aclosing(service.generate(prompt, OPTIONS)) as answer:
        async for piece in answer:
            before = len(tokens)
            tokens += piece.token_ids
            if before < NUM_BEFORE <= len(tokens):
                ring = service.ring
                if fault is not None:
                    fault.is_due = True
                else:
                    await wires[present(service.ring).stages[0].plan.node].cut()
    assert service.ring is not ring
    return tokens


@pytest.mark.parametrize("is_cut_off", [True, False], ids=["cut off", "failed"])
async def test_nothing_is_left_of_lost_rings(
    int8_bundle: Bundle, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch, is_cut_off: bool
) -> None:
    fault = None if is_cut_off else Fault(monkeypatch)
    names = [f"pi-{number}" for number in range(NUM_LOSSES + 1)]
    expected = unsplit_tokens(int8_bundle, prompts[0], OPTIONS)
    async with nodes_of(int8_bundle, names) as (nodes, origin), wires_to(nodes) as (wires, found):

        async def search() -> list[Announcement]:
            return found

        with uncollected() as left:
            async with GenerationService(origin, int8_bundle, search) as service:
                for _ in range(NUM_LOSSES):
                    assert await write(service, prompts[0], dict(zip(names, wires, strict=True)), fault) == expected
            del service
            await left.until_nothing()
