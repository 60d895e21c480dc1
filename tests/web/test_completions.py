"""The HTTP interface over a real server on loopback, in front of a generator that plays its part from a script."""

import asyncio
import contextlib
import json
from builtins import RuntimeError
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
import pytest

from flowspec_edge.client import Client
from flowspec_edge.config import GenerateOptions, Piece, Prompt, TextPart
from flowspec_edge.errors import (
    LinkLostError,
    NodeUnavailableError,
    PlacementError,
    RequestError,
    StageFailedError,
)
from flowspec_edge.net.server import serve_app
from flowspec_edge.web import fields
from flowspec_edge.web.app import MAX_REQUEST_BYTES, build_app

JSON = {"Content-Type": "application/json"}
STATISTICS = {"prompt_tokens": 3, "cached_tokens": 1, "completion_tokens": 2, "trips": 2}
PIECES = [
    Piece(text="a", token_ids=[5]),
    Piece(text="b\n", token_ids=[6]),
    Piece(text="", token_ids=[], finish_reason="length", statistics=STATISTICS),
]


class ScriptedGenerator:
    """Yields its script; an exception in it is raised there."""

    model, bundle = "demo", "d1" * 32

    def __init__(self, script: Sequence[Piece | Exception | None]) -> None:
        self.script = script
        self.asked: list[tuple[Prompt, GenerateOptions]] = []
        self.is_closed = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        self.asked.append((prompt, options))
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if step is None:
                    await self.goes_on.wait()
                    continue
                yield step
        finally:
            self.is_closed.set()


@contextlib.asynccontextmanager
async def serving(
    script: Sequence[Piece | Exception | None],
) -> AsyncIterator[tuple[ScriptedGenerator, Client, str]]:
    """The scripted generator, a client, and the base URL."""
    generator = ScriptedGenerator(script)
    served = await serve_app(build_app(generator), cancels_on_disconnect=True)
    url = f"http://127.0.0.1:{served.port}"
    try:
        async with Client(url) as client, asyncio.timeout(10):
            yield generator, client, url
    finally:
        await served.close()


async def post(url: str, **body: Any) -> tuple[int, str]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json=body) as response,
    ):
        return response.status, await response.text()


async def test_a_whole_answer_in_openais_form() -> None:
    async with serving(PIECES) as (generator, _, url):
        status, text = await post(url, model="demo", prompt="x", max_tokens=2, temperature=0.5, stop="q", seed=4)
        answer = json.loads(text)
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [
        {"index": 0, "text": "ab\n", "token_ids": [5, 6], "logprobs": None, "finish_reason": "length"}
    ]
    counted = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert answer["usage"] == {**counted, "prompt_tokens_details": {"cached_tokens": 1}}
    assert answer["flowspec"] == {**STATISTICS, "seed": 4}
    ((prompt, options),) = generator.asked
    assert (prompt, options.max_new_tokens, options.temperature, options.stop, options.seed) == ("x", 2, 0.5, ("q",), 4)


async def test_special_tokens_in_a_prompt_may_be_plain_text() -> None:
    async with serving(PIECES) as (generator, _, url):
        await post(url, prompt="<s>", parse_special=False)
    assert [prompt for prompt, _ in generator.asked] == [[TextPart("<s>", parses_special=False)]]


async def test_a_streamed_answer_in_openais_form() -> None:
    async with serving(PIECES) as (_, _, url):
        status, text = await post(url, prompt="x", stream=True, seed=0)
    lines = text.split("\n\n")
    assert status == 200
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [event["choices"][0]["text"] for event in events] == ["a", "b\n", ""]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, "length"]
    assert events[-1]["flowspec"] == {**STATISTICS, "seed": 0}
    assert len({event["id"] for event in events}) == 1


WAITING = Piece(text="", token_ids=[], notice="waiting for boards: layers [3, 6) of pi-hall have\nno home")


@pytest.mark.parametrize("script", [[WAITING, *PIECES], [PIECES[0], WAITING, *PIECES[1:]]], ids=["first", "later"])
async def test_an_answer_that_waits_says_so_in_a_comment_that_clients_pass_over(script: list[Piece]) -> None:
    async with serving(script) as (_, client, url):
        status, text = await post(url, prompt="x", stream=True)
        assert status == 200
        events = text.split("\n\n")
        comment = ": waiting for boards: layers [3, 6) of pi-hall have no home"
        assert events.pop(script.index(WAITING)) == comment
        assert [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:3]] == [
            "a",
            "b\n",
            "",
        ]
        answer = await client.complete("x", max_new_tokens=2, seed=9)
        assert (answer.text, answer.token_ids, answer.statistics) == ("ab\n", [5, 6], {**STATISTICS, "seed": 9})
        status, text = await post(url, prompt="x")
        assert json.loads(text)["choices"][0]["text"] == "ab\n"


async def test_an_answer_that_waited_in_vain_ends_with_what_was_written_and_an_error() -> None:
    async with serving([PIECES[0], WAITING, PlacementError("layers [3, 6) have no home")]) as (_, client, _):
        answer = client.generate("x")
        assert await anext(answer) == PIECES[0]
        with pytest.raises(StageFailedError, match=r"layers \[3, 6\) have no home"):
            await anext(answer)
        assert answer.text == "a"


async def test_models_and_health() -> None:
    async with serving([]) as (_, _, url), aiohttp.ClientSession() as session:
        async with session.get(f"{url}/v1/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == ["demo"]
        async with session.get(f"{url}/health") as response:
            assert (await response.json())["status"] == "ok"


REFUSED = [
    ({"prompt": 5}, "prompt is 5"),
    ({}, "prompt is missing"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens is 0"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens is True"),
    ({"prompt": "x", "temperature": "hot"}, "temperature is 'hot'"),
    ({"prompt": "x", "temperature": 1e-320}, "temperature is 1e-320; it must be 0 (greedy) or lie between 1e-06 and"),
    ({"prompt": "x", "model": "gpt"}, "model 'gpt' is not served here"),
    ({"prompt": "x", "n": 0}, "n is 0"),
    ({"prompt": "x", "n": 129}, "n is 129"),
    ({"prompt": ["x"] * 65, "n": 2}, "n is 2 and there are 65 prompts"),
    ({"prompt": "x", "best_of": 2, "n": 3}, "best_of is 2 and n is 3"),
    ({"prompt": "x", "best_of": 2, "stream": True}, "best_of chooses among whole texts, which cannot be streamed"),
    ({"prompt": ["x"] * 65, "best_of": 2}, "best_of is 2 and there are 65 prompts"),
    ({"prompt": []}, "prompt is empty; it must be a text, its token ids"),
    ({"prompt": ["x", 5]}, "prompt[1] is 5; it must be of type str"),
    ({"prompt": [5.5]}, "prompt[0] is 5.5"),
    ({"prompt": [5], "echo": True}, "echo is set"),
    ({"prompt": "x", "max_tokens": 16.5}, "max_tokens is 16.5; it must be a whole number"),
    ({"prompt": "x", "max_completion_tokens": -1}, "max_completion_tokens is -1"),
    ({"prompt": "x", "stop": ["a", 5]}, "stop[1] is 5"),
    ({"prompt": "x", "stop": ["y" * 100_000]}, "stop has 100004 bytes"),
    ({"prompt": "x", "stream_options": {"include_usage": 5}}, "stream_options.include_usage is 5"),
    ({"prompt": "x", "presence_penalty": 2.5}, "presence_penalty is 2.5; it must lie between -2 and 2"),
    ({"prompt": "x", "logit_bias": {"5": -101}}, "logit_bias.5 is -101.0"),
    ({"prompt": "x", "logprobs": 21}, "logprobs is 21; it must lie between 0 and 20"),
    ({"prompt": "x", "logprobs": True}, "logprobs is true; for completions it is a number"),
    ({"prompt": "x", "logprobs": 0, "echo": True}, "logprobs are not told of the tokens of an echo"),
    (
        {"prompt": "x", "response_format": {"type": "xml"}},
        "response_format.type is 'xml'; it must be one of text, json",
    ),
    ({"prompt": "x", "guided_json": {}, "min_tokens": 2}, "min_tokens is set beside a grammar"),
    ({"prompt": "x", "stop": ["a"] * 5}, "at most 4"),
    ({"prompt": "x", "stop": ["a", "b" * 1025]}, "stop string has 1025 characters; each must have 1 to 1024"),
    ([], "not a JSON object"),
]


@pytest.mark.parametrize(("body", "text"), REFUSED, ids=[text for _, text in REFUSED])
async def test_a_request_out_of_range_is_refused(
    body: Mapping[str, int | str | list[str]] | Sequence[Any], text: str
) -> None:
    async with (
        serving(PIECES) as (generator, _, url),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", json=body) as response,
    ):
        error = (await response.json())["error"]
        assert response.status == (404 if "not served" in text else 400)
        assert error["type"] == "invalid_request_error"
        assert text in error["message"]
        assert not generator.asked


async def test_a_body_that_is_not_json_is_refused() -> None:
    async with (
        serving(PIECES) as (_, _, url),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", data=b"{", headers=JSON) as response,
    ):
        assert response.status == 400
        assert "not JSON" in (await response.json())["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"[" * 200_000, 400, "not a JSON object"),
        (b'{"prompt": "x", "other": ' + b"[" * 200_000, 400, "nested too deeply"),
        (b'{"prompt": ' + b"[" * 200_000, 400, "nested too deeply"),
        (b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        (b'{"prompt": "\xff"}', 400, "not JSON"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "seed is 999"),
        (b'{"prompt": "x", "temperature": 1e400}', 400, "temperature is inf"),
        (b'{"prompt": "x", "temperature": NaN}', 400, "not JSON"),
        (b'{"prompt": [' + b"[]," * 50_000 + b"0]}", 400, "prompt has 50000 lists"),
        (b'{"prompt": "x"' + b"".join(b',"%d":0' % name for name in range(40_000)) + b"}", 400, "bytes beside"),
        (b'{"prompt": "' + b"a" * MAX_REQUEST_BYTES + b'"}', 413, "exceeds the limit of 4194304 bytes"),
    ],
    ids=[
        "a list",
        "nested",
        "nested prompt",
        "half a character",
        "not UTF-8",
        "huge number",
        "infinite",
        "not a number",
        "long list",
        "many fields",
        "too long",
    ],
)
async def test_a_malicious_body_is_refused(body: bytes, status: int, text: str) -> None:
    async with (
        serving(PIECES) as (generator, _, url),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", data=body, headers=JSON) as response,
    ):
        assert response.status == status
        assert text in (await response.json())["error"]["message"]
        assert not generator.asked


@pytest.mark.parametrize(
    ("charset", "codec", "status"),
    [("utf-16", "utf-16", 200), ("latin-1", "latin-1", 200), ("punycode", "ascii", 400), ("rot13", "ascii", 400)],
)
async def test_a_body_in_another_charset(charset: str, codec: str, status: int) -> None:
    text = "\xfc" if codec != "ascii" else "x"
    data, headers = f'{{"prompt": "{text}"}}'.encode(codec), {"Content-Type": f"application/json; charset={charset}"}
    async with (
        serving(PIECES) as (generator, _, url),
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/completions", data=data, headers=headers) as response,
    ):
        assert response.status == status
        assert [prompt for prompt, _ in generator.asked] == [text] * (status == 200)


async def test_half_a_body_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fields, "BODY_S", 0.05)
    async with serving(PIECES) as (generator, _, url):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 100\r\n\r\n{")
        assert b"did not come within" in await reader.readuntil(b"}}")
        assert not generator.asked
        writer.close()
        await writer.wait_closed()


async def test_the_client_gathers_the_answer() -> None:
    async with serving(PIECES) as (_, client, _):
        answer = await client.complete("x", max_new_tokens=2, seed=9)
    assert (answer.text, answer.token_ids) == ("ab\n", [5, 6])
    assert (answer.finish_reason, answer.statistics) == ("length", {**STATISTICS, "seed": 9})


async def test_leaving_the_clients_block_cancels_the_generation() -> None:
    async with serving([PIECES[0], None]) as (generator, _, url):
        async with Client(url) as client:
            async for piece in client.generate("x"):
                assert piece == PIECES[0]
                break
        await generator.is_closed.wait()


async def test_errors_before_the_first_piece() -> None:
    async with serving([StageFailedError("node pi-hall was lost")]) as (_, client, _):
        with pytest.raises(StageFailedError, match="pi-hall was lost"):
            await client.complete("x")
    async with serving([RequestError("the prompt has 2000 tokens")]) as (_, client, _):
        with pytest.raises(RequestError, match="2000 tokens"):
            await client.complete("x")


async def test_an_error_after_the_first_piece_arrives_as_an_error() -> None:
    async with serving([PIECES[0], StageFailedError("node pi-hall was lost")]) as (_, client, _):
        answer = client.generate("x")
        assert await anext(answer) == PIECES[0]
        with pytest.raises(StageFailedError, match="pi-hall was lost"):
            await anext(answer)


async def test_a_server_that_is_lost_midway_or_not_there() -> None:
    async with serving([PIECES[0], RuntimeError("a bug")]) as (_, client, url):
        answer = client.generate("x")
        await anext(answer)
        with pytest.raises(LinkLostError, match=url):
            await anext(answer)
    async with Client(url) as client:
        with pytest.raises(NodeUnavailableError, match="flowspec serve"):
            await client.complete("x")
