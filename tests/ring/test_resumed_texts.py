"""Two real servers over the same nodes: whoever writes a text is killed, and not a token is another one."""

import asyncio
from collections.abc import Sequence

import pytest

from flowspec_edge.bundle import DEMO_BUNDLE, Bundle
from flowspec_edge.client import Answer, Client
from flowspec_edge.config import GenerateOptions, UnfinishedText
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.errors import AnswerLostError
from flowspec_edge.node.process import node_processes
from tests.narrowing import present
from tests.ring.conftest import ring_of, tokens_of, unsplit_tokens
from tests.servers import serve_process

NUM_BEFORE = 20
LIMIT_S = 90
OPTIONS = (
    GenerateOptions(max_new_tokens=80),
    GenerateOptions(
        max_new_tokens=80,
        temperature=0.8,
        seed=7,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((40, 1.0),),
    ),
)


@pytest.mark.parametrize("options", OPTIONS)
async def test_a_ring_goes_on_with_a_text_from_any_token(
    int8_bundle: Bundle, prompts: list[list[int]], options: GenerateOptions
) -> None:
    expected = unsplit_tokens(int8_bundle, prompts[0], options)
    async with asyncio.timeout(LIMIT_S), ring_of(2, int8_bundle) as ring:
        for num in (0, 1, 40, 79, 80):
            text = UnfinishedText(prompt=tuple(prompts[0]), tokens=tuple(expected[:num]))
            pieces = [piece async for piece in ring.write(await ring.begin(text, options))]
            assert tokens_of(pieces) == expected[num:]
            assert pieces[-1].finish_reason == "length"
            assert present(pieces[-1].statistics)["completion_tokens"] == 80


async def begun(client: Client, prompt: str, options: GenerateOptions, stop: Sequence[str] = ()) -> Answer:
    """An answer of which some has come, and the rest has not."""
    answer = client.generate(
        prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        logit_bias=dict(options.logit_bias),
        stop=stop,
    )
    while len(answer.token_ids) < NUM_BEFORE:
        await anext(answer)
    return answer


async def rest_of(answer: Answer) -> None:
    async for _ in answer:
        pass


def nums_resumed(answers: Sequence[Answer]) -> list[int]:
    """How many tokens the last server of each was given, but for those that were whole when the first one was lost."""
    given = [present(answer.statistics).get("resumed_tokens") for answer in answers]
    return [num for num in given if num is not None]


@pytest.mark.slow
async def test_the_text_goes_on_at_another_server_at_the_same_one_and_ends_named_where_there_is_none(
    int8_bundle: Bundle, prompts: list[list[int]]
) -> None:
    tokenizer = Tokenizer(DEMO_BUNDLE / "tokenizer.json")
    prompt = tokenizer.decode(prompts[0])
    ids = tokenizer.encode(prompt)
    expected = [unsplit_tokens(int8_bundle, ids, options) for options in OPTIONS]
    whole = tokenizer.decode(expected[1])
    stop = whole[len(whole) * 3 // 4 :][:5]
    place = ("--host", "127.0.0.1", "--wait", "5", "--nodes", "2", "--no-layers", "--equal-split")
    async with asyncio.timeout(LIMIT_S), node_processes(2, DEMO_BUNDLE) as (cluster, _):
        options = ("--cluster", cluster, *place)
        async with (
            serve_process(*options) as first,
            serve_process(*options) as second,
            Client(first.url, second.url, resume=True, resume_within_s=60) as client,
        ):
            answers = await asyncio.gather(
                *(begun(client, prompt, options) for options in OPTIONS), begun(client, prompt, OPTIONS[1], [stop])
            )
            await first.kill()
            await asyncio.gather(*map(rest_of, answers))
            assert (nums := nums_resumed(answers)) and all(NUM_BEFORE <= num < 80 for num in nums)
            assert [answer.token_ids for answer in answers[:2]] == expected
            assert [answer.text for answer in answers] == [*map(tokenizer.decode, expected), whole[: whole.index(stop)]]
            assert [answer.finish_reason for answer in answers] == ["length", "length", "stop"]

            answers = await asyncio.gather(*(begun(client, prompt, options) for options in OPTIONS))
            await second.kill()
            async with serve_process(*options, port=int(second.url.rpartition(":")[2])):
                await asyncio.gather(*map(rest_of, answers))
            assert [answer.token_ids for answer in answers] == expected
            assert (nums := nums_resumed(answers)) and all(NUM_BEFORE <= num < 80 for num in nums)

        async with serve_process(*options) as last, Client(last.url, resume=True, resume_within_s=3) as client:
            answer = await begun(client, prompt, OPTIONS[0])
            await last.kill()
            with pytest.raises(AnswerLostError, match=f"tokens have come .*{last.url}: nothing answers") as lost:
                await rest_of(answer)
            assert lost.value.token_ids == answer.token_ids == expected[0][: len(answer.token_ids)]
            assert lost.value.text == answer.text
