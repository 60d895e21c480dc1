"""Whatever ends a request early is told as JSON in the form of the dialect that it was asked in."""

import asyncio
import json
import logging
from builtins import RuntimeError
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from flowspec_edge.errors import is_plain
from tests.web.served import HELLO, Json, serving_dialects
from tests.web.test_completions import PIECES


def openai_message(error: Json) -> str:
    assert error.keys() == {"error"} and error["error"].keys() == {"message", "type", "param", "code"}
    return str(error["error"]["message"])


def anthropic_message(error: Json) -> str:
    assert error.keys() == {"type", "error"} and error["error"].keys() == {"type", "message"}
    return str(error["error"]["message"])


def ollama_message(error: Json) -> str:
    assert error.keys() == {"error"} and isinstance(error["error"], str)
    return error["error"]


DIALECTS: list[tuple[str, Json, Callable[[Json], str]]] = [
    ("/v1/completions", {"prompt": "x"}, openai_message),
    ("/v1/chat/completions", {"messages": HELLO}, openai_message),
    ("/v1/responses", {"input": "x"}, openai_message),
    ("/v1/messages", {"messages": HELLO}, anthropic_message),
    ("/api/chat", {"messages": HELLO}, ollama_message),
    ("/api/generate", {"prompt": "x"}, ollama_message),
]


async def asked(url: str, method: str, path: str, **given: Any) -> tuple[int, Json, str]:
    async with aiohttp.ClientSession() as session, session.request(method, url + path, **given) as response:
        text = await response.text()
        return response.status, json.loads(text) if response.status >= 400 else {}, text


@pytest.mark.parametrize(("path", "body", "message"), DIALECTS, ids=[path for path, _, _ in DIALECTS])
async def test_every_status_in_every_dialect(
    path: str, body: Json, message: Callable[[Json], str], caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_dialects([RuntimeError("a secret")], api_key="k") as (_, url), asyncio.timeout(10):
        key = {"headers": {"Authorization": "Bearer k", "Content-Type": "application/json"}}
        requests: dict[int, tuple[str, str, Json]] = {
            401: ("POST", path, {"json": body}),
            404: ("POST", f"{path}/nothing", key),
            405: ("DELETE", path, key),
            413: ("POST", path, {"data": b"x" * (2**22 + 1), **key}),
            400: ("POST", path, {"data": b"{", **key}),
        }
        for status, (method, at, given) in requests.items():
            found, error, _ = await asked(url, method, at, **given)
            assert found == status and message(error), error
        with caplog.at_level(logging.ERROR):
            found, error, _ = await asked(url, "POST", path, json=body | {"stream": False}, **key)
    assert found == 500 and "secret" not in message(error)
    assert "RuntimeError: a secret" in caplog.text, "whoever runs the server can see what it was"


@pytest.mark.parametrize(("path", "body"), [(path, body) for path, body, _ in DIALECTS])
async def test_a_bug_amid_a_stream_cuts_it_off(path: str, body: Json) -> None:
    async with serving_dialects([PIECES[0], RuntimeError("a secret")]) as (_, url), asyncio.timeout(10):
        with pytest.raises(aiohttp.ClientPayloadError):
            await asked(url, "POST", path, json=body | {"stream": True})


async def test_a_client_of_anthropics_is_known_by_its_header_on_other_paths() -> None:
    async with serving_dialects() as (_, url):
        status, error, _ = await asked(url, "GET", "/v1/models/other", headers={"anthropic-version": "2023-06-01"})
    assert status == 404 and anthropic_message(error)


NO_HTTP = {
    "a version of none": b"GET /v1/models HTTP/one\r\n\r\n",
    "TLS": b"\x16\x03\x01\x1b[31m\r\n\r\n",
    "a header too large": b"GET / HTTP/1.1\r\nX-A: " + b"a" * 9000 + b"\r\n\r\n",
    "too many headers": b"GET / HTTP/1.1\r\n" + b"X-A: a\r\n" * 200 + b"\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\n: \x1b[31m\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
}


@pytest.mark.parametrize("kind", NO_HTTP)
async def test_what_is_no_http_is_told_in_json_and_fills_no_log(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving_dialects() as (_, url), asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(NO_HTTP[kind])
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert head.startswith(b"HTTP/1.0 400 ") and b"Content-Type: application/json" in head
    message = openai_message(json.loads(body))
    assert message.startswith("the request cannot be read: ") and is_plain(message) and len(message) < 400
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
