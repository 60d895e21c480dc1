"""Stages are killed and frozen while texts are written: each text has a pause, and not a token is another one."""

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.core.planning import rebalancing
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.net.addresses import LOOPBACK
from flowspec_edge.net.directory import Directory
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.neighbourhood import Neighbourhood
from flowspec_edge.node.node import Node
from flowspec_edge.node.process import NodeProcess, node_processes
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.ring import Ring
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.version import __version__
from tests.narrowing import present
from tests.ring.conftest import nodes_of, tokens_of, unsplit_tokens
from tests.ring.test_rebalancing import Boards

LIMIT_S = 60
GREEDY = GenerateOptions(max_new_tokens=40)
SEEDED = GenerateOptions(
    max_new_tokens=60, temperature=0.8, seed=7, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.3
)
NUM_BEFORE = 8
"""Tokens that are written before a stage is lost in the middle of a text."""


@pytest.fixture(autouse=True)
def no_settling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalancing, "SETTLE_S", 0.0)


@contextlib.asynccontextmanager
async def service_over_processes(bundle: Bundle) -> AsyncIterator[tuple[GenerationService, Sequence[NodeProcess]]]:
    """A service whose ring has three stages, each in a process of its own."""
    async with contextlib.AsyncExitStack() as closing:
        cluster, nodes = await closing.enter_async_context(node_processes(3, DEMO_BUNDLE))
        origin = await Node.start(NodeSettings(name="origin", cluster=cluster, bundles=(bundle,), is_announced=False))
        closing.push_async_callback(origin.close)
        where = Neighbourhood(cluster=cluster, host=LOOPBACK)
        directory = await closing.enter_async_context(await Directory.start(where, node="origin", version=__version__))

        async def search() -> list[Announcement]:
            return await directory.wait_for(lambda found: len(found) == len(nodes), LIMIT_S)

        service = GenerationService(origin, bundle, search, boards=directory)
        yield await closing.enter_async_context(service), nodes


async def write(
    service: GenerationService,
    prompt: str,
    options: GenerateOptions,
    when: str = "",
    strike: Callable[[], object] = int,
) -> list[Piece]:
    """A text; ``strike`` is called before its first token, or in the middle of it."""
    pieces: list[Piece] = []
    if when == "prefill":
        asyncio.get_running_loop().call_later(0.01, strike)
    async with asyncio.timeout(LIMIT_S), contextlib.aclosing(service.generate(prompt, options)) as answer:
        async for piece in answer:
            before, pieces = len(tokens_of(pieces)), [*pieces, piece]
            if when == "middle" and before < NUM_BEFORE <= len(tokens_of(pieces)):
                strike()
    return pieces


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.02)


def ring_of(service: GenerationService) -> Ring:
    return present(service.ring)


def num_stages(service: GenerationService) -> int:
    return len(service.ring.stages) if service.ring is not None else 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "first", "second"), [(0, "prefill", "middle"), (1, "middle", "prefill"), (2, "prefill", "middle")]
)
async def test_a_stage_that_is_frozen_and_then_killed_costs_time_alone(
    int8_bundle: Bundle, prompts: list[list[int]], stage: int, first: str, second: str
) -> None:
    tokenizer = Tokenizer(DEMO_BUNDLE / "tokenizer.json")
    prompt = tokenizer.decode(prompts[0])
    ids = tokenizer.encode(prompt)
    whole = tokenizer.decode(unsplit_tokens(int8_bundle, ids, SEEDED))
    stop = whole[len(whole) * 3 // 4 :][:5]
    async with service_over_processes(int8_bundle) as (service, nodes):
        await write(service, "x", GenerateOptions(max_new_tokens=1))
        victim = next(node for node in nodes if node.name == ring_of(service).stages[stage].plan.node)
        pid = victim.process.pid
        try:
            pieces = await write(service, prompt, GREEDY, first, lambda: os.kill(pid, signal.SIGSTOP))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert tokens_of(pieces) == unsplit_tokens(int8_bundle, ids, GREEDY)
        assert num_stages(service) == 2
        await until(lambda: num_stages(service) == 3)  # thawed, it serves again

        seeded = dataclasses.replace(SEEDED, stop=(stop,))
        pieces = await write(service, prompt, seeded, second, victim.kill)
        assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
        assert pieces[-1].finish_reason == "stop"
        assert num_stages(service) == 2
    assert not [piece.notice for piece in pieces if piece.notice], "two nodes have room for all layers"


async def test_with_too_little_memory_left_a_text_waits_for_a_board(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    memory_bytes = 80 * 2**20  # of a node: all layers need 87 MiB, half of them 74
    async with nodes_of(int8_bundle, memory_bytes=memory_bytes) as (nodes, origin):
        boards = Boards(nodes[:2])
        async with GenerationService(origin, int8_bundle, boards.search, boards=boards) as service:
            pieces: list[Piece] = []
            async with asyncio.timeout(LIMIT_S):
                async for piece in service.generate(prompts[0], SEEDED):
                    pieces.append(piece)
                    if len(pieces) == NUM_BEFORE:
                        await nodes[1].close()
                    if piece.notice is not None:
                        boards.set([nodes[0], nodes[2]])
    assert tokens_of(pieces) == unsplit_tokens(int8_bundle, prompts[0], SEEDED)
    (notice,) = [piece.notice for piece in pieces if piece.notice is not None]
    assert "layers [4, 8) of cellar have no home" in notice


async def test_the_statistics_say_where_layers_moved_to_a_board_of_another_precision(
    two_precisions: Bundle, prompts: list[list[int]]
) -> None:
    """The text goes on as the board that is left computes it."""
    async with nodes_of(two_precisions, ("attic", "hall")) as (nodes, origin):
        nodes[0].precisions.by_hand = "int8"
        boards = Boards(nodes)
        async with GenerationService(origin, two_precisions, boards.search, boards=boards) as service:
            pieces: list[Piece] = []
            async with asyncio.timeout(LIMIT_S):
                async for piece in service.generate(prompts[0], GREEDY):
                    pieces.append(piece)
                    if len(pieces) == NUM_BEFORE:
                        await nodes[0].close()
    tokens = tokens_of(pieces)
    (change,) = present(pieces[-1].statistics)["arithmetic_changes"]
    at = change["at_token"]
    assert 0 < at < len(tokens) == GREEDY.max_new_tokens and (change["start"], change["stop"]) == (0, 4)
    assert change["before"].startswith("int8 on ") and change["after"] == change["before"].replace("int8", "fp32")
    left = GenerateOptions(max_new_tokens=GREEDY.max_new_tokens - at)
    assert tokens[at:] == unsplit_tokens(two_precisions, [*prompts[0], *tokens[:at]], left)


async def test_layers_that_move_among_boards_of_one_kind_change_nothing(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    async with nodes_of(int8_bundle, ("attic", "hall")) as (nodes, origin):
        boards = Boards(nodes)
        async with GenerationService(origin, int8_bundle, boards.search, boards=boards) as service:
            pieces: list[Piece] = []
            async with asyncio.timeout(LIMIT_S):
                async for piece in service.generate(prompts[0], GREEDY):
                    pieces.append(piece)
                    if len(pieces) == NUM_BEFORE:
                        await nodes[0].close()
    assert present(pieces[-1].statistics)["arithmetic_changes"] == []
