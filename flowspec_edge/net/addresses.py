"""The addresses of this machine, and those at which others reach it."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv4Network

import ifaddr

from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.interfaces import Interface, Verdict, judge
from flowspec_edge.net import rtnetlink

LOOPBACK = "127.0.0.1"
EVERY_INTERFACE = "0.0.0.0"
NODE_PORT = 7361
"""The port on which a node listens if it is free, so that an address stays right from one run to the next."""


def is_loopback(host: str) -> bool:
    """Whether a listener on ``host`` can be reached from this machine alone."""
    return Address(host, 0).is_loopback


def read_verdicts() -> list[Verdict]:
    """This machine's interfaces, and for each whether its addresses are announced."""
    try:
        interfaces = rtnetlink.read_interfaces()
    except (AttributeError, OSError):  # another system than Linux, or one that does not tell
        interfaces = _read_portably()
    return judge(interfaces)


def _read_portably() -> list[Interface]:
    """What every system tells: names and addresses."""
    interfaces = []
    for index, adapter in enumerate(ifaddr.get_adapters(), 1):
        own = tuple(IPv4Interface((ip.ip, ip.network_prefix)) for ip in adapter.ips if isinstance(ip.ip, str))
        interfaces.append(
            Interface(
                index=adapter.index or index,
                name=adapter.nice_name,
                is_loopback=any(address.is_loopback for address in own),
                has_neighbours=any(address.network.prefixlen < address.max_prefixlen for address in own),
                addresses=own,
            )
        )
    return interfaces


def local_networks() -> dict[str, IPv4Network]:
    """The IPv4 addresses at which others reach this machine, and the network of each."""
    return {
        str(address.ip): address.network
        for verdict in read_verdicts()
        if verdict.is_announced
        for address in verdict.interface.addresses
    }


def addresses_to_announce(host: str) -> list[str]:
    """The addresses at which others reach a listener on ``host``; loopback where this machine has no network."""
    if host == "localhost":
        return [LOOPBACK]
    return [host] if host != EVERY_INTERFACE else list(local_networks()) or [LOOPBACK]


def own_addresses(host: str) -> set[str]:
    """Every address at which this machine itself reaches a listener on ``host``."""
    if host != EVERY_INTERFACE:
        return set(addresses_to_announce(host))
    return {str(address.ip) for verdict in read_verdicts() for address in verdict.interface.addresses}


def multicast_addresses(host: str) -> list[str]:
    """The addresses by whose interfaces mDNS is spoken for a listener on ``host``: those that are announced, and
    loopback, for other nodes of this machine.
    """
    if is_loopback(host):
        return [LOOPBACK]
    own = own_addresses(EVERY_INTERFACE)
    return [address for address in dict.fromkeys([*local_networks(), host, LOOPBACK]) if address in own]
