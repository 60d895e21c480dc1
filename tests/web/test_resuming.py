"""A text whose server is lost goes on at another one: client and interface over real connections on loopback."""

import asyncio
import contextlib
import json
import re
from builtins import RuntimeError
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp
import pytest

from flowspec_edge import client as client_module
from flowspec_edge.client import Client
from flowspec_edge.config import GenerateOptions, Piece, Prompt, UnfinishedText
from flowspec_edge.errors import (
    AnswerLostError,
    LinkLostError,
    RequestError,
    ServerBusyError,
    StageFailedError,
)
from flowspec_edge.net.server import ServedApp, serve_app
from flowspec_edge.web import event_stream, turns
from flowspec_edge.web.app import build_app
from flowspec_edge.web.turns import TurnLimits
from tests.web.test_completions import post

TEXT = "a text that is written letter by letter"
PROMPT_TOKENS = [3, 1, 4]


class Letters:
    """Writes TEXT, a token per letter. After ``num`` letters it does what its ``fate`` says."""

    model = "letters"

    def __init__(self, num: int = len(TEXT), fate: Exception | None = None, bundle: str = "b1") -> None:
        self.bundle = bundle
        self.num, self.fate = num, fate
        self.asked: list[tuple[Prompt, GenerateOptions]] = []
        self.goes_on, self.stands_still = asyncio.Event(), asyncio.Event()

    async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        self.asked.append((prompt, options))
        begin = len(prompt.tokens) if isinstance(prompt, UnfinishedText) else 0
        for at in range(begin, len(TEXT)):
            if at == self.num:
                self.stands_still.set()
                if self.fate is not None:
                    raise self.fate
                await self.goes_on.wait()
            yield Piece(text=TEXT[at], token_ids=[ord(TEXT[at])], prompt_token_ids=None if at else PROMPT_TOKENS)
        statistics = {"prompt_tokens": len(PROMPT_TOKENS), "completion_tokens": len(TEXT)}
        yield Piece(text="", token_ids=[], finish_reason="length", statistics=statistics)


@contextlib.asynccontextmanager
async def serving(generator: Letters, limits: TurnLimits | None = None) -> AsyncIterator[tuple[ServedApp, str]]:
    served = await serve_app(build_app(generator, limits=limits), cancels_on_disconnect=True)
    try:
        yield served, f"http://127.0.0.1:{served.port}"
    finally:
        await served.close()


@pytest.mark.parametrize("num", [1, 20, len(TEXT) - 1])
@pytest.mark.parametrize("fate", [RuntimeError("a bug ends the connection"), StageFailedError("the ring was lost")])
async def test_the_next_server_goes_on_with_the_very_letter(num: int, fate: Exception) -> None:
    first, second = Letters(num, fate), Letters()
    async with (
        serving(first) as (_, one),
        serving(second) as (_, other),
        Client(one, other, resume=True) as client,
        asyncio.timeout(10),
    ):
        answer = await client.complete("x", temperature=0.8, max_new_tokens=99, stop=["\n"])
        assert answer.text == TEXT and answer.token_ids == [*map(ord, TEXT)]
        ((_, began),) = first.asked
        ((resumed, options),) = second.asked
        assert options == began and began.seed != 0, "the seed that the first one drew"
        assert resumed == UnfinishedText(prompt=tuple(PROMPT_TOKENS), tokens=tuple(map(ord, TEXT[:num])))
        assert answer.statistics is not None
        assert (answer.statistics["seed"], answer.statistics["resumed_tokens"]) == (began.seed, num)
        await client.complete("y", max_new_tokens=99)
        assert len(second.asked) == 2, "whoever wrote last is asked first"


async def test_without_being_asked_to_a_client_does_not_go_on() -> None:
    async with serving(Letters(5, RuntimeError("a bug"))) as (_, url), Client(url) as client, asyncio.timeout(10):
        with pytest.raises(LinkLostError, match=url):
            await client.complete("x")
    with pytest.raises(RequestError, match="2 servers are given"):
        Client(url, url)


async def test_an_event_that_is_cut_off_is_not_counted() -> None:
    beginning = {"bundle": "b1", "prompt_token_ids": PROMPT_TOKENS, "seed": 1}
    events = [{"choices": [{"text": TEXT[at], "token_ids": [ord(TEXT[at])], "finish_reason": None}]} for at in range(3)]
    lines = [f"data: {json.dumps(event)}\n\n" for event in ({**events[0], "flowspec": beginning}, *events[1:])]

    async def write_some(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = "".join(lines)[:-20]
        writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    second = Letters()
    server = await asyncio.start_server(write_some, "127.0.0.1", 0)
    one = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, serving(second) as (_, other), Client(one, other, resume=True) as client, asyncio.timeout(10):
        assert (await client.complete("x", max_new_tokens=99)).text == TEXT
    ((resumed, _),) = second.asked
    assert isinstance(resumed, UnfinishedText) and resumed.tokens == tuple(map(ord, TEXT[:2]))


async def test_a_server_that_ends_says_so_and_the_text_goes_on() -> None:
    ending, next_one = Letters(7), Letters()
    async with serving(ending) as (served, one), serving(next_one) as (_, other), asyncio.timeout(20):
        async with Client(one, other, resume=True) as client, Client(one) as plain:
            answers = asyncio.gather(
                client.complete("x", max_new_tokens=99), plain.complete("x"), return_exceptions=True
            )
            await ending.stands_still.wait()
            while len(ending.asked) < 2:
                await asyncio.sleep(0)
            status_and_text = asyncio.create_task(post(one, prompt="whole"))
            while len(ending.asked) < 3:
                await asyncio.sleep(0.01)
            await served.close()
            whole, error = await answers
            assert not isinstance(whole, BaseException) and whole.text == TEXT
            assert isinstance(error, StageFailedError) and "the server ends" in str(error)
            status, text = await status_and_text
            assert status == 503 and json.loads(text)["error"]["code"] == "server_ending"


async def test_a_server_that_falls_silent_is_lost_and_one_that_says_that_it_is_there_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "SILENCE_S", 0.3)
    monkeypatch.setattr(event_stream, "HEADERS_S", 0.05)
    monkeypatch.setattr(event_stream, "SIGN_S", 0.05)
    for num in (0, 9):
        slow, second = Letters(num), Letters()
        async with (
            serving(slow) as (_, one),
            serving(second) as (_, other),
            Client(one, other, resume=True) as client,
            asyncio.timeout(10),
        ):
            asyncio.get_running_loop().call_later(0.6, slow.goes_on.set)
            assert (await client.complete("x", max_new_tokens=99)).text == TEXT
            assert not second.asked
            monkeypatch.setattr(event_stream, "SIGN_S", 60.0)
            slow.goes_on.clear()
            assert (await client.complete("x", max_new_tokens=99)).text == TEXT
            assert len(second.asked) == 1
            monkeypatch.setattr(event_stream, "SIGN_S", 0.05)


async def test_another_bundle_is_refused_by_name_and_the_error_has_what_came() -> None:
    async with (
        serving(Letters(6, RuntimeError("a bug"))) as (served, one),
        serving(Letters(bundle="b2")) as (_, other),
        Client(one, other, resume=True, resume_within_s=0.5) as client,
        asyncio.timeout(10),
    ):
        answer = client.generate("x", max_new_tokens=99)
        async for _ in answer:
            if len(answer.text) == 6:
                break
        await served.close()
        with pytest.raises(
            AnswerLostError, match=r"6 tokens .*nothing answers.*begun with bundle b1, and here is bundle b2"
        ) as error:
            await anext(answer)
    assert (error.value.text, error.value.token_ids) == (TEXT[:6], [*map(ord, TEXT[:6])])
    async with serving(Letters(bundle="b2")) as (_, url):
        resume = {"bundle": "b1", "prompt_token_ids": [1], "token_ids": [2]}
        status, text = await post(url, seed=1, flowspec={"resume": resume})
        assert (status, json.loads(text)["error"]["code"]) == (409, "other_bundle")


async def test_nobody_is_there() -> None:
    async with serving(Letters()) as (_, url):
        pass
    async with Client(url, resume=True, resume_within_s=0.3) as client, asyncio.timeout(10):
        with pytest.raises(AnswerLostError, match="0 tokens") as error:
            await client.complete("x")
    assert error.value.token_ids == []


async def test_a_request_at_fault_is_not_asked_again() -> None:
    class Refusing(Letters):
        async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
            self.asked.append((prompt, options))
            raise RequestError("the prompt has 2000 tokens")
            yield

    refusing = Refusing()
    async with serving(refusing) as (_, url), Client(url, resume=True) as client, asyncio.timeout(10):
        with pytest.raises(RequestError, match="2000 tokens"):
            await client.complete("x")
    assert len(refusing.asked) == 1


async def test_a_server_that_waits_for_ever_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "SIGN_S", 0.05)
    async with (
        serving(Letters(3, StageFailedError("lost"))) as (_, one),
        serving(Letters(3)) as (_, other),
        Client(one, other, resume=True, resume_within_s=0.4) as client,
        asyncio.timeout(10),
    ):
        with pytest.raises(AnswerLostError, match="wrote nothing in time"):
            await client.complete("x", max_new_tokens=99)


@pytest.mark.parametrize(
    ("extension", "text"),
    [
        (5, "flowspec is 5"),
        ({"resumable": 1}, "resumable is 1"),
        ({"resume": []}, r"resume is \[\]"),
        ({"resume": {"bundle": 5}}, "bundle is 5"),
        ({"resume": {"bundle": "b1", "prompt_token_ids": "x"}}, "prompt_token_ids is 'x'"),
        ({"resume": {"bundle": "b1", "token_ids": [1, True]}}, r"flowspec.resume.token_ids\[1\] is True"),
        ({"resume": {"bundle": "b1", "token_ids": [1.5]}}, r"token_ids\[0\] is 1.5"),
    ],
)
async def test_a_request_to_go_on_is_checked(extension: object, text: str) -> None:
    generator = Letters()
    async with serving(generator) as (_, url):
        status, body = await post(url, prompt="x", seed=1, flowspec=extension)
        assert status == 400
        assert re.search(text, json.loads(body)["error"]["message"])
        status, body = await post(url, flowspec={"resume": {"bundle": "b1"}})
        assert status == 400 and "seed is missing" in body
    assert not generator.asked


# ------------------------------------------------------------------------------------------------- turns


async def test_no_more_texts_are_taken_than_may_wait() -> None:
    generator = Letters(1)
    async with (
        serving(generator, TurnLimits(max_sessions=1, max_queue=0, max_per_address=9)) as (_, url),
        Client(url) as client,
        asyncio.timeout(10),
    ):
        first = asyncio.create_task(client.complete("0", max_new_tokens=99))
        await generator.stands_still.wait()
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/v1/completions", json={"prompt": "1"}) as response,
        ):
            error = (await response.json())["error"]
            assert (response.status, response.headers["Retry-After"]) == (429, "2")
            assert error["code"] == "server_busy" and "--max-queue" in error["message"]
        with pytest.raises(ServerBusyError) as busy:
            await client.complete("2")
        assert busy.value.retry_after_s == turns.RETRY_S
        generator.goes_on.set()
        assert (await first).text == TEXT
        assert (await client.complete("3", max_new_tokens=99)).text == TEXT


async def test_one_address_may_not_have_all_places_and_gets_them_back() -> None:
    generator = Letters(1)
    async with (
        serving(generator, TurnLimits(max_sessions=4, max_queue=4, max_per_address=1)) as (_, url),
        asyncio.timeout(10),
    ):
        async with Client(url) as client:
            await anext(client.generate("0"))
            status, text = await post(url, prompt="1")
            assert status == 429 and json.loads(text)["error"]["code"] == "rate_limit_exceeded"
        generator.goes_on.set()
        while (await post(url, prompt="2"))[0] != 200:  # once the server has seen that the first one has left
            await asyncio.sleep(0.01)


async def test_a_busy_server_is_asked_again_where_a_text_is_to_survive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "RETRY_S", 0.0)
    generator = Letters(1)
    async with (
        serving(generator, TurnLimits(max_sessions=1, max_queue=0, max_per_address=9)) as (_, url),
        Client(url, resume=True) as client,
        asyncio.timeout(10),
    ):
        first = asyncio.create_task(client.complete("0", max_new_tokens=99))
        await generator.stands_still.wait()
        second = asyncio.create_task(client.complete("1", max_new_tokens=99))
        asyncio.get_running_loop().call_later(0.1, generator.goes_on.set)
        assert [(await text).text for text in (first, second)] == [TEXT] * 2


async def test_a_body_that_does_not_come_has_a_place_too() -> None:
    generator = Letters()
    async with serving(generator, TurnLimits(max_sessions=1, max_queue=0, max_per_address=1)) as (served, url):
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 100\r\n\r\n{")
        await writer.drain()
        async with asyncio.timeout(10):
            while (await post(url, prompt="x"))[0] != 429:
                await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
