"""Whom a client of the HTTP API trusts, before it has sent its key to anybody."""

from __future__ import annotations

import json
import ssl

import aiohttp

from flowspec_edge.core.cluster.api_key import digest_of, is_proof, mark_of

MAX_HEALTH_BYTES = 2**16
"""Of an answer of somebody who is not known yet: a certificate authority has about a kilobyte."""


async def find_trust(session: aiohttp.ClientSession, url: str, api_key: str) -> ssl.SSLContext | bool:
    """Whom to trust at a URL that begins with https: a server that proves that it knows the key, and else whomever this
    machine trusts.

    The key itself is not sent. Whoever answers without the proof gains nothing: it is not trusted then.

    Raises:
        aiohttp.ClientError, OSError, TimeoutError: nobody answers.
    """
    authority = await fetch_authority(session, url, api_key)
    if authority is None:
        return True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # this authority issues for that machine alone, by whatever name it is called
    context.load_verify_locations(cadata=authority)
    return context


async def fetch_authority(session: aiohttp.ClientSession, url: str, api_key: str) -> str | None:
    """The certificate authority (PEM) of the server, proven by the key; None where there is no proof."""
    digest = digest_of(api_key)
    async with session.get(
        f"{url}/health",
        params={"key": mark_of(digest)},
        ssl=False,
        headers={"Authorization": ""},
        allow_redirects=False,
    ) as response:
        try:
            told = await _read_json(response)
            authority, proof = str(told["authority"]), str(told["proof"])
        except (ValueError, LookupError, TypeError):
            return None
    return authority if is_proof(proof, digest, authority) else None


async def _read_json(response: aiohttp.ClientResponse) -> dict[str, object]:
    """Raises ValueError where it is none, or too long."""
    text = await response.content.read(MAX_HEALTH_BYTES)
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
