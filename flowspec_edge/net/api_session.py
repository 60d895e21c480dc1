"""What a client of the HTTP API says to its servers: requests with its key, to whom it trusts, and errors by name."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import aiohttp

from flowspec_edge.core.asked_text import DEFAULT_RETRY_S, error_of
from flowspec_edge.errors import (
    FlowspecError,
    LinkLostError,
    NodeUnavailableError,
    OtherKeyError,
    RequestError,
    StageFailedError,
    system_words,
)
from flowspec_edge.net.api_trust import find_trust

CONNECT_S = 5.0
"""A LAN answers within milliseconds, a busy board within a second."""
ASK_S = 10.0
"""For a question that is no text to write, where it is not said how long it may take."""
MAX_EVENT_BYTES = 4 * 2**20
"""The last event of an answer is about a kilobyte. The first one may have the tokens of a long prompt."""


class ApiSession:
    """Connections to servers, each of which has proven that it knows the key. One that says nothing for ``silence_s``
    is lost.
    """

    def __init__(self, api_key: str | None, silence_s: float | None) -> None:
        self._api_key = api_key
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=silence_s),
            read_bufsize=MAX_EVENT_BYTES,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
        )
        self._trusted: dict[str, ssl.SSLContext | bool] = {}  # by URL

    async def close(self) -> None:
        await self._session.close()

    @contextlib.asynccontextmanager
    async def post(self, url: str, path: str, body: Mapping[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        """The response of a server that does what is asked. Reading it raises the same errors.

        Raises:
            FlowspecError: it refuses; see :func:`error_of`.
            OtherKeyError: it is not trusted.
            NodeUnavailableError: nothing answers there.
            LinkLostError: the connection broke.
        """
        with self._naming_errors(url):
            async with self._session.post(
                url + path, json=body, ssl=await self._trust(url), allow_redirects=False
            ) as response:
                if response.status != 200:
                    raise await _refusal(url, response)
                yield response

    async def get(
        self, url: str, path: str, within_s: float | None, *, may_be_unready: bool = False
    ) -> tuple[int, dict[str, Any]]:
        """The status and the object at a path: 200, or 503 where the server ``may_be_unready``. Raises as :meth:`post`
        does.
        """
        limits = aiohttp.ClientTimeout(total=within_s or ASK_S)
        with self._naming_errors(url):
            async with self._session.get(
                url + path, ssl=await self._trust(url), allow_redirects=False, timeout=limits
            ) as response:
                if response.status == 200 or (may_be_unready and response.status == 503):
                    with contextlib.suppress(ValueError, TypeError, aiohttp.ContentTypeError):
                        return response.status, dict(await response.json())
                raise await _refusal(url, response)

    async def _trust(self, url: str) -> ssl.SSLContext | bool:
        """The holder of the API key, where it proves that it is; else whomever this machine trusts."""
        if self._api_key is None or not url.startswith("https://"):
            return True
        if url not in self._trusted:
            self._trusted[url] = await find_trust(self._session, url, self._api_key)
        return self._trusted[url]

    @contextlib.contextmanager
    def _naming_errors(self, url: str) -> Iterator[None]:
        try:
            yield
        except aiohttp.ClientConnectorCertificateError as cause:
            self._trusted.pop(url, None)  # it may have another authority since, and proves that next time
            given = "no API key was given to check it by" if self._api_key is None else "it does not know the API key"
            raise OtherKeyError(f"{url} is not trusted: {given}; see flowspec key api, where it serves") from cause
        except aiohttp.ClientConnectorSSLError as cause:
            raise NodeUnavailableError(
                f"{url} does not speak TLS ({system_words(cause)}); write http:// where it serves this machine "
                "alone, or plain HTTP on purpose"
            ) from cause
        except aiohttp.ClientConnectorError as cause:
            raise NodeUnavailableError(
                f"nothing answers at {url} ({system_words(cause)}); start one with: flowspec serve"
            ) from cause
        except (aiohttp.ClientError, OSError) as cause:
            why = "the connection broke" if isinstance(cause, aiohttp.ClientPayloadError) else system_words(cause)
            raise LinkLostError(f"the server at {url} was lost ({why}); ask again when it is back") from cause


async def _refusal(url: str, response: aiohttp.ClientResponse) -> FlowspecError:
    """The error that a response tells of."""
    waits = response.headers.get("Retry-After", "")
    try:
        return error_of(await response.json(), response.status, float(waits) if waits.isdecimal() else DEFAULT_RETRY_S)
    except (aiohttp.ContentTypeError, ValueError, LookupError, TypeError):
        message = f"{url} answers {response.status} {response.reason}; is it a flowspec serve?"
        return RequestError(message) if response.status < 500 else StageFailedError(message)
