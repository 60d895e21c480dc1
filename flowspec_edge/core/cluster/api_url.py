"""The URL of a server of the HTTP API, as people write it: with or without a scheme, a port, and ``/v1``."""

from __future__ import annotations

from urllib.parse import urlsplit

from flowspec_edge.core.cluster.address import Address, parse_address
from flowspec_edge.errors import PlainHttpError, RequestError

API_PORT = 8008
"""Where ``flowspec serve`` listens unless it is told otherwise, and what is asked where no port is named."""


def read_api_url(text: str, *, has_key: bool, allows_plain_http: bool) -> str:
    """The URL that paths of the API are added to. Without a scheme it is https where there is a key, and else http.

    Raises:
        RequestError: it is no URL of a server.
        PlainHttpError: a key would leave this machine unencrypted, and that is not allowed.
    """
    scheme, separator, rest = text.strip().partition("://")
    if not separator:
        scheme, rest = "https" if has_key else "http", text.strip()
        address = parse_address(rest.partition("/")[0], API_PORT)
        rest = f"{address}/{rest.partition('/')[2]}" if address is not None else ""
    url = f"{scheme.lower()}://{rest}".rstrip("/").removesuffix("/v1")
    try:
        host = urlsplit(url).hostname
    except ValueError:
        host = None
    if scheme.lower() not in ("http", "https") or not host:
        raise RequestError(f"{text!r:.80} is no URL of a server; give HOST, HOST:PORT or http://HOST:PORT")
    if has_key and not allows_plain_http and scheme.lower() == "http" and not Address(host, 0).is_loopback:
        raise PlainHttpError(
            f"the API key would go to {url} unencrypted, for everyone on the way to read; write https:// where the "
            "server speaks it, or Client(..., allows_plain_http=True) where that is as it should be"
        )
    return url
