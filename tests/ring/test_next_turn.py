"""The next turn of a dialogue takes over what the last one has left at the stages: the same text, sooner."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, Piece
from flowspec_edge.origin.opening import open_ring
from flowspec_edge.origin.ring import Ring
from tests.narrowing import present
from tests.ring.conftest import answer_of, nodes_of, tokens_of, unsplit_tokens

AMPLE = 2**30


@contextlib.asynccontextmanager
async def keeping_ring(
    bundle: Bundle, names: Sequence[str] = ("attic", "cellar", "hall"), *, has_half_cache: bool = False
) -> AsyncIterator[Ring]:
    async with (
        nodes_of(bundle, names, has_half_cache=has_half_cache) as (nodes, origin),
        open_ring(origin, bundle, [node.announcement for node in nodes], kept_bytes=AMPLE) as ring,
    ):
        yield ring


def num_cached(pieces: list[Piece]) -> int:
    return int(present(pieces[-1].statistics)["cached_tokens"])


@pytest.fixture(scope="session")
def w8a8_bundle(demo_export: Callable[..., Path]) -> Bundle:
    return Bundle.load(demo_export("w8a8"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "w8a8"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
async def test_a_dialogue_is_the_unsplit_models_token_for_token(
    precision: str, temperature: float, prompts: list[list[int]], request: pytest.FixtureRequest
) -> None:
    """The third turn takes back what was answered; one is cut by a client that leaves."""
    bundle: Bundle = request.getfixturevalue(f"{precision}_bundle")
    options = GenerateOptions(max_new_tokens=24, temperature=temperature, seed=5)
    async with keeping_ring(bundle) as ring:
        history, kept = (prompts[0] * 2)[:150], 0
        for said in (prompts[1][:9], prompts[2][:1], prompts[3][:30]):
            prompt = [*history, *said]
            pieces = await answer_of(ring, prompt, options)
            assert tokens_of(pieces) == unsplit_tokens(bundle, prompt, options)
            assert num_cached(pieces) >= kept
            kept = len(prompt) - 1
            history = [*prompt, *tokens_of(pieces)]
        async with contextlib.aclosing(ring.generate([*history, 7, 8], options)) as answer:
            begun = (await anext(answer)).token_ids
        prompt = [*history, 7, 8, *begun, 9]
        pieces = await answer_of(ring, prompt, options)
        assert tokens_of(pieces) == unsplit_tokens(bundle, prompt, options)
        assert num_cached(pieces) >= len(history)
        assert ring.kept.num_sessions == 1 and 0 < ring.kept.num_bytes < AMPLE


async def test_the_next_turn_is_the_unsplit_models_and_takes_over_the_last_one(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    options = GenerateOptions(max_new_tokens=6, temperature=0.8)
    async with keeping_ring(int8_bundle, names=("attic",)) as ring:
        prompt = prompts[0][:50]
        prompt = [*prompt, *tokens_of(await answer_of(ring, prompt, options)), 5]
        pieces = await answer_of(ring, prompt, options)
    assert tokens_of(pieces) == unsplit_tokens(int8_bundle, prompt, options)
    assert num_cached(pieces) == 50 + 6 - 2, "all but the last token, of which no row was computed, and one before it"


@pytest.mark.slow
async def test_boards_with_half_the_cache_keep_what_was_seen(int8_bundle: Bundle, prompts: list[list[int]]) -> None:
    options = GenerateOptions(max_new_tokens=16)
    prompt = (prompts[0] * 2)[:140]
    async with keeping_ring(int8_bundle, has_half_cache=True) as ring:
        first = tokens_of(await answer_of(ring, prompt, options))
        again = await answer_of(ring, [*prompt, *first, 5], options)
    async with keeping_ring(int8_bundle, has_half_cache=True) as ring:
        anew = await answer_of(ring, [*prompt, *first, 5], options)
    assert (num_cached(again) >= len(prompt), num_cached(anew)) == (True, 0)
    assert tokens_of(again) == tokens_of(anew)


@pytest.mark.slow
async def test_a_board_that_needed_the_memory_is_no_more_than_slower(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    options = GenerateOptions(max_new_tokens=16)
    prompt = (prompts[0] * 2)[:140]
    async with (
        nodes_of(int8_bundle) as (nodes, origin),
        open_ring(origin, int8_bundle, [node.announcement for node in nodes], kept_bytes=AMPLE) as ring,
    ):
        first = tokens_of(await answer_of(ring, prompt, options))
        async with asyncio.timeout(10):
            while not nodes[1].caches.drop_oldest():
                await asyncio.sleep(0.01)
        second = [*prompt, *first, 5]
        pieces = await answer_of(ring, second, options)
        assert num_cached(pieces) == 0
        assert tokens_of(pieces) == unsplit_tokens(int8_bundle, second, options)
        assert num_cached(await answer_of(ring, second, options)) == len(second) - 1, "that one is kept again"


@pytest.mark.slow
async def test_one_owners_texts_do_not_serve_another(int8_bundle: Bundle, prompts: list[list[int]]) -> None:
    prompt = (prompts[0] * 2)[:140]
    async with keeping_ring(int8_bundle) as ring:
        found = [
            num_cached(await answer_of(ring, prompt, GenerateOptions(max_new_tokens=4, owner=owner)))
            for owner in ("attic", "cellar", "attic", "")
        ]
    assert found == [0, 0, len(prompt) - 1, 0]


@pytest.mark.slow
async def test_what_is_kept_ends_with_the_ring(int8_bundle: Bundle, prompts: list[list[int]]) -> None:
    async with nodes_of(int8_bundle) as (nodes, origin):
        found = [node.announcement for node in nodes]
        async with open_ring(origin, int8_bundle, found, kept_bytes=AMPLE) as ring:
            await answer_of(ring, prompts[0][:60], GenerateOptions(max_new_tokens=4))
            async with asyncio.timeout(10):
                while not all(node.caches.num_bytes for node in nodes):
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(10):
            while any(node.caches.num_bytes for node in nodes):
                await asyncio.sleep(0.01)
