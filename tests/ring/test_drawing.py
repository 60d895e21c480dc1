"""OpenAI's client, the API, a ring and the demo model: what penalties, biases and log-probabilities make of a text."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions, UnfinishedText
from flowspec_edge.core.events import RunForward
from flowspec_edge.core.rows import NO_PARENT, Floats, Row
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.schedules import SCHEDULES
from flowspec_edge.engine.head import Head
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.server import serve_app
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.web.app import build_app
from flowspec_edge.web.chat_template import ChatTemplate
from tests.ring.conftest import answer_of, found_of, nodes_of, ring_of, tokens_of, unsplit_tokens

openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")

PENALISED = GenerateOptions(
    max_new_tokens=48,
    temperature=0.8,
    seed=5,
    min_p=0.02,
    repetition_penalty=1.15,
    presence_penalty=0.4,
    frequency_penalty=0.2,
    logit_bias=((7, -2.0), (40, 1.0)),
    min_tokens=40,
    stop_token_ids=(11, 13),
)


@contextlib.asynccontextmanager
async def client_of(bundle: Bundle, chat: ChatTemplate | None = None) -> AsyncIterator[Any]:
    """OpenAI's client of a server over three nodes."""
    async with nodes_of(bundle) as (nodes, origin):

        async def search() -> list[Announcement]:
            return found_of(nodes)

        async with GenerationService(origin, bundle, search) as service:
            served = await serve_app(build_app(service, chat=chat), cancels_on_disconnect=True)
            url = f"http://127.0.0.1:{served.port}/v1"
            try:
                async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
                    yield client
            finally:
                await served.close()


def logits_after(bundle: Bundle, prompt: list[int], written: list[int]) -> Floats:
    """The target's logits [written, vocab_size] for each token behind the prompt."""
    tokens = [*prompt, *written]
    stage = StageRunner(bundle.directory, bundle.manifest, 0, bundle.manifest.geometry.num_layers)
    slots = KvSlots(len(tokens))
    stage.open_cache(0, slots.capacity)
    rows = [Row(at, at - 1 if at else NO_PARENT, token) for at, token in enumerate(tokens[:-1])]
    hidden = stage.run(RunForward(0, tuple(rows), None, slots.place(rows))).hidden
    return Head(bundle.directory, bundle.manifest).logits(hidden[len(prompt) - 1 :])


async def test_a_completion_with_everything_is_what_the_unsplit_model_writes(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    options, prompt = PENALISED, prompts[0]
    expected = unsplit_tokens(int8_bundle, prompt, options)
    async with client_of(int8_bundle) as client:
        asked = {
            "model": int8_bundle.manifest.name,
            "prompt": prompt,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "seed": options.seed,
            "presence_penalty": options.presence_penalty,
            "frequency_penalty": options.frequency_penalty,
            "logit_bias": {str(token): bias for token, bias in options.logit_bias},
            "logprobs": 3,
            "extra_body": {
                "min_p": options.min_p,
                "repetition_penalty": options.repetition_penalty,
                "min_tokens": options.min_tokens,
                "stop_token_ids": list(options.stop_token_ids),
            },
        }
        answer = await client.completions.create(**asked)
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
        with pytest.raises(openai.BadRequestError) as error:
            await client.completions.create(**asked | {"logit_bias": {"1000000": 1}})
    assert error.value.param == "logit_bias"
    (choice,) = answer.choices
    assert choice.token_ids == expected != unsplit_tokens(int8_bundle, prompt, GenerateOptions(max_new_tokens=48))
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == expected
    logits = logits_after(int8_bundle, prompt, expected).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    told = choice.logprobs
    np.testing.assert_allclose(told.token_logprobs, log_probs[np.arange(len(expected)), expected], atol=1e-3)
    for row, top in zip(log_probs, told.top_logprobs, strict=True):
        np.testing.assert_allclose(sorted(top.values())[-3:], np.sort(row)[-3:], atol=1e-3)
    tokenizer = Tokenizer(int8_bundle.directory / "tokenizer.json")
    ends = [*told.text_offset[1:], len(choice.text)]
    whole = tokenizer.decode(expected)
    assert [whole[at:end] for at, end in zip(told.text_offset, ends, strict=True)] == told.tokens
    streamed = [at for chunk in chunks if chunk.choices[0].logprobs for at in chunk.choices[0].logprobs.text_offset]
    assert streamed == told.text_offset


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "flowspec"])
async def test_each_schedule_writes_the_unsplit_models_text(
    schedule: str, int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    options = dataclasses.replace(PENALISED, schedule=schedule, max_new_tokens=24, min_tokens=20)
    async with ring_of(2, int8_bundle) as ring:
        pieces = await answer_of(ring, prompts[1], options)
    assert tokens_of(pieces) == unsplit_tokens(int8_bundle, prompts[1], options)


async def test_a_ring_goes_on_with_a_penalised_text_from_any_token(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    options = dataclasses.replace(PENALISED, num_logprobs=0)
    expected = unsplit_tokens(int8_bundle, prompts[0], options)
    async with ring_of(2, int8_bundle) as ring:
        whole = await answer_of(ring, prompts[0], options)
        offsets = [at for piece in whole if piece.logprobs for at in piece.logprobs.offsets]
        assert tokens_of(whole) == expected
        for num in (1, 20, len(expected) - 1):
            text = UnfinishedText(prompt=tuple(prompts[0]), tokens=tuple(expected[:num]))
            pieces = [piece async for piece in ring.write(await ring.begin(text, options))]
            assert tokens_of(pieces) == expected[num:]
            assert [at for piece in pieces if piece.logprobs for at in piece.logprobs.offsets] == offsets[num:]


async def test_a_text_ends_behind_the_tokens_that_are_named_and_not_before_it_is_long_enough(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    free = unsplit_tokens(int8_bundle, prompts[0], GenerateOptions(max_new_tokens=48))
    end = free[10]
    first = GenerateOptions(max_new_tokens=48, stop_token_ids=(end,))
    later = dataclasses.replace(first, min_tokens=free.index(end) + 2)
    async with ring_of(2, int8_bundle) as ring:
        short = await answer_of(ring, prompts[0], first)
        long = await answer_of(ring, prompts[0], later)
    assert tokens_of(short) == free[: free.index(end) + 1]
    assert short[-1].finish_reason == "stop"
    assert end not in tokens_of(long)[: later.min_tokens]
    assert len(tokens_of(long)) > later.min_tokens
    assert tokens_of(long) == unsplit_tokens(int8_bundle, prompts[0], later)
