"""A client that has the key alone trusts who proves that it knows it, and nobody who merely says so."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web

from flowspec_edge.client import Client
from flowspec_edge.core.cluster.api_key import digest_of, mark_of, proof_of
from flowspec_edge.errors import OtherKeyError
from flowspec_edge.net.api_trust import find_trust
from flowspec_edge.net.certificates import ServingCertificate, open_authority
from flowspec_edge.net.server import serve_app

KEY = "fsa1-what-ever"


@contextlib.asynccontextmanager
async def serving(told: object) -> AsyncIterator[tuple[str, list[web.Request]]]:
    """A server whose health is that, and what it was asked."""
    asked: list[web.Request] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request)
        return web.json_response(told)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    certificate = ServingCertificate(open_authority("127.0.0.1"), "127.0.0.1", [])
    served = await serve_app(app, tls=certificate.context)
    try:
        async with asyncio.timeout(10):
            yield f"https://127.0.0.1:{served.port}", asked
    finally:
        await served.close()


async def test_a_proof_is_trusted_and_the_key_not_sent_for_it() -> None:
    authority = open_authority("127.0.0.1").certificate
    told = {"authority": authority, "proof": proof_of(digest_of(KEY), authority)}
    async with serving(told) as (url, asked), aiohttp.ClientSession() as session:
        assert isinstance(await find_trust(session, url, KEY), ssl.SSLContext)
        (request,) = asked
        assert request.query["key"] == mark_of(digest_of(KEY))
        assert not any(KEY in value for value in request.headers.values())


@pytest.mark.parametrize("proof", ["", "00" * 32, None, 5])
async def test_who_has_no_proof_never_sees_the_key(proof: object) -> None:
    told = {"authority": open_authority("127.0.0.1").certificate, "proof": proof}
    async with serving(told) as (url, asked):
        async with Client(url, api_key=KEY, retries=0) as client:
            with pytest.raises(OtherKeyError, match="does not know the API key"):
                await client.complete("x")
        assert not any(KEY in value for request in asked for value in request.headers.values())


@pytest.mark.parametrize("told", [[], "x", {"authority": 5}, {"proof": "x"}, None])
async def test_what_is_no_answer_is_no_proof(told: object) -> None:
    async with serving(told) as (url, _), aiohttp.ClientSession() as session:
        assert await find_trust(session, url, KEY) is True


async def test_another_servers_proof_passed_on_leads_to_that_server_alone() -> None:
    """Whoever stands between may hand on the real server's proof; its own certificate is not of that authority."""
    from flowspec_edge.net import certificates

    real = certificates._make_authority(["real"], [])
    told = {"authority": real.certificate, "proof": proof_of(digest_of(KEY), real.certificate)}
    async with serving(told) as (url, asked):
        async with Client(url, api_key=KEY, retries=0) as client:
            with pytest.raises(OtherKeyError):
                await client.complete("x")
        assert not any(KEY in value for request in asked for value in request.headers.values())
