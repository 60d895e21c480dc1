"""Announces servers of the HTTP API by mDNS, and finds one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiohttp
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.api_url import API_PORT
from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.addresses import EVERY_INTERFACE, LOOPBACK
from flowspec_edge.net.discovery import Announcer, open_zeroconf

SERVICE_TYPE = "_flowspec-api._tcp.local."
OWN_S = 1.0
"""How long a server of this machine may take to answer."""
RECORD_MS = 1500
MAX_HEARD = 64
"""Records that are asked for; anyone may announce anything."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRecord:
    """What is announced of a server that listens on ``host``. ``needs_key`` where it wants an API key."""

    name: str
    host: str
    port: int
    scheme: str
    model: str
    needs_key: bool


@contextlib.asynccontextmanager
async def announced(record: ApiRecord) -> AsyncIterator[Announcer | None]:
    """The server is announced meanwhile; where mDNS cannot be used it is not, which is logged."""
    properties = {"scheme": record.scheme, "model": record.model, "key": "1" if record.needs_key else "0"}
    try:
        announcer = await Announcer.start_record(SERVICE_TYPE, record.name, record.host, record.port, properties)
    except NodeUnavailableError as cause:
        _log.warning("clients cannot discover this server: %s", cause)
        yield None
        return
    try:
        yield announcer
    finally:
        await announcer.close()


async def find_api(*, model: str | None, has_key: bool, within_s: float) -> tuple[str, bool]:
    """The URL of a server, of this machine's port or of the first that is heard and can be used; and whether it wants a
    key.

    Raises:
        NodeUnavailableError: there is none in that time; the text says which could not be used.
    """
    own = f"http://{Address(LOOPBACK, API_PORT)}"
    if await _answers(own, model):
        return own, False
    found: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue()
    unusable = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within_s), _heard(found):
            while True:
                url, served, needs_key = await found.get()
                if model is not None and served != model:
                    unusable.append(f"{url} has the model {served!r:.80}")
                elif needs_key and not has_key:
                    unusable.append(f"{url} wants an API key")
                else:
                    return url, needs_key
    told = f" ({'; '.join(sorted(set(unusable)))})" if unusable else ""
    raise NodeUnavailableError(
        f"no server was found within {within_s:g} s{told}; start one with: flowspec serve, or name its URL"
    )


async def _answers(url: str, model: str | None) -> bool:
    timeout = aiohttp.ClientTimeout(total=OWN_S)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url}/v1/models", allow_redirects=False) as response,
        ):
            models = [entry["id"] for entry in (await response.json())["data"]]
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
        return False
    return model is None or model in models


@contextlib.asynccontextmanager
async def _heard(found: asyncio.Queue[tuple[str, str, bool]]) -> AsyncIterator[None]:
    """URL, model and need of a key of each server that is heard meanwhile are put into the queue."""
    zeroconf = open_zeroconf(EVERY_INTERFACE)
    asking: set[asyncio.Task[None]] = set()

    async def ask(name: str) -> None:
        info = AsyncServiceInfo(SERVICE_TYPE, name)
        with contextlib.suppress(ZeroconfError, UnicodeDecodeError):
            if not await info.async_request(zeroconf.zeroconf, RECORD_MS):
                return
            texts = {key.decode(): (value or b"").decode() for key, value in info.properties.items()}
            for host in info.parsed_addresses(IPVersion.V4Only)[:1]:
                scheme = "https" if texts.get("scheme") == "https" else "http"
                url = f"{scheme}://{Address(host, info.port or 0)}"
                found.put_nowait((url, texts.get("model", ""), texts.get("key") == "1"))

    def hear(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if state_change is ServiceStateChange.Added and len(asking) < MAX_HEARD:
            task = asyncio.get_running_loop().create_task(ask(name), name=f"mDNS record {name}")
            asking.add(task)

    browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE_TYPE, handlers=[hear])
    try:
        yield
    finally:
        await browser.async_cancel()
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        await zeroconf.async_close()
