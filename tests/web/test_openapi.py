"""The OpenAPI document says what is served, and whatever fits it, or does not, is answered."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from hypothesis import settings

from flowspec_edge.web.openapi import OPERATIONS, document
from tests.web.served import serving_dialects

schemathesis = pytest.importorskip("schemathesis", reason="requests by a schema: pip install '.[dev]'")

EXAMPLES = 5
"""For each path."""
DOCUMENT = document([operation.path for operation in OPERATIONS], needs_key=False)
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.phases.coverage.enabled = False  # hundreds for each path


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of an API on a thread of its own."""
    told, urls = threading.Event(), list[str]()
    loop, ended = asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with serving_dialects() as (_, url):
            urls.append(url)
            told.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert told.wait(10)
        yield urls[0]
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


def ask(url: str, case: Any) -> None:
    response = case.call(base_url=url)
    assert response.status_code < 500, (case.body, response.text)
    if response.status_code >= 400:
        assert response.headers["content-type"] == ["application/json; charset=utf-8"] and "error" in response.json()


limited = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
test_whatever_fits_is_answered = schema.parametrize()(limited(ask))


async def test_the_document_is_of_what_is_served() -> None:
    async with serving_dialects() as (_, url), aiohttp.ClientSession(url) as session:
        async with session.get("/openapi.json") as response:
            assert await response.json() == DOCUMENT
        for path, item in DOCUMENT["paths"].items():
            (method,) = item
            async with session.request(method, path.replace("{id}", "demo"), json={}) as response:
                assert response.status in (200, 400), f"{method} {path}"


def test_a_path_that_is_not_served_is_not_told() -> None:
    told = document(["/v1/completions"], needs_key=True)
    assert list(told["paths"]) == ["/v1/completions"] and told["security"]
    assert "ChatFields" not in told["components"]["schemas"]
    assert told["components"]["schemas"]["CompletionFields"]["properties"]["prompt"]["anyOf"]
