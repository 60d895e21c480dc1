"""Who gets past the guard of the API, over real sockets: programs, wanted pages, and holders of a key."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping

import aiohttp
import pytest

from flowspec_edge.core.cluster.api_key import digest_of, mark_of, proof_of
from flowspec_edge.net.api_keys import ApiKeyBook, add_api_key, revoke_api_key
from flowspec_edge.net.server import serve_app
from flowspec_edge.web.app import build_app
from flowspec_edge.web.guard import Guard
from flowspec_edge.web.turns import TurnLimits
from tests.web.test_completions import PIECES, ScriptedGenerator

JSON = {"Content-Type": "application/json"}
BODY = '{"prompt": "x"}'
PAGE = "https://front.end:8443"


@contextlib.asynccontextmanager
async def serving(
    guard: Guard | None = None, limits: TurnLimits | None = None
) -> AsyncIterator[tuple[ScriptedGenerator, aiohttp.ClientSession]]:
    generator = ScriptedGenerator(PIECES)
    served = await serve_app(build_app(generator, guard, limits), cancels_on_disconnect=True)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{served.port}") as session, asyncio.timeout(10):
            yield generator, session
    finally:
        await served.close()


async def ask(session: aiohttp.ClientSession, headers: Mapping[str, str], body: str = BODY) -> tuple[int, str]:
    """Status, and the code of the error if there is one."""
    async with session.post("/v1/completions", data=body.encode(), headers=headers) as response:
        told = await response.json()
        return response.status, told.get("error", {}).get("code", "")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8008", "localhost", "LOCALHOST:80", "[::1]:8008", "192.168.1.20", "pi.local", "Pi.Local.:8008"],
)
async def test_this_machines_names_and_addresses_are_right(host: str) -> None:
    async with serving(Guard(hosts=frozenset({"pi.local"}))) as (_, session):
        assert await ask(session, {**JSON, "Host": host}) == (200, "")


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8008", "", "a b", "x:y"]
)
async def test_a_name_that_a_page_has_led_here_is_refused(host: str) -> None:
    async with serving(Guard(hosts=frozenset({"pi.local"}))) as (generator, session):
        assert await ask(session, {**JSON, "Host": host}) == (403, "host_not_allowed")
        async with session.get("/v1/models", headers={"Host": host}) as response:
            assert response.status == 403
        assert not generator.asked


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://front.end"])
async def test_a_page_that_nobody_wanted_is_refused(origin: str) -> None:
    async with serving(Guard(origins=frozenset({PAGE}))) as (generator, session):
        assert await ask(session, {**JSON, "Origin": origin}) == (403, "origin_not_allowed")
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        async with session.options("/v1/completions", headers=preflight) as response:
            assert response.status == 403
            assert "Access-Control-Allow-Origin" not in response.headers
        assert not generator.asked


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_wanted_page_asks_for_permission_and_may_read_the_answer(is_streamed: bool) -> None:
    async with serving(Guard(origins=frozenset({PAGE}), keys=ApiKeyBook())) as (_, session):
        key = add_api_key("page")
        preflight = {
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
            "Access-Control-Request-Private-Network": "true",
        }
        async with session.options("/v1/completions", headers=preflight) as response:
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
            assert "POST" in response.headers["Access-Control-Allow-Methods"]
            assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-os"
            assert response.headers["Access-Control-Allow-Private-Network"] == "true"
        body = '{"prompt": "x", "stream": true}' if is_streamed else BODY
        headers = {**JSON, "Origin": PAGE, "Authorization": f"Bearer {key}"}
        async with session.post("/v1/completions", data=body.encode(), headers=headers) as response:
            assert response.status == 200
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
            assert response.headers["Vary"] == "Origin"
        async with session.post("/v1/completions", data=BODY.encode(), headers={**JSON, "Origin": PAGE}) as response:
            assert response.status == 401
            assert response.headers["Access-Control-Allow-Origin"] == PAGE


async def test_a_page_of_this_server_itself_is_no_stranger() -> None:
    async with serving() as (_, session):
        assert await ask(session, {**JSON, "Host": "localhost:80", "Origin": "http://localhost:80"}) == (200, "")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
async def test_what_a_form_can_send_is_refused(kind: str) -> None:
    async with serving() as (generator, session):
        assert await ask(session, {"Content-Type": kind}) == (415, "unsupported_media_type")
        assert not generator.asked


async def test_a_body_without_a_type_is_refused() -> None:
    async with serving() as (generator, session):
        skipping = {"skip_auto_headers": ["Content-Type"]}
        async with session.post("/v1/completions", data=BODY.encode(), **skipping) as response:  # type: ignore[arg-type]
            assert response.status == 415
        assert not generator.asked


async def test_json_of_any_name_is_json() -> None:
    async with serving() as (_, session):
        assert await ask(session, {"Content-Type": "application/vnd.api+json; charset=utf-8"}) == (200, "")


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Bearer fsa1-qqqq", "Basic {key}", "Bearer \xe9", "Bearer \ud800"]
)
async def test_without_a_key_nothing_is_answered_but_that_the_server_is_there(header: str) -> None:
    async with serving(Guard(keys=ApiKeyBook())) as (generator, session):
        headers = {
            "Authorization": header.format(key=add_api_key("phone")).encode(errors="surrogatepass").decode("latin-1")
        }
        for method, path in (
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/x"),
            ("OPTIONS", "/v1/models"),
        ):
            async with session.request(method, path, json={"prompt": "x"}, headers=headers) as response:
                assert response.status == 401, f"{method} {path}"
                assert "flowspec key api add" in (await response.json())["error"]["message"]
        async with session.get("/health", headers=headers) as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})
        assert not generator.asked


async def test_keys_open_as_openais_and_anthropics_clients_send_them_until_they_are_revoked() -> None:
    async with serving(Guard(keys=ApiKeyBook())) as (_, session):
        keys = [add_api_key("phone"), add_api_key("laptop")]
        for key in (*keys, keys[0].upper().replace("-", "")):
            assert await ask(session, {**JSON, "Authorization": f"Bearer {key}"}) == (200, "")
            assert await ask(session, {**JSON, "X-Api-Key": key}) == (200, "")
        revoke_api_key("phone")
        assert await ask(session, {**JSON, "Authorization": f"Bearer {keys[0]}"}) == (401, "invalid_api_key")
        assert await ask(session, {**JSON, "Authorization": f"Bearer {keys[1]}"}) == (200, "")


async def test_with_a_key_any_name_of_the_machine_is_right() -> None:
    async with serving(Guard(keys=ApiKeyBook())) as (_, session):
        key = add_api_key("phone")
        headers = {**JSON, "Host": "pi.fritz.box", "Authorization": f"Bearer {key}"}
        assert await ask(session, headers) == (200, "")


async def test_one_key_has_so_many_texts_and_leaves_room_for_others() -> None:
    async with serving(Guard(keys=ApiKeyBook()), TurnLimits(max_per_key=1)) as (generator, session):
        generator.script = [PIECES[0], None, *PIECES[1:]]
        phone, laptop = ({**JSON, "Authorization": f"Bearer {add_api_key(name)}"} for name in ("phone", "laptop"))
        streamed = '{"prompt": "x", "stream": true}'
        async with session.post("/v1/completions", data=streamed.encode(), headers=phone) as response:
            await response.content.readline()
            async with session.post("/v1/completions", data=BODY.encode(), headers=phone) as refused:
                error = (await refused.json())["error"]
                assert (refused.status, error["code"]) == (429, "rate_limit_exceeded")
                assert "the API key 'phone' has 1 texts" in error["message"] and "--max-per-key" in error["message"]
                assert refused.headers["Retry-After"] == "2"
            async with session.post("/v1/completions", data=streamed.encode(), headers=laptop) as other:
                assert other.status == 200
                generator.goes_on.set()
                await asyncio.gather(other.read(), response.read())
        assert await ask(session, phone) == (200, "")
        assert [options.owner for _, options in generator.asked] == ["phone", "laptop", "phone"]


async def test_a_server_proves_that_it_knows_a_key_and_tells_others_nothing() -> None:
    authority = "-----BEGIN CERTIFICATE-----"
    async with serving(Guard(keys=ApiKeyBook(), authority=authority)) as (_, session):
        digest = digest_of(add_api_key("phone"))
        async with session.get("/health", params={"key": mark_of(digest)}) as response:
            assert await response.json() == {
                "status": "ok",
                "authority": authority,
                "proof": proof_of(digest, authority),
            }
        for mark in ("", mark_of("00" * 32), digest):
            async with session.get("/health", params={"key": mark}) as response:
                assert await response.json() == {"status": "ok"}


async def test_two_hosts_in_one_request_are_refused() -> None:
    async with serving() as (_, session):
        port = session._base_url.port if session._base_url else None
        assert port is not None
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(raw, b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
            assert (await loop.sock_recv(raw, 2**16)).split()[1] in (b"400", b"403")
