"""OpenAI's client, the API, a ring and the demo model: a chat is what the unsplit model writes."""

import pytest

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.server import serve_app
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.web.app import build_app
from flowspec_edge.web.chat_template import ChatTemplate
from tests.ring.conftest import found_of, nodes_of, unsplit_tokens

openai = pytest.importorskip("openai", reason="OpenAI's client: pip install '.[dev]'")

MESSAGES = [
    {"role": "system", "content": "Write Python."},
    {"role": "user", "content": "import os\n\ndef main(argv): <|endoftext|>"},
]


async def test_a_chat_over_a_ring_is_what_the_unsplit_model_writes(int8_bundle: Bundle) -> None:
    template = ChatTemplate.of_bundle(int8_bundle)
    tokenizer = Tokenizer(int8_bundle.directory / "tokenizer.json")
    prompt = tokenizer.encode(template.render_now({"messages": MESSAGES, "add_generation_prompt": True}))
    async with nodes_of(int8_bundle) as (nodes, origin):

        async def search() -> list[Announcement]:
            return found_of(nodes)

        async with GenerationService(origin, int8_bundle, search) as service:
            served = await serve_app(build_app(service, chat=template), cancels_on_disconnect=True)
            try:
                async with openai.AsyncOpenAI(
                    base_url=f"http://127.0.0.1:{served.port}/v1", api_key="x", max_retries=0
                ) as client:
                    answer = await client.chat.completions.create(
                        model=service.model, messages=MESSAGES, max_tokens=24, seed=5, n=2
                    )
                    stream = await client.chat.completions.create(
                        model=service.model, messages=MESSAGES, max_tokens=24, temperature=0, stream=True
                    )
                    chunks = [chunk async for chunk in stream]
                    prompts = await client.completions.create(
                        model=service.model, prompt=[prompt, prompt[:9]], max_tokens=8, temperature=0
                    )
                    with pytest.raises(openai.BadRequestError, match="context holds 1024"):
                        await client.chat.completions.create(
                            model=service.model, messages=[{"role": "user", "content": "x = 1\n" * 2000}]
                        )
            finally:
                await served.close()
    for choice in answer.choices:
        options = GenerateOptions(max_new_tokens=24, temperature=1.0, seed=5 + choice.index)
        assert choice.token_ids == unsplit_tokens(int8_bundle, prompt, options)
    streamed = [token for chunk in chunks for token in chunk.choices[0].token_ids]
    greedy = unsplit_tokens(int8_bundle, prompt, GenerateOptions(max_new_tokens=24))
    assert streamed == greedy
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == tokenizer.decode(greedy)
    assert answer.usage.prompt_tokens == len(prompt)
    for choice, given in zip(prompts.choices, (prompt, prompt[:9]), strict=True):
        assert choice.token_ids == unsplit_tokens(int8_bundle, given, GenerateOptions(max_new_tokens=8))
