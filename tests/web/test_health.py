"""What a server tells of itself: health, readiness, metrics, the names of requests, and spans."""

import asyncio
import contextlib
import json
import logging
import re
import timeit
from collections.abc import AsyncIterator, Sequence

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from flowspec_edge.config import Piece
from flowspec_edge.core.rows import Passage
from flowspec_edge.errors import StageFailedError
from flowspec_edge.net.api_keys import ApiKeyBook, add_api_key
from flowspec_edge.net.server import serve_app
from flowspec_edge.origin.status import BoardWatch, KeptStatus, ServiceStatus, StageStatus, StageWork
from flowspec_edge.web import request_log
from flowspec_edge.web.app import build_app
from flowspec_edge.web.guard import Guard
from flowspec_edge.web.metrics import Metrics
from flowspec_edge.web.turns import TurnLimits, Turns
from tests.web.test_completions import PIECES, ScriptedGenerator

BOARD = {"node": "pi", "address": "h:1", "temperature_c": 61, "watts": 7.5, "joules": 900.0, "free_memory_bytes": 5}
BOARD |= {"state": "ready"}


def status_of(is_ready: bool = True, reason: str = "") -> ServiceStatus:
    work = StageWork()
    work.add(Passage(3, 0.5, 2.0))
    stage = StageStatus(node="pi", address="h:1", start=0, stop=4, work=work)
    return ServiceStatus(
        is_ready=is_ready,
        reason=reason,
        stages=[stage],
        boards=[BOARD],
        sent_bytes=7,
        received_bytes=9,
        kept=KeptStatus(2, 4096),
    )


@contextlib.asynccontextmanager
async def serving(
    script: Sequence[Piece | Exception | None] = PIECES,
    status: ServiceStatus | None = None,
    guard: Guard | None = None,
) -> AsyncIterator[tuple[ScriptedGenerator, aiohttp.ClientSession]]:
    generator = ScriptedGenerator(script)
    app = build_app(generator, guard, TurnLimits(max_sessions=1), status=(lambda: status) if status else None)
    served = await serve_app(app, cancels_on_disconnect=True)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}") as session, asyncio.timeout(10):
            yield generator, session
    finally:
        await served.close()


async def figures(session: aiohttp.ClientSession) -> dict[str, float]:
    """Each sample by its name, and by its labels but for the model."""
    async with session.get("/metrics") as response:
        assert response.status == 200 and response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = await response.text()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        ",".join([found.name, *(value for name, value in found.labels.items() if name not in ("model_name", "le"))]): (
            found.value
        )
        for found in samples
    }


@pytest.mark.parametrize(("is_ready", "code"), [(True, 200), (False, 503)])
async def test_health_says_whether_and_why_not(is_ready: bool, code: int) -> None:
    async with serving(status=status_of(is_ready, "layers [0, 4) of pi have no home")) as (_, session):
        async with session.get("/health") as response:
            told = await response.json()
            assert response.status == code
            assert told["status"] == ("ok" if is_ready else "unavailable")
            assert told["reason"] == "layers [0, 4) of pi have no home"
            assert (told["running"], told["waiting"], told["max_running"]) == (0, 0, 1)
            assert told["stages"][0] | {"work": None} == {
                "node": "pi",
                "address": "h:1",
                "start": 0,
                "stop": 4,
                "work": None,
            }
            assert told["boards"] == [BOARD]
        async with session.get("/ready") as response:
            assert (response.status, (await response.json())["ready"]) == (code, is_ready)


async def test_without_a_key_health_tells_no_more_than_that() -> None:
    guard = Guard(keys=ApiKeyBook())
    async with serving(status=status_of(False, "pi has no home"), guard=guard) as (_, session):
        async with session.get("/health") as response:
            assert (response.status, await response.json()) == (503, {"status": "unavailable"})
        for path in ("/ready", "/metrics"):
            async with session.get(path) as response:
                assert response.status == 401
        key = {"Authorization": f"Bearer {add_api_key('phone')}"}
        async with session.get("/health", headers=key) as response:
            assert (await response.json())["reason"] == "pi has no home"


async def test_metrics_count_what_happens_to_texts() -> None:
    statistics = {**(PIECES[-1].statistics or {}), "rows_sent": 8, "rows_useful": 2, "acceptance_length": 1.5}
    statistics["joules"] = 2.5
    last = Piece(text="", token_ids=[], finish_reason="length", statistics=statistics)
    async with serving([PIECES[0], None, PIECES[1], last], status_of()) as (generator, session):
        body = {"prompt": "x", "stream": True}
        async with session.post("/v1/completions", json=body) as first:
            await first.content.readline()
            waiting = asyncio.create_task(session.post("/v1/completions", json=body))
            while (found := await figures(session))["vllm:num_requests_waiting"] != 1:
                await asyncio.sleep(0.01)
            assert found["vllm:num_requests_running"] == 1
            generator.goes_on.set()
            await first.read()
            await (await waiting).read()
        found = await figures(session)
        assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
        assert found["vllm:request_success_total,length"] == 2
        assert found["vllm:prompt_tokens_total"] == 6 and found["vllm:generation_tokens_total"] == 4
        assert (found["vllm:prefix_cache_queries_total"], found["vllm:prefix_cache_hits_total"]) == (6, 2)
        of_each = ("request_queue_time", "time_to_first_token", "request_time_per_output_token", "e2e_request_latency")
        assert [found[f"vllm:{name}_seconds_count"] for name in of_each] == [2] * 4
        assert found["vllm:e2e_request_latency_seconds_sum"] >= found["vllm:time_to_first_token_seconds_sum"]
        assert found["flowspec:acceptance_length_sum"] == 3
        assert (found["flowspec:rows_sent_total"], found["flowspec:rows_useful_total"]) == (16, 4)
        assert found["flowspec:trips_total"] == 4
        assert (found["flowspec:text_joules_total"], found["flowspec:metered_tokens_total"]) == (5, 4)


async def test_texts_that_fail_or_are_left_are_counted_as_such() -> None:
    async with serving([PIECES[0], StageFailedError("lost")]) as (generator, session):
        async with session.post("/v1/completions", json={"prompt": "x"}) as response:
            assert response.status == 503
        generator.script = [PIECES[0], None]
        async with session.post("/v1/completions", json={"prompt": "x", "stream": True}) as response:
            await response.content.readline()
        await generator.is_closed.wait()
        while (found := await figures(session)).get("vllm:request_success_total,abort") != 1:
            await asyncio.sleep(0.01)
        assert found["vllm:request_success_total,error"] == 1
        assert found["vllm:num_requests_running"] == 0


async def test_metrics_tell_of_stages_and_boards() -> None:
    async with serving(status=status_of()) as (_, session):
        found = await figures(session)
    assert found["flowspec:ready"] == 1
    assert (found["flowspec:stage_busy_seconds_total,pi"], found["flowspec:stage_wait_seconds_total,pi"]) == (2, 0.5)
    assert (found["flowspec:stage_rows_total,pi"], found["flowspec:stage_layers,pi"]) == (3, 4)
    assert found["flowspec:board_temperature_celsius,pi"] == 61
    assert (found["flowspec:board_watts,pi"], found["flowspec:board_joules_total,pi"]) == (7.5, 900)
    assert "flowspec:text_joules_total" not in found, "no board told what it took for a text: that is not nothing"
    assert (found["flowspec:link_bytes_total,sent"], found["flowspec:link_bytes_total,received"]) == (7, 9)
    assert (found["flowspec:kept_sessions"], found["flowspec:kept_session_bytes"]) == (2, 4096)


def test_what_a_piece_costs_is_next_to_nothing() -> None:
    """A step of the quickest ring takes a millisecond; one hundredth of that is 10 us."""
    record = Metrics("m", Turns(TurnLimits()), None).begin()
    piece, num = Piece(text="a", token_ids=[5]), 2000
    best = min(timeit.repeat(lambda: record.take(piece), number=num, repeat=5))
    assert best / num < 10e-6


async def test_a_request_has_one_name_in_header_and_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=request_log.__name__):
        async with serving(guard=Guard(keys=ApiKeyBook())) as (_, session):
            key = {"Authorization": f"Bearer {add_api_key('phone')}"}
            async with session.post("/v1/completions", json={"prompt": "secret"}, headers=key) as response:
                name = response.headers["X-Request-Id"]
                await response.read()
            async with session.post("/v1/completions", json={}, headers={**key, "X-Request-Id": "mine-1"}) as response:
                assert response.headers["X-Request-Id"] == "mine-1"
            async with session.get("/v1/models", headers={"X-Request-Id": 'a"b'}) as response:
                assert response.status == 401
                other = response.headers["X-Request-Id"]
            async with session.get("/health") as response:
                assert "X-Request-Id" in response.headers
    lines = [json.loads(record.message) for record in caplog.records if record.name == request_log.__name__]
    assert [line["id"] for line in lines] == [name, "mine-1", other]
    assert re.fullmatch(r"req-[0-9a-f]{16}", name) and re.fullmatch(r"req-[0-9a-f]{16}", other)
    first, second, third = lines
    assert {k: first[k] for k in ("method", "path", "status", "api_key", "address")} == {
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "api_key": "phone",
        "address": "127.0.0.1",
    }
    assert (first["prompt_tokens"], first["completion_tokens"], first["finish_reason"]) == (3, 2, "length")
    assert (second["status"], third["status"]) == (400, 401)
    assert "secret" not in caplog.text and "Bearer" not in caplog.text


async def test_a_client_that_leaves_is_logged_as_proxies_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=request_log.__name__):
        async with serving([PIECES[0], None]) as (generator, session):
            async with session.post("/v1/completions", json={"prompt": "x", "stream": True}) as response:
                await response.content.readline()
            await generator.is_closed.wait()
    (line,) = [json.loads(record.message) for record in caplog.records if record.name == request_log.__name__]
    assert line["status"] == 499


async def test_a_request_is_a_span_where_opentelemetry_is() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="spans are tried with it: pip install '.[dev]'")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with serving() as (_, session):
        async with session.post("/v1/completions", json={"prompt": "x"}, headers={"traceparent": parent}) as response:
            name = response.headers["X-Request-Id"]
    (span,) = exporter.get_finished_spans()
    assert span.name == "POST /v1/completions"
    assert span.context is not None and f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    found = dict(span.attributes or {})
    assert found["http.request.header.x-request-id"] == name
    assert (found["http.response.status_code"], found["gen_ai.usage.output_tokens"]) == (200, 2)


async def test_boards_are_asked_when_somebody_wants_to_know_and_not_more_often() -> None:
    asked: list[int] = []
    answered = asyncio.Event()

    async def ask() -> list[dict[str, str]]:
        asked.append(1)
        answered.set()
        return [{"node": "pi"}]

    watch = BoardWatch(ask)
    assert list(watch.known) == []
    await answered.wait()
    await asyncio.sleep(0)
    assert [list(watch.known) for _ in range(3)] == [[{"node": "pi"}]] * 3
    assert len(asked) == 1
    await watch.close()
