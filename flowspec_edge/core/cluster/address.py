"""The address of a node: host and port, and how people write them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from flowspec_edge.errors import is_plain

MAX_HOST, MAX_LABEL = 253, 63
"""Characters of a host's name and of each part of it (RFC 1035, 2.3.4)."""


@dataclass(frozen=True, slots=True, order=True)
class Address:
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether it can be reached from its own machine alone."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_host(text: str) -> bool:
    """Whether a text may be the name or address of a host, and is safe as a part of a URL."""
    if not text or len(text) > MAX_HOST or not is_plain(text):
        return False
    if any(letter.isspace() or letter in "/\\@?#[]" for letter in text):
        return False
    return ":" in text or all(0 < len(label) <= MAX_LABEL for label in text.removesuffix(".").split("."))


def parse_address(text: str, default_port: int) -> Address | None:
    """Read ``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``. Returns None where the text is none of these."""
    host, port = text.strip(), ""
    if host.startswith("["):
        host, bracket, rest = host[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return None
        port = rest[1:]
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return None
    number = int(port or default_port) if len(port) <= 5 else 0
    if not is_host(host) or not 0 < number < 65536:
        return None
    return Address(host, number)
