"""The clients that people have, one API, a ring and the demo model: each is told what the unsplit model writes."""

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from flowspec_edge import Client
from flowspec_edge.bundle import Bundle
from flowspec_edge.config import GenerateOptions
from flowspec_edge.engine.tokenizer import Tokenizer
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.server import serve_app
from flowspec_edge.origin.service import GenerationService
from flowspec_edge.web.app import build_app
from flowspec_edge.web.chat_template import ChatTemplate
from flowspec_edge.web.model_card import ModelCard
from tests.docs.documents import Document, python_snippet
from tests.ring.conftest import found_of, nodes_of, unsplit_tokens

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

NUM_TOKENS = 16
SYSTEM, USER = "Write Python.", "import os\n\ndef main(argv):"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]


class Api:
    """Where it is, which model it serves, and what it is to write."""

    def __init__(self, url: str, model: str, text: str, num_read: int) -> None:
        self.url, self.model, self.text, self.num_read = url, model, text, num_read


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(int8_bundle: Bundle) -> AsyncIterator[Api]:
    template = ChatTemplate.of_bundle(int8_bundle)
    tokenizer = Tokenizer(int8_bundle.directory / "tokenizer.json")
    prompt = tokenizer.encode(template.render_now({"messages": MESSAGES, "add_generation_prompt": True}))
    text = tokenizer.decode(unsplit_tokens(int8_bundle, prompt, GenerateOptions(max_new_tokens=NUM_TOKENS)))
    async with nodes_of(int8_bundle) as (nodes, origin):

        async def search() -> list[Announcement]:
            return found_of(nodes)

        async with GenerationService(origin, int8_bundle, search) as service:
            card = ModelCard.of_bundle(int8_bundle)
            app = build_app(service, chat=template, card=card, coder=service.tokenizer)
            served = await serve_app(app, cancels_on_disconnect=True)
            try:
                yield Api(f"http://127.0.0.1:{served.port}", service.model, text, len(prompt))
            finally:
                await served.close()


async def test_openai(api: Api) -> None:
    openai = pytest.importorskip("openai")
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
        response = await client.responses.create(
            model=api.model, instructions=SYSTEM, input=USER, max_output_tokens=NUM_TOKENS, temperature=0
        )
        async with client.responses.stream(
            model=api.model, input=MESSAGES, max_output_tokens=NUM_TOKENS, temperature=0
        ) as stream:
            events = [event async for event in stream]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert events[-1].type == "response.incomplete", "its length ended it"
    assert response.output_text == events[-1].response.output_text == "".join(deltas) == api.text
    assert response.usage.input_tokens == api.num_read


async def test_openai_as_it_is_printed(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    code = python_snippet("docs/clients.md", "Clients") + python_snippet("docs/clients.md", "Structured output")
    here = code.replace("http://127.0.0.1:8008", api.url)
    assert here != code
    said: dict[str, Any] = {}
    await asyncio.to_thread(exec, here, said)
    said["client"].close()
    assert capsys.readouterr().out
    (choice,) = said["answer"].choices
    assert choice.finish_reason == "length" or json.loads(choice.message.content)["name"] is not None


async def test_a_client_that_resumes_as_it_is_printed(api: Api) -> None:
    code = python_snippet("docs/reliability.md", "The origin")
    here = code.replace("http://pi-kitchen:8008", "http://127.0.0.1:1").replace("http://pi-attic:8008", api.url)
    here = here.replace("max_new_tokens=400", f"max_new_tokens={NUM_TOKENS}")
    lines = ["async def ask():", *(f"    {line}" for line in here.splitlines()), "    return answer"]
    scope: dict[str, Any] = {"Client": Client}
    exec("\n".join(lines), scope)
    answer = await scope["ask"]()
    assert 0 < len(answer.token_ids) <= NUM_TOKENS


async def test_anthropic(api: Api) -> None:
    anthropic = pytest.importorskip("anthropic")
    ask: dict[str, Any] = {"model": api.model, "system": SYSTEM, "messages": MESSAGES[1:]}
    greedy = {"max_tokens": NUM_TOKENS, "extra_body": {"temperature": 0}}
    async with anthropic.AsyncAnthropic(base_url=api.url, api_key="none") as client:
        message = await client.messages.create(**ask, **greedy)
        async with client.messages.stream(**ask, **greedy) as stream:
            begun = await anext(aiter(stream))
            text = "".join([text async for text in stream.text_stream])
        count = await client.messages.count_tokens(**ask)
        stopped = await client.messages.create(**ask, **greedy, stop_sequences=[api.text[5:8]])
    assert message.content[0].text == text == api.text
    assert message.usage.input_tokens == begun.message.usage.input_tokens == count.input_tokens == api.num_read
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", api.text[5:8])
    assert api.text.startswith(stopped.content[0].text)


async def test_ollama(api: Api) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.AsyncClient(host=api.url)
    (model,) = (await client.list()).models
    greedy = {"temperature": 0, "num_predict": NUM_TOKENS}
    answer = await client.chat(model=model.model, messages=MESSAGES, options=greedy)
    parts = [
        part
        async for part in await client.generate(
            model=model.model, system=SYSTEM, prompt=USER, options=greedy, stream=True
        )
    ]
    assert answer.message.content == "".join(part.response for part in parts) == api.text
    assert answer.prompt_eval_count == api.num_read and answer.eval_count == NUM_TOKENS
    assert answer.total_duration == answer.prompt_eval_duration + answer.eval_duration > 0


async def test_langchain(api: Api) -> None:
    langchain = pytest.importorskip("langchain_openai")
    for uses_responses in (False, True):
        model = langchain.ChatOpenAI(
            base_url=f"{api.url}/v1",
            api_key="none",
            model=api.model,
            temperature=0,
            max_tokens=NUM_TOKENS,
            use_responses_api=uses_responses,
            stream_usage=True,
        )
        answer = await model.ainvoke([("system", SYSTEM), ("human", USER)])
        chunks = [chunk async for chunk in model.astream([("system", SYSTEM), ("human", USER)])]
        streamed = chunks[0]
        for chunk in chunks[1:]:
            streamed += chunk
        assert answer.text == streamed.text == api.text
        assert answer.usage_metadata["input_tokens"] == streamed.usage_metadata["input_tokens"] == api.num_read


@pytest.mark.filterwarnings("ignore:.*ReadOnly:UserWarning")
async def test_litellm(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the internet for a list of prices
    litellm = pytest.importorskip("litellm")

    def ask(**options: Any) -> Any:
        return litellm.completion(
            api_key="none",
            messages=MESSAGES,
            max_tokens=NUM_TOKENS,
            temperature=0,
            timeout=10,
            **options,
        )

    def ask_both(provider: str, base: str) -> None:
        typed = {"extra_headers": {"Content-Type": "application/json"}} if provider == "ollama_chat" else {}
        where = {"model": f"{provider}/{api.model}", "api_base": base, **typed}
        answer = ask(**where)
        chunks = list(ask(**where, stream=True))
        assert answer.choices[0].message.content == api.text, provider
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == api.text, provider
        assert answer.usage.prompt_tokens == api.num_read, provider

    for provider, base in (("openai", f"{api.url}/v1"), ("anthropic", api.url), ("ollama_chat", api.url)):
        await asyncio.to_thread(ask_both, provider, base)  # it asks for the price of a model as it ends, and waits


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
async def test_curl_as_it_is_printed(api: Api) -> None:
    commands = re.findall(r"^curl http://127(?:.*\\\n)*.*", Document("docs/clients.md").text, re.MULTILINE)
    assert len(commands) >= 4

    async def run(command: str) -> None:
        here = command.replace("http://127.0.0.1:8008", api.url)
        assert here != command
        process = await asyncio.create_subprocess_shell(
            here.replace("curl ", "curl --silent --show-error --fail-with-body --max-time 10 "),
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await process.communicate()
        assert process.returncode == 0, (command, out)
        assert api.model in out.decode() or "tokens" in json.loads(out), command

    await asyncio.gather(*map(run, commands))
