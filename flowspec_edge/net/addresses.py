"""Addresses of this machine."""

from __future__ import annotations

import ipaddress

import ifaddr

from flowspec_edge.core.cluster.address import Address

LOOPBACK = "127.0.0.1"
EVERY_INTERFACE = "0.0.0.0"
NODE_PORT = 7361
"""Where a node listens if nothing else does, so that an address stays right from one run to the next."""
_INTERNAL_INTERFACES = ("lo", "docker", "br-", "veth", "virbr", "cni", "lxc", "podman")
"""Bridges to containers: the same on many machines, and no way to this one from outside."""


def is_loopback(host: str) -> bool:
    """Whether what listens there can be reached from this machine alone."""
    return Address(host, 0).is_loopback


def local_networks() -> dict[str, ipaddress.IPv4Network]:
    """The IPv4 addresses of this machine's interfaces, loopback and container bridges apart, and the network of each."""
    return {
        str(ip.ip): ipaddress.IPv4Network((ip.ip, ip.network_prefix), strict=False)
        for adapter in ifaddr.get_adapters()
        for ip in adapter.ips
        if isinstance(ip.ip, str) and not is_loopback(ip.ip) and not adapter.name.startswith(_INTERNAL_INTERFACES)
    }


def addresses_to_announce(host: str) -> list[str]:
    """Where others reach a listener on ``host``; loopback where this machine has no network."""
    if host == "localhost":
        return [LOOPBACK]
    return [host] if host != EVERY_INTERFACE else sorted(local_networks()) or [LOOPBACK]


def own_addresses(host: str) -> set[str]:
    """Every address at which a listener on ``host`` is reached from this machine itself."""
    if host != EVERY_INTERFACE:
        return set(addresses_to_announce(host))
    return {ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)}
