"""The addresses of this machine."""

from __future__ import annotations

import ipaddress

import ifaddr

from flowspec_edge.core.cluster.address import Address

LOOPBACK = "127.0.0.1"
EVERY_INTERFACE = "0.0.0.0"
NODE_PORT = 7361
"""The port on which a node listens if it is free, so that an address stays right from one run to the next."""
_INTERNAL_INTERFACES = ("lo", "docker", "br-", "veth", "virbr", "cni", "lxc", "podman")
"""The beginnings of names of interfaces that lead to containers. Their addresses are the same on many machines, and
others cannot reach this machine by them.
"""


def is_loopback(host: str) -> bool:
    """Whether a listener on ``host`` can be reached from this machine alone."""
    return Address(host, 0).is_loopback


def local_networks() -> dict[str, ipaddress.IPv4Network]:
    """The IPv4 addresses of this machine's interfaces, without loopback and container bridges, and the
    network of each.
    """
    return {
        str(ip.ip): ipaddress.IPv4Network((ip.ip, ip.network_prefix), strict=False)
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if isinstance(ip.ip, str) and not is_loopback(ip.ip) and not adapter.name.startswith(_INTERNAL_INTERFACES)
    }


def addresses_to_announce(host: str) -> list[str]:
    """The addresses at which others reach a listener on ``host``; loopback where this machine has no network."""
    if host == "localhost":
        return [LOOPBACK]
    return [host] if host != EVERY_INTERFACE else sorted(local_networks()) or [LOOPBACK]


def own_addresses(host: str) -> set[str]:
    """Every address at which this machine itself reaches a listener on ``host``."""
    if host != EVERY_INTERFACE:
        return set(addresses_to_announce(host))
    return {ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)}
