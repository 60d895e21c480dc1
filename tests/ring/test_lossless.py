"""The main property on real parts: whatever the ring, the output is the unsplit model's, token for token."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, RowKind
from flowspec_edge.core.rows import Floats
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.core.speculation.verify import next_token_distribution
from flowspec_edge.engine.kv_cache import KvCache
from flowspec_edge.engine.unsplit import UnsplitModel
from flowspec_edge.errors import RequestError
from tests.narrowing import present
from tests.ring.conftest import answer_of, ring_of, tokens_of, unsplit_tokens

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_nodes", [1, 4, 8])
async def test_greedy_output_on_held_out_prompts(num_nodes: int, bundle: Bundle, prompts: list[list[int]]) -> None:
    options = GenerateOptions(max_new_tokens=32)
    async with ring_of(num_nodes, bundle) as ring:
        assert len(ring.stages) == num_nodes
        for prompt in prompts:
            pieces = await answer_of(ring, prompt, options)
            assert tokens_of(pieces) == unsplit_tokens(bundle, prompt, options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_nodes", [1, 4])
async def test_each_schedule_gives_the_unsplit_models_text(
    num_nodes: int, schedule: str, int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    async with ring_of(num_nodes, int8_bundle) as ring:
        for temperature, prompt in ((0.0, prompts[0]), (1.0, prompts[1])):
            options = GenerateOptions(max_new_tokens=64, temperature=temperature, seed=11, schedule=schedule)
            tokens = tokens_of(await answer_of(ring, prompt, options))
            assert tokens == unsplit_tokens(int8_bundle, prompt, options)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
async def test_rows_in_16_bits_make_one_text_of_a_ring_whatever_the_tree(
    kind: RowKind, int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    """They are rounded where the layers are cut, so the text may be another one than the unsplit model's."""
    texts = []
    async with ring_of(2, int8_bundle, row_kind=kind) as ring:
        for schedule in ("autoregressive", "flowspec"):
            num_bytes = ring.num_bytes[1]
            options = GenerateOptions(max_new_tokens=24, temperature=0.8, seed=5, schedule=schedule)
            pieces = await answer_of(ring, prompts[1], options)
            texts.append(tokens_of(pieces))
            statistics = present(pieces[-1].statistics)
            assert statistics["hidden_rows"] == kind
            width = int8_bundle.manifest.geometry.hidden_size
            num_rows = len(prompts[1]) + statistics["rows_sent"]
            assert ring.num_bytes[1] - num_bytes < num_rows * (2 * width + 12) + 100 * statistics["trips"]
        assert f"rows rounded to {kind} behind layer 3" in ring.stages[0].arithmetic
    assert texts[0] == texts[1] and len(texts[0]) == 24


@pytest.mark.parametrize(
    "schedules", [["flowspec"] * 2, ["flowspec"] * 4, ["flowspec", "chunked", "pipedec", "lockstep"]]
)
async def test_sessions_side_by_side_do_not_mix(
    schedules: list[str], int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    """The first one has a long prompt, which the others' chunks leave between the pieces of."""
    asked = [prompts[0] * 6, *prompts[1 : len(schedules)]]
    options = [
        GenerateOptions(max_new_tokens=24, temperature=0.8 * (number % 2), seed=number, schedule=schedule)
        for number, schedule in enumerate(schedules)
    ]
    async with ring_of(3, int8_bundle) as ring:
        together = await asyncio.gather(*map(answer_of, [ring] * len(asked), asked, options))
    expected = [unsplit_tokens(int8_bundle, *one) for one in zip(asked, options, strict=True)]
    assert [tokens_of(pieces) for pieces in together] == expected


async def test_the_end_of_the_context_is_reached_and_not_passed(int8_bundle: Bundle, prompts: list[list[int]]) -> None:
    max_context = int8_bundle.manifest.geometry.max_context
    prompt = (prompts[0] * 11)[: max_context - 20]
    async with ring_of(2, int8_bundle) as ring:
        pieces = await answer_of(ring, prompt, GenerateOptions(max_new_tokens=128, temperature=1.0, seed=3))
    assert len(tokens_of(pieces)) == 20
    assert pieces[-1].finish_reason == "length"


async def test_a_text_longer_than_memory_is_refused_and_others_go_on(
    int8_bundle: Bundle, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reach = KvCache.reach

    def small(self: KvCache, num_slots: int, layers_at_once: int = 1) -> None:
        if num_slots > 256:
            raise MemoryError("no more than 256 slots")
        reach(self, num_slots, layers_at_once)

    monkeypatch.setattr(KvCache, "reach", small)
    options = GenerateOptions(max_new_tokens=64)
    async with ring_of(2, int8_bundle) as ring:
        other = asyncio.create_task(answer_of(ring, prompts[1], options))
        with pytest.raises(RequestError, match=r"node node-\d: no memory for a KV cache of \d+ slots .*256 slots"):
            await answer_of(ring, (prompts[0] * 6)[:300], options)
        assert tokens_of(await other) == unsplit_tokens(int8_bundle, prompts[1], options)
        assert tokens_of(await answer_of(ring, prompts[1], options)) == tokens_of(await other)


async def test_draws_follow_the_targets_distribution(
    int8_bundle: Bundle, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chi-square over the second token of a ring, which a draft tree offers, for many seeds and a small vocabulary."""
    num_draws, num_kept = 600, 6
    unsplit = UnsplitModel(int8_bundle.directory, int8_bundle.manifest)
    logits: list[Floats] = []
    original = unsplit._head.logits

    def compute_and_keep(hidden: Floats) -> Floats:
        logits.append(original(hidden))
        return logits[-1]

    monkeypatch.setattr(unsplit._head, "logits", compute_and_keep)
    list(unsplit.generate(prompts[1], GenerateOptions(max_new_tokens=1)))
    expected = next_token_distribution(logits[-1][0], GenerateOptions(temperature=1.0, top_k=num_kept))
    counts: Counter[int] = Counter()
    async with ring_of(2, int8_bundle) as ring:
        for seed in range(num_draws):
            options = GenerateOptions(max_new_tokens=1, temperature=1.0, top_k=num_kept, seed=seed)
            counts.update(tokens_of(await answer_of(ring, prompts[1], options)))
    kept = np.flatnonzero(expected).tolist()
    assert set(counts) <= set(kept)
    assert sum(counts.values()) == num_draws
    assert min(expected[kept]) * num_draws >= 5, "too rare for a chi-square test"
    statistic = sum(
        (counts[token] - expected[token] * num_draws) ** 2 / (expected[token] * num_draws) for token in kept
    )
    assert statistic < CHI_SQUARE_999


CHI_SQUARE_999 = 20.52
"""99.9 % quantile of chi-square with 5 degrees of freedom: six tokens."""
