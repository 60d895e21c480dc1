"""Who may use the API: any program of this machine, no page of the web, and beyond this machine who has a key.

A page that somebody visits can send requests to this machine. So without a key the name in ``Host`` must be one of this
machine's, lest a page has its own name lead here (DNS rebinding); a page's ``Origin`` must be one that the user named;
and what is posted must be JSON, which a page can send only where the server agrees to it (CORS preflight).
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from flowspec_edge.core.cluster.address import parse_address
from flowspec_edge.core.cluster.api_key import proof_of
from flowspec_edge.errors import plain_text
from flowspec_edge.web.refusals import refuse_as

KEY_NAME = web.RequestKey("api_key_name", str)
"""Of a request that came with a key: under what it is kept."""
OPEN_PATHS = "/health", "/"
PAGE_FILES = "/page/"
"""What is answered without a key: that the server is there, and the page, which asks for the key."""
EXPOSED = "X-Request-Id, X-Flowspec-Warning, Retry-After"
"""Headers of an answer that a page may read, beside those that it always may."""
PREFLIGHT_S = 600
"""How long a browser may remember what it was allowed."""


class KnownKey(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...


class KeyBook(Protocol):
    def find(self, key: str) -> KnownKey | None: ...

    def marked(self, mark: str) -> KnownKey | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What is let through. Without ``keys`` none is needed.

    ``hosts`` are names of this machine in lower case, beside "localhost" and every address, which are always right.
    ``origins`` are those of pages that may use the API, each as ``scheme://host[:port]``. ``authority`` is what clients
    are to trust where TLS is spoken, as PEM.
    """

    keys: KeyBook | None = None
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    authority: str | None = field(default=None, repr=False)

    def install(self, app: web.Application) -> None:
        """Have every request of the application pass by this guard."""
        app.middlewares.append(self._middleware())
        app.on_response_prepare.append(self._admit_origin)

    def proof(self, request: web.Request) -> Mapping[str, str]:
        """What lets a client that names its key's mark trust this server; empty where it does not ask, or is wrong."""
        mark = request.query.get("key")
        if mark is None or self.keys is None or self.authority is None:
            return {}
        key = self.keys.marked(mark)
        return {} if key is None else {"authority": self.authority, "proof": proof_of(key.digest, self.authority)}

    def lets_read(self, request: web.Request) -> bool:
        """Whether who asks may know more than that the server is there."""
        return self.keys is None or KEY_NAME in request

    def _middleware(self) -> Middleware:
        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            refusal = self._refusal(request)
            if refusal is not None:
                return refusal
            if "Origin" in request.headers and request.method == "OPTIONS":
                return _allow_request(request)
            return await handler(request)

        return check

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.keys is None and not all(self._is_own(host) for host in request.headers.getall("Host", ())):
            return refuse_as(
                403,
                f"Host {plain_text(request.host[:80])} is no name of this machine; use its address or localhost, or "
                "start the server with --api-name NAME",
                "host_not_allowed",
            )
        origin = request.headers.get("Origin")
        if origin is not None and origin.lower() not in {*self.origins, f"{request.scheme}://{request.host}".lower()}:
            return refuse_as(
                403,
                f"pages of {plain_text(origin[:80])} may not use this server; start it with --cors-origin ORIGIN where "
                "they should",
                "origin_not_allowed",
            )
        if origin is not None and request.method == "OPTIONS":
            return None  # browsers ask for permission without the key
        if self.keys is not None and not self._has_key(request, self.keys) and not _is_open(request.path):
            return refuse_as(
                401,
                "the API key is missing or wrong; send `Authorization: Bearer KEY` (flowspec key api add NAME makes "
                "one, where the server runs)",
                "invalid_api_key",
            )
        if request.method == "POST" and not _is_json(request):
            return refuse_as(
                415,
                f"the body is {plain_text(request.headers.get('Content-Type', 'of no type')[:80])}; send it as "
                "`Content-Type: application/json`",
                "unsupported_media_type",
            )
        return None

    def _is_own(self, host: str) -> bool:
        address = parse_address(host, 80)
        if address is None:
            return False
        name = address.host.lower().removesuffix(".")
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name == "localhost" or name in self.hosts

    def _has_key(self, request: web.Request, keys: KeyBook) -> bool:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.headers.get("X-Api-Key", "")
        key = keys.find(given.strip()) if given.strip() else None
        if key is not None:
            request[KEY_NAME] = key.name
        return key is not None

    async def _admit_origin(self, request: web.Request, response: web.StreamResponse) -> None:
        if not self.origins:
            return
        response.headers["Vary"] = "Origin"
        origin = request.headers.get("Origin", "")
        if origin.lower() in self.origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = EXPOSED


def _allow_request(request: web.Request) -> web.Response:
    """The answer to a preflight from an origin that is wanted: it may do all that a client may."""
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
        "Access-Control-Max-Age": str(PREFLIGHT_S),
    }
    if "Access-Control-Request-Private-Network" in request.headers:
        headers["Access-Control-Allow-Private-Network"] = "true"
    return web.Response(status=204, headers=headers)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(PAGE_FILES)


def _is_json(request: web.Request) -> bool:
    kind = request.content_type if "Content-Type" in request.headers else ""
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
