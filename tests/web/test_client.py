"""The client against a scripted server: dialogues, limits of time, retries, and nothing kept of what is done."""

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Sequence

import pytest
from aiohttp import web

from flowspec_edge.client import Client, Usage
from flowspec_edge.config import Piece
from flowspec_edge.errors import (
    AnswerTimeoutError,
    FlowspecError,
    NodeUnavailableError,
    PlainHttpError,
    RequestError,
    ServerBusyError,
    StageFailedError,
)
from flowspec_edge.net import api_discovery
from flowspec_edge.net.api_discovery import ApiRecord, announced, find_api
from flowspec_edge.net.server import serve_app
from tests.web.served import serving_dialects
from tests.web.test_completions import PIECES, STATISTICS, ScriptedGenerator
from tests.web.test_tools import CALLS, SCRIPT, TIME, TOOL

THOUGHT = [
    Piece(text="<think>hm</think>", token_ids=[4]),
    Piece(text="yes", token_ids=[5]),
    Piece(text="", token_ids=[], finish_reason="stop", statistics=STATISTICS),
]


@contextlib.asynccontextmanager
async def serving(script: Sequence[Piece | Exception | None]) -> AsyncIterator[tuple[ScriptedGenerator, str]]:
    async with asyncio.timeout(10), serving_dialects(script, family=None) as (generator, url):
        yield generator, url.removeprefix("http://")


async def test_a_message_is_streamed_with_what_was_thought_before_it() -> None:
    async with serving(THOUGHT) as (generator, url), Client(url) as client:
        answer = client.chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "well?"}], seed=4)
        assert "".join([piece.text async for piece in answer]) == answer.text == "yes"
        assert (answer.reasoning, answer.token_ids, answer.finish_reason) == ("hm", [4, 5], "stop")
        assert (answer.usage, answer.trips, answer.tool_calls) == (Usage(3, 2, 1), 2, [])
        ((prompt, options),) = generator.asked
        assert "be brief" in str(prompt) and "well?" in str(prompt) and options.seed == 4
        assert (await client.reply("well?", max_new_tokens=7)).text == "yes"
        assert generator.asked[1][1].max_new_tokens == 7


async def test_tools_are_offered_and_calls_come_typed() -> None:
    async with serving(SCRIPT) as (generator, url), Client(url) as client:
        asked = {"role": "user", "content": "well?"}
        answer = await client.reply([asked], tools=[TOOL, TIME], tool_choice="required")
        assert (answer.finish_reason, answer.text) == ("tool_calls", "I look.")
        assert [(call.name, call.parsed()) for call in answer.tool_calls] == CALLS
        results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in answer.tool_calls]
        generator.script = PIECES
        told = await client.reply([asked, answer.message, *results], tools=[TOOL, TIME])
        assert (told.text, told.tool_calls) == ("ab\n", []) and "sunny" in str(generator.asked[-1][0])
        assert told.message == {"role": "assistant", "content": "ab\n"}


async def test_all_that_a_text_may_be_asked_for() -> None:
    async with serving(PIECES) as (generator, url), Client(url) as client:
        await client.complete("x", stop_token_ids=[4], ignore_eos=True, min_tokens=2, num_logprobs=3)
        ((_, options),) = generator.asked
    assert (options.stop_token_ids, options.ignore_eos, options.min_tokens, options.num_logprobs) == ((4,), True, 2, 3)


async def test_models_and_health() -> None:
    async with serving([]) as (_, url), Client(url) as client:
        assert await client.models() == ["demo"]
        assert (await client.health()).is_ready


async def test_an_answer_has_so_much_time() -> None:
    async with serving([PIECES[0], None]) as (generator, url), Client(url, timeout=0.1) as client:
        answer = client.generate("x")
        with pytest.raises(AnswerTimeoutError, match=r"within 0\.1 s \(timeout\); 1 tokens came"):
            async for _ in answer:
                pass
        assert answer.text == "a"
        await generator.is_closed.wait()
        with pytest.raises(TimeoutError):
            await client.complete("x", timeout=0.05)
        generator.goes_on.set()
        generator.script = PIECES
        assert (await client.complete("x", timeout=5)).text == "ab\n"


@contextlib.asynccontextmanager
async def refusing(num_times: int, status: int, headers: dict[str, str]) -> AsyncIterator[tuple[list[int], str]]:
    """A server that refuses so often, and then answers."""
    asked: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(1)
        if len(asked) <= num_times:
            error = {"message": "full", "type": "server_error", "code": "server_busy" if status == 503 else None}
            return web.json_response({"error": error}, status=status, headers=headers)
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"text": "a", "finish_reason": "stop"}], "flowspec": {}}\n\n')
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", answer)
    served = await serve_app(app)
    try:
        async with asyncio.timeout(10):
            yield asked, f"127.0.0.1:{served.port}"
    finally:
        await served.close()


@pytest.mark.parametrize(("num_times", "status", "num_asked"), [(2, 503, 3), (1, 429, 2), (3, 503, 3), (1, 400, 1)])
async def test_a_busy_server_is_asked_again_when_it_said(num_times: int, status: int, num_asked: int) -> None:
    async with refusing(num_times, status, {"Retry-After": "0"}) as (asked, url), Client(url) as client:
        if num_asked > num_times:
            assert (await client.complete("x")).text == "a"
        else:
            with pytest.raises(ServerBusyError if status == 503 else RequestError, match="full"):
                await client.complete("x")
        assert len(asked) == num_asked


async def test_a_text_that_has_begun_is_not_asked_for_again() -> None:
    async with serving([PIECES[0], StageFailedError("lost")]) as (generator, url), Client(url) as client:
        with pytest.raises(StageFailedError):
            await client.complete("x")
        assert len(generator.asked) == 1


async def test_who_wants_no_retry_is_told_at_once() -> None:
    async with Client("127.0.0.1:9", retries=0) as client:
        with pytest.raises(NodeUnavailableError, match=r"nothing answers at http://127\.0\.0\.1:9"):
            await client.complete("x")


async def test_nothing_is_kept_of_finished_answers() -> None:
    async with serving(PIECES) as (_, url), Client(url) as client:
        refs = [weakref.ref(await client.complete("x")) for _ in range(30)]
        gc.collect()
        assert [ref() for ref in refs] == [None] * 30


async def test_leaving_the_block_cancels_what_is_still_written() -> None:
    async with serving([PIECES[0], None]) as (generator, url):
        async with Client(url) as client:
            answer = client.chat("x")
            await anext(answer)
        await generator.is_closed.wait()


async def test_a_key_does_not_go_over_plain_http_unasked() -> None:
    with pytest.raises(PlainHttpError):
        Client("http://pi-kitchen:8008", api_key="fsa1-x")
    Client("http://127.0.0.1:8008", api_key="fsa1-x")


async def test_a_key_is_not_sent_on_to_where_a_server_points() -> None:
    async def lead_away(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect("http://192.0.2.99/v1/completions")

    app = web.Application()
    app.router.add_post("/v1/completions", lead_away)
    served = await serve_app(app)
    try:
        async with Client(f"http://127.0.0.1:{served.port}", api_key="fsa1-x") as client:
            with pytest.raises(FlowspecError, match="answers 307"):
                await client.complete("x")
    finally:
        await served.close()


@pytest.mark.parametrize("needs_key", [False, True])
async def test_a_server_is_discovered_by_its_record(needs_key: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_discovery, "API_PORT", 9)  # none of this machine's own
    monkeypatch.setattr(api_discovery, "EVERY_INTERFACE", "127.0.0.1")
    async with serving(PIECES) as (_, url):
        record = ApiRecord(
            name="pi.x",
            host="127.0.0.1",
            port=int(url.rpartition(":")[2]),
            scheme="http",
            model=f"model-{needs_key}",
            needs_key=needs_key,
        )
        async with announced(record):
            if needs_key:
                with pytest.raises(NodeUnavailableError, match="wants an API key"):
                    await find_api(model=record.model, has_key=False, within_s=1.5)
            assert await find_api(model=record.model, has_key=needs_key, within_s=5) == (f"http://{url}", needs_key)
            key = "fsa1-x" if needs_key else None
            async with await Client.discover(model=record.model, api_key=key) as client:
                assert (await client.complete("x")).text == "ab\n"
