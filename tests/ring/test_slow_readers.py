"""Who reads a text slowly holds up that text alone, and no memory, whatever the ring could write meanwhile."""

import asyncio
import contextlib

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.origin import ring as origin_ring
from tests.ring.conftest import answer_of, ring_of, tokens_of, unsplit_tokens

UNREAD, NUM_TOKENS = 8, 72


async def test_an_answer_that_nobody_reads_stands_still_and_goes_on_where_it_was(
    int8_bundle: Bundle, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin_ring, "MAX_UNREAD", UNREAD)
    options = GenerateOptions(max_new_tokens=NUM_TOKENS, temperature=0.7, seed=3)
    async with ring_of(2, int8_bundle) as ring, asyncio.timeout(120):
        answer = await ring.begin(prompts[0], options)
        async with contextlib.aclosing(ring.write(answer)) as pieces:
            tokens = list((await anext(pieces)).token_ids)
            others = await answer_of(ring, prompts[1], GenerateOptions(max_new_tokens=NUM_TOKENS))
            assert len(tokens_of(others)) == NUM_TOKENS, "others are written meanwhile"
            ((_, unread),) = ring._answers.values()
            assert UNREAD < unread.qsize() < 3 * UNREAD, "the ring has left it alone, and keeps little for it"
            async for piece in pieces:
                tokens += piece.token_ids
    assert tokens == unsplit_tokens(int8_bundle, prompts[0], options)
    assert piece.statistics is not None and piece.statistics["completion_tokens"] == NUM_TOKENS
    assert answer.num_rings > 1, "it went on in another session"
