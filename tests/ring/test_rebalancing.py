"""A ring that moves while it serves: to a board that came later, with its texts, and none of them changes."""

import asyncio
import contextlib
import dataclasses
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.device.throttling import ThermalReport
from flowspec_edge.core.events import ForwardFinished
from flowspec_edge.core.planning import rebalancing
from flowspec_edge.core.planning.placement import Plan
from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.node import Node
from flowspec_edge.node.pacing import Board, Runner
from flowspec_edge.origin import upkeep
from flowspec_edge.origin.opening import open_ring, plan_layers
from flowspec_edge.origin.planning import PlanOptions
from flowspec_edge.origin.ring import Ring
from flowspec_edge.origin.service import GenerationService
from tests.narrowing import present
from tests.ring import conftest
from tests.ring.conftest import found_of, nodes_of, tokens_of

WAIT_S = 60
OPTIONS = GenerateOptions(max_new_tokens=40, temperature=0.8, seed=11)
PLAN_OPTIONS = PlanOptions(num_tokens=256)


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "SETTLE_S", 0.0)


class Boards:
    """What a directory would find."""

    def __init__(self, nodes: list[Node]) -> None:
        self.found = found_of(nodes)
        self._changed = asyncio.Event()

    async def search(self) -> list[Announcement]:
        return self.found

    def set(self, nodes: list[Node]) -> None:
        self.found = found_of(nodes)
        self._changed.set()

    def doubt(self, node: str) -> None:
        pass

    def hear_of(self, board: Announcement) -> None:
        pass

    async def wait_for(
        self, is_enough: Callable[[list[Announcement]], bool], timeout_s: float | None
    ) -> list[Announcement]:
        while not is_enough(self.found):
            self._changed.clear()
            await self._changed.wait()
        return self.found


class HeldBoard(Board):
    """Its stages run so many forwards and then wait: a text that cannot end before the test has done what it wants."""

    gate = threading.Event()
    num_free = 12

    def pace(self, runner: Runner, stage: int) -> Runner:
        run, num_run = runner.run, 0

        def held(*arguments: Any) -> ForwardFinished:
            nonlocal num_run
            num_run += 1
            if num_run > self.num_free:
                assert self.gate.wait(WAIT_S)
            return run(*arguments)

        runner.run = held  # type: ignore[method-assign, assignment]  # for this board alone
        return runner


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    HeldBoard.gate.clear()
    yield HeldBoard.gate
    HeldBoard.gate.set()


@contextlib.asynccontextmanager
async def service_of(
    bundle: Bundle,
    names: Sequence[str] = ("attic", "cellar", "hall"),
    num_first: int = 2,
    board: Callable[[], Board] | None = None,
    **options: Any,
) -> AsyncIterator[tuple[GenerationService, Boards, list[Node]]]:
    async with nodes_of(bundle, names, board=board) as (nodes, origin):
        boards = Boards(nodes[:num_first])
        options = {"plan_options": PLAN_OPTIONS, **options}
        async with GenerationService(origin, bundle, boards.search, boards=boards, **options) as service:
            async with asyncio.timeout(WAIT_S):
                yield service, boards, nodes


def served(service: GenerationService) -> dict[str, int]:
    return {stage.plan.node: stage.plan.stop - stage.plan.start for stage in present(service.ring).stages}


async def answer_of(service: GenerationService, prompt: list[int], options: GenerateOptions = OPTIONS) -> list[Piece]:
    async with contextlib.aclosing(service.generate(prompt, options)) as answer:
        return [piece async for piece in answer]


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


unsplit_tokens = functools.partial(conftest.unsplit_tokens, options=OPTIONS)


async def test_a_new_board_is_used_from_the_next_session_on(
    int8_bundle: Bundle, quick_curve: list[str], prompts: list[list[int]]
) -> None:
    async with service_of(int8_bundle) as (service, boards, nodes):
        assert tokens_of(await answer_of(service, prompts[0])) == unsplit_tokens(int8_bundle, prompts[0])
        assert served(service) == {"attic": 4, "cellar": 4}
        boards.set(nodes)
        await until(lambda: service.ring is not None and len(service.ring.stages) == 3)
        pieces = await answer_of(service, prompts[0])
        assert set(served(service)) == {"attic", "cellar", "hall"}
    assert tokens_of(pieces) == unsplit_tokens(int8_bundle, prompts[0])


async def test_at_once_a_text_goes_on_over_the_new_ring_and_is_the_same(
    int8_bundle: Bundle, quick_curve: list[str], prompts: list[list[int]], gate: threading.Event
) -> None:
    async with service_of(int8_bundle, board=HeldBoard, moves_at_once=True) as (service, boards, nodes):
        answers = [asyncio.create_task(answer_of(service, prompt)) for prompt in prompts[:2]]
        await until(lambda: service.ring is not None)
        first = service.ring
        boards.set(nodes)
        await until(lambda: service.ring not in (None, first))
        gate.set()
        pieces = await asyncio.gather(*answers)
        assert set(served(service)) == {"attic", "cellar", "hall"}
    for prompt, answer in zip(prompts, pieces, strict=False):
        assert tokens_of(answer) == unsplit_tokens(int8_bundle, prompt)
        statistics = present(answer[-1].statistics)
        assert statistics["completion_tokens"] == len(tokens_of(answer)) == 40
        assert statistics["prompt_tokens"] == len(prompt)
        assert statistics["prediction"] is None, "of which ring?"


async def test_without_at_once_a_text_ends_where_it_began(
    int8_bundle: Bundle,
    quick_curve: list[str],
    prompts: list[list[int]],
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planned = asyncio.Event()

    async def plan_and_tell(*arguments: Any) -> Plan:
        plan = await plan_layers(*arguments)
        planned.set()
        return plan

    monkeypatch.setattr(upkeep, "plan_layers", plan_and_tell)
    async with service_of(int8_bundle, board=HeldBoard) as (service, boards, nodes):
        answer = asyncio.create_task(answer_of(service, prompts[0]))
        await until(lambda: service.ring is not None)
        first = present(service.ring)
        boards.set(nodes)
        await planned.wait()
        gate.set()
        assert tokens_of(await answer) == unsplit_tokens(int8_bundle, prompts[0])
        assert len(first.stages) == 2
        await until(lambda: service.ring not in (None, first))
        assert len(present(service.ring).stages) == 3
        assert service.writer is first


async def test_a_text_that_ended_just_before_the_move_is_not_gone_on_with(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    """Its last tokens wait to be read while the ring is left."""
    async with service_of(int8_bundle, plan_options=None) as (service, _, _nodes):
        pieces = service.generate(prompts[0], OPTIONS)
        first = await anext(pieces)
        await until(lambda: not present(service.ring)._core._running)
        present(service.ring).leave()
        answer = [first, *[piece async for piece in pieces]]
    assert tokens_of(answer) == unsplit_tokens(int8_bundle, prompts[0])
    assert answer[-1].finish_reason == "length"


async def test_equal_shares_take_every_new_board_in(int8_bundle: Bundle, prompts: list[list[int]]) -> None:
    async with service_of(int8_bundle, plan_options=None) as (service, boards, nodes):
        await answer_of(service, prompts[0])
        boards.set(nodes)
        await until(lambda: service.ring is not None and len(service.ring.stages) == 3)
        assert tokens_of(await answer_of(service, prompts[0])) == unsplit_tokens(int8_bundle, prompts[0])


async def test_equal_shares_stay_where_a_board_cannot_be_used(
    int8_bundle: Bundle, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebalancing, "REPLAN_S", 0.0)
    async with service_of(int8_bundle, plan_options=None) as (service, boards, _nodes):
        boards.found.append(dataclasses.replace(boards.found[0], node="hall", port=1))
        await answer_of(service, prompts[0])
        first = present(service.ring)
        await until(lambda: not service._upkeep._core._is_planning)
        assert set(served(service)) == {"attic", "cellar"}
        assert service.ring is first and first.is_open


async def test_a_board_that_does_not_help_moves_nothing(
    int8_bundle: Bundle, quick_curve: list[str], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service_of(int8_bundle, num_first=3, names=("attic", "cellar", "hall", "zero")) as (
        service,
        boards,
        nodes,
    ):
        await answer_of(service, prompts[0])
        first, planned = service.ring, asyncio.Event()

        def tell_and_be_hot() -> ThermalReport:
            planned.set()
            return hot()

        monkeypatch.setattr(nodes[3].measurements, "_thermometer", tell_and_be_hot)
        boards.set(nodes)
        await planned.wait()
        await until(lambda: not service._upkeep._core._is_planning)
        assert service.ring is first and present(first).is_open
        assert tokens_of(await answer_of(service, prompts[0])) == unsplit_tokens(int8_bundle, prompts[0])


def hot() -> ThermalReport:
    return ThermalReport(99.0, 80.0, 0.05)


async def test_a_ring_that_cannot_be_moved_is_opened_as_it_was(
    int8_bundle: Bundle,
    quick_curve: list[str],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with service_of(int8_bundle) as (service, boards, nodes):
        await answer_of(service, prompts[0])
        first = service.ring

        def broken(
            node: Node, bundle: Bundle, found: list[Announcement], **options: Any
        ) -> AbstractAsyncContextManager[Ring]:
            if len(found) == 3:
                raise NodeUnavailableError("hall: its disk is full")
            return open_ring(node, bundle, found, **options)

        monkeypatch.setattr(upkeep, "open_ring", broken)
        boards.set(nodes)
        await until(lambda: not present(first).is_open)
        assert tokens_of(await answer_of(service, prompts[0])) == unsplit_tokens(int8_bundle, prompts[0])
        assert set(served(service)) == {"attic", "cellar"}
        assert service._upkeep._core.next_deadline() is None and not service._upkeep._core._is_planning, (
            "a refused board is no news"
        )
    assert "the ring is opened as it was, since it cannot be moved: hall: its disk is full" in caplog.text


async def test_only_boards_that_were_to_serve_are_refused_and_tried_again_where_the_others_cannot(
    int8_bundle: Bundle,
    quick_curve: list[str],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with service_of(int8_bundle, names=("attic", "cellar", "hall", "zero")) as (service, boards, nodes):
        await answer_of(service, prompts[0])
        first = service.ring

        def broken(
            node: Node, bundle: Bundle, found: list[Announcement], **options: Any
        ) -> AbstractAsyncContextManager[Ring]:
            if options["plan"] is not None:
                raise NodeUnavailableError("hall: its disk is full")
            return open_ring(node, bundle, found, **options)

        monkeypatch.setattr(upkeep, "open_ring", broken)
        monkeypatch.setattr(nodes[3].measurements, "_thermometer", hot)
        boards.set(nodes)
        await until(lambda: not present(first).is_open and service.ring is None)
        await until(lambda: service._upkeep._refused)
        assert service._upkeep._refused == {"hall"}, "the plan does not use zero"
        boards.found = found_of(nodes[2:3])
        assert tokens_of(await answer_of(service, prompts[0])) == unsplit_tokens(int8_bundle, prompts[0])
        assert set(served(service)) == {"hall"} and not service._upkeep._refused
    assert "all boards are tried" in caplog.text


async def test_a_board_that_throttled_gives_layers_away_before_the_next_session(
    int8_bundle: Bundle, quick_curve: list[str], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebalancing, "REPLAN_S", 0.0)
    async with service_of(int8_bundle) as (service, _, nodes):
        heat: list[ThermalReport] = []
        monkeypatch.setattr(nodes[0].measurements, "_thermometer", lambda: heat[0] if heat else None)
        await answer_of(service, prompts[0])
        assert served(service) == {"attic": 4, "cellar": 4}
        heat.append(ThermalReport(82.0, 80.0, 0.6))
        assert tokens_of(await answer_of(service, prompts[0])) == unsplit_tokens(int8_bundle, prompts[0])
        await until(lambda: service.ring is not None and served(service) == {"attic": 3, "cellar": 5})


async def test_a_plan_that_fails_by_a_bug_is_not_the_last(
    int8_bundle: Bundle,
    quick_curve: list[str],
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    num_plans = 0

    async def fail_once(*arguments: Any) -> Plan:
        nonlocal num_plans
        num_plans += 1
        if num_plans == 1:
            raise ZeroDivisionError("a bug")
        return await plan_layers(*arguments)

    monkeypatch.setattr(upkeep, "plan_layers", fail_once)
    async with service_of(int8_bundle) as (service, boards, nodes):
        await answer_of(service, prompts[0])
        boards.set(nodes)
        await until(lambda: "please report this" in caplog.text)
        monkeypatch.setattr(rebalancing, "REPLAN_S", 0.0)
        await answer_of(service, prompts[0])
        await until(lambda: service.ring is not None and len(service.ring.stages) == 3)
