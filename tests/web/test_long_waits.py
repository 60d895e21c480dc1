"""Streams whose first piece takes its time, clients that read slowly, and clients that leave."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, AsyncIterator

import aiohttp
import pytest

from flowspec_edge.config import GenerateOptions, Piece, Prompt
from flowspec_edge.errors import StageFailedError
from flowspec_edge.net.server import serve_app
from flowspec_edge.origin.status import ServiceStatus
from flowspec_edge.web import event_stream
from flowspec_edge.web.app import build_app
from flowspec_edge.web.turns import TurnLimits
from tests.web.served import HELLO, serving_dialects
from tests.web.test_completions import PIECES, ScriptedGenerator

STREAMED = {"prompt": "x", "stream": True}


@contextlib.asynccontextmanager
async def serving(generator: ScriptedGenerator) -> AsyncIterator[str]:
    served = await serve_app(build_app(generator, limits=TurnLimits(max_sessions=2)), cancels_on_disconnect=True)
    try:
        async with asyncio.timeout(10):
            yield f"http://127.0.0.1:{served.port}"
    finally:
        await served.close()


async def test_headers_leave_while_the_prompt_is_read_and_tell_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HEADERS_S", 0.05)
    monkeypatch.setattr(event_stream, "SIGN_S", 0.05)
    notice = Piece(text="", token_ids=[], notice="512 of the prompt's 1500 tokens are read")
    generator = ScriptedGenerator([None, notice, *PIECES])
    async with serving(generator) as url, aiohttp.ClientSession() as session:
        async with session.post(f"{url}/v1/completions", json=STREAMED) as response:
            assert response.status == 200
            assert await response.content.readline() == b": the server is there\n"
            generator.goes_on.set()
            text = (await response.read()).decode()
    assert ": 512 of the prompt's 1500 tokens are read\n\n" in text
    assert text.endswith("data: [DONE]\n\n")


STREAMS: dict[str, dict[str, object]] = {
    "/v1/completions": STREAMED,
    "/v1/chat/completions": {"messages": HELLO, "stream": True},
    "/v1/responses": {"input": "x", "stream": True},
    "/v1/messages": {"messages": HELLO, "stream": True},
    "/api/chat": {"messages": HELLO},
    "/api/generate": {"prompt": "x"},
}


@pytest.mark.parametrize("path", STREAMS)
async def test_every_dialects_stream_begins_before_its_text_and_tells_how_far_it_is(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_stream, "HEADERS_S", 0.02)
    notice = Piece(text="", token_ids=[], notice="512 of the prompt's 1500 tokens are read")
    async with serving_dialects([None, notice, *PIECES]) as (generator, url), asyncio.timeout(10):
        async with aiohttp.ClientSession(url) as session, session.post(path, json=STREAMS[path]) as response:
            assert response.status == 200
            assert "the server is there" in (await response.content.readline()).decode()
            generator.goes_on.set()
            assert "512 of the prompt's 1500 tokens are read" in (await response.content.read()).decode()


async def test_ollamas_client_reads_signs_of_life_as_objects_that_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ollama = pytest.importorskip("ollama", reason="Ollama's client: pip install '.[dev]'")
    monkeypatch.setattr(event_stream, "HEADERS_S", 0.02)
    async with serving_dialects([None, *PIECES]) as (generator, url), asyncio.timeout(10):
        client = ollama.AsyncClient(host=url)
        for stream in (
            await client.chat(model="demo", messages=HELLO, stream=True),
            await client.generate(model="demo", prompt="x", stream=True),
        ):
            generator.goes_on.clear()
            parts = []
            async for part in stream:
                parts.append(part)
                generator.goes_on.set()
            texts = [part.message.content if hasattr(part, "message") else part.response for part in parts]
            assert texts == ["", "a", "b\n", ""] and [part.done for part in parts] == [False] * 3 + [True]


async def test_signs_of_life_tell_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "HEADERS_S", 0.02)
    generator, status = ScriptedGenerator([None, *PIECES]), ServiceStatus(is_ready=True, reason="a ring is opened")
    served = await serve_app(build_app(generator, status=lambda: status))
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}") as session, asyncio.timeout(10):
            async with session.post("/v1/completions", json=STREAMED) as response:
                assert await response.content.readline() == b": a ring is opened\n"
                generator.goes_on.set()
                await response.read()
    finally:
        await served.close()


async def test_an_error_that_comes_soon_is_a_status_and_a_later_one_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ScriptedGenerator([StageFailedError("lost")])
    async with serving(generator) as url, aiohttp.ClientSession() as session:
        async with session.post(f"{url}/v1/completions", json=STREAMED) as response:
            assert response.status == 503
        monkeypatch.setattr(event_stream, "HEADERS_S", 0.02)
        generator.script = [None, StageFailedError("lost")]
        async with session.post(f"{url}/v1/completions", json=STREAMED) as response:
            assert response.status == 200
            generator.goes_on.set()
            assert '"message": "lost"' in await response.text()


class Flood(ScriptedGenerator):
    """Writes megabytes to whoever asks for more than a token."""

    num_given = 0

    async def generate(self, prompt: Prompt, options: GenerateOptions) -> AsyncGenerator[Piece, None]:
        try:
            for _ in range(400 if options.max_new_tokens > 1 else 0):
                self.num_given += 1
                yield Piece(text="a" * 50_000, token_ids=[5])
            for piece in PIECES:
                yield piece
        finally:
            self.is_closed.set()


async def ask_and_read_nothing(url: str) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", int(url.rpartition(":")[2])))
    body = b'{"prompt": "x", "stream": true, "max_tokens": 9}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    await loop.sock_sendall(connection, head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    return connection


async def test_a_slow_reader_holds_up_its_own_text_alone_and_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Flood([])
    monkeypatch.setattr(event_stream, "READ_S", 0.3)
    async with serving(generator) as url, aiohttp.ClientSession() as session:
        with contextlib.closing(await ask_and_read_nothing(url)):
            while not generator.num_given:
                await asyncio.sleep(0.01)
            for _ in range(3):
                async with session.post(f"{url}/v1/completions", json={**STREAMED, "max_tokens": 1}) as response:
                    assert (await response.text()).endswith("data: [DONE]\n\n")
            generator.is_closed.clear()
            assert generator.num_given < 400, "what nobody reads is not written on and on"
            await generator.is_closed.wait()
            assert generator.num_given < 400


async def test_two_hundred_connections_and_one_that_asks() -> None:
    async with serving(ScriptedGenerator(PIECES)) as url, aiohttp.ClientSession() as session:
        port = int(url.rpartition(":")[2])
        async with contextlib.AsyncExitStack() as stack:
            for number in range(200):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                stack.callback(writer.close)
                if number % 2:
                    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
            async with session.post(f"{url}/v1/completions", json=STREAMED) as response:
                assert (await response.text()).endswith("data: [DONE]\n\n")
