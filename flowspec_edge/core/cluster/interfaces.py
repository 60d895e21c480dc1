"""Which network interfaces of a machine lead to other machines of its LAN.

What an interface is decides, as the kernel tells it; names mean nothing, since any interface may have any name.
Hardware leads out, and so does what is built on it: a bridge with a port that does, a VLAN, a bond. Loopback, tunnels
and bridges to containers do not. A virtual cable (veth) leads to a container where a machine has hardware as well, and
is the way out of a container, which has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface

_HARDWARE = {"", "dsa", "ipoib", "virt_wifi"}
"""Kinds of what a driver makes: network cards, those of virtual machines too, and the ports of a switch chip."""
_GROUPS = {"bridge", "bond", "team", "batadv", "hsr"}
"""Kinds that lead where their members lead."""
_LAYERS = {"vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "macsec"}
"""Kinds that lead where the one interface below them leads."""
_TUNNELS = {
    *("wireguard", "ovpn", "vxlan", "geneve", "gre", "gretap", "ip6gre", "ip6gretap", "erspan", "ip6erspan", "ipip"),
    *("sit", "ip6tnl", "vti", "vti6", "xfrm", "ppp", "wwan", "rmnet", "gtp", "amt", "bareudp", "lowpan"),
}
"""Kinds that bring packets to somewhere else than the LAN."""
_TUN = "tun"
"""The kind of both tun and tap: a program takes the packets, mostly of a VPN or for a virtual machine."""
_DEAD_ENDS = {"dummy", "ifb", "nlmon", "netdevsim", "vcan", "vrf"}
"""Kinds that lead nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """What the kernel says of one interface.

    ``kind`` is what ``ip -details link`` shows as such; it is empty where a driver made the interface. Where
    ``has_neighbours`` is not set, no others share the link: it is point to point, or knows no ARP. ``master`` is the
    index of the bridge or the like that it is a member of, and ``lower`` that of the interface below it; 0 stands for
    none of this machine. ``num_carrier_changes`` counts each time that the cable came or went.
    """

    index: int
    name: str
    kind: str = ""
    is_up: bool = True
    has_carrier: bool = True
    is_loopback: bool = False
    has_neighbours: bool = True
    addresses: tuple[IPv4Interface, ...] = ()
    master: int = 0
    lower: int = 0
    has_default_route: bool = False
    num_carrier_changes: int = 0

    @property
    def is_hardware(self) -> bool:
        return self.kind in _HARDWARE and not self.is_loopback and self.has_neighbours


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the addresses of an interface are announced; ``why_not`` is empty where they are."""

    interface: Interface
    why_not: str = ""

    @property
    def is_announced(self) -> bool:
        return not self.why_not


def judge(interfaces: Sequence[Interface]) -> list[Verdict]:
    """A verdict for each interface. Announced ones come first, and of these the one with the default route."""
    machine = _Machine(interfaces)
    verdicts = [Verdict(interface, machine.why_not(interface)) for interface in interfaces]
    if not machine.has_hardware and not any(verdict.is_announced for verdict in verdicts):
        # The one way out of a container may be a bridge of its own.
        verdicts = [Verdict(one.interface) if machine.is_last_way_out(one) else one for one in verdicts]
    return sorted(
        verdicts,
        key=lambda verdict: (
            not verdict.is_announced,
            not verdict.interface.has_default_route,
            verdict.interface.index,
        ),
    )


@dataclass(frozen=True, slots=True)
class WayOut:
    """An interface that is announced, as it is now. Where a cable was out and is in again, it is another one."""

    index: int
    name: str
    addresses: tuple[IPv4Interface, ...]
    num_carrier_changes: int

    def __str__(self) -> str:
        return f"{self.name} {' '.join(map(str, self.addresses))}"


def ways_out(verdicts: Sequence[Verdict]) -> list[WayOut]:
    """What others may reach this machine by. As long as it stays equal, nothing needs to be announced anew."""
    announced = (verdict.interface for verdict in verdicts if verdict.is_announced)
    return [WayOut(one.index, one.name, one.addresses, one.num_carrier_changes) for one in announced]


LOOPBACK = "it leads to this machine alone"
DOWN = "it is down"
NO_CARRIER = "no carrier: no cable is in, or no network is joined"
NO_ADDRESS = "no IPv4 address"
DEAD_END = "it leads nowhere"
TUNNEL = "a tunnel or a link to one other side"
CONTAINERS = "a bridge without hardware behind it, to containers or virtual machines"
CABLE = "a virtual cable to a container"


class _Machine:
    """The interfaces of one machine, or of one container, which sees its own alone."""

    def __init__(self, interfaces: Sequence[Interface]) -> None:
        self._interfaces = {interface.index: interface for interface in interfaces}
        self.has_hardware = any(interface.is_hardware for interface in interfaces)

    def why_not(self, interface: Interface) -> str:
        if interface.is_loopback:
            return LOOPBACK
        if not interface.is_up:
            return DOWN
        if interface.kind in _DEAD_ENDS:
            return DEAD_END
        if not self._may_lead_out(interface):
            return TUNNEL
        if not interface.has_carrier:
            return NO_CARRIER
        if not interface.addresses:
            return NO_ADDRESS
        if self._is_on_hardware(interface) or interface.has_default_route:
            return ""
        if interface.kind in _GROUPS:
            return CONTAINERS
        return CABLE if self.has_hardware else ""

    def is_last_way_out(self, verdict: Verdict) -> bool:
        """Whether it is a bridge over virtual cables, and nothing else speaks against it."""
        return verdict.why_not == CONTAINERS and any(member.has_carrier for member in self._members(verdict.interface))

    def _members(self, group: Interface) -> list[Interface]:
        return [member for member in self._interfaces.values() if member.master == group.index]

    def _may_lead_out(self, interface: Interface) -> bool:
        """A container may have a tap for its way out; elsewhere that is a VPN."""
        is_tunnel = interface.kind in _TUNNELS or (interface.kind == _TUN and self.has_hardware)
        return interface.has_neighbours and not is_tunnel

    def _is_on_hardware(self, interface: Interface, above: frozenset[int] = frozenset()) -> bool:
        """Whether it is hardware, or built on some that has a carrier."""
        if interface.index in above:
            return False  # no kernel makes such a circle
        above |= {interface.index}
        if interface.kind in _GROUPS:
            return any(
                member.has_carrier and self._is_on_hardware(member, above) for member in self._members(interface)
            )
        if interface.kind in _LAYERS:
            lower = self._interfaces.get(interface.lower)
            return lower is not None and self._is_on_hardware(lower, above)
        return interface.is_hardware
