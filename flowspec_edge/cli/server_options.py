"""Options of commands that ask a ``flowspec serve``."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowspec_edge.client import Client

KEY_VARIABLE = "FLOWSPEC_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerArguments:
    url: str | None
    api_key: str | None
    allow_plain_http: bool


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", help="server to ask: HOST, HOST:PORT or URL (default: this machine's, else one found by mDNS)"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"its API key (default: ${KEY_VARIABLE}, which other users of this machine cannot see)",
    )
    parser.add_argument("--allow-plain-http", action="store_true", help="send the key unencrypted over the network")


async def client_from(options: ServerArguments, **more: Any) -> Client:
    """A client of the server that was named, or of one that is found.

    Raises:
        RequestError: the URL is none, or the key would go over plain HTTP.
        NodeUnavailableError: none was named, and none is found.
    """
    from flowspec_edge.client import Client

    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    more["allows_plain_http"] = options.allow_plain_http
    if options.url is None:
        return await Client.discover(api_key=key, **more)
    return Client(options.url, api_key=key, **more)
