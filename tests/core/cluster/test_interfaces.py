"""Which interfaces lead to other machines, on machines as they are: their interfaces as Linux describes them."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Interface

import pytest

from flowspec_edge.core.cluster.interfaces import (
    CABLE,
    CONTAINERS,
    DEAD_END,
    DOWN,
    LOOPBACK,
    NO_ADDRESS,
    NO_CARRIER,
    TUNNEL,
    Interface,
    judge,
    ways_out,
)

LO = "lo loopback 127.0.0.1/8"


def read(lines: str) -> list[Interface]:
    """Interfaces from lines of words: the name first, then what is true of it, in any order."""
    rows = [line.split() for line in lines.strip().splitlines()]
    indexes = {words[0]: index for index, words in enumerate(rows, 1)}
    return [_interface(indexes, *words) for words in rows]


def _interface(indexes: dict[str, int], name: str, *words: str) -> Interface:
    given = dict(word.split("=") for word in words if "=" in word)
    return Interface(
        index=indexes[name],
        name=name,
        kind=given.get("kind", ""),
        is_up="down" not in words,
        has_carrier="no-carrier" not in words and "down" not in words,
        is_loopback="loopback" in words,
        has_neighbours="noarp" not in words,
        addresses=tuple(IPv4Interface(word) for word in words if word[0].isdigit()),
        master=indexes.get(given.get("master", ""), 0),
        lower=indexes.get(given.get("lower", ""), 0),
        has_default_route="default" in words,
    )


def verdicts(lines: str) -> dict[str, str]:
    return {verdict.interface.name: verdict.why_not for verdict in judge(read(lines))}


def announced(lines: str) -> list[str]:
    return addresses_of(read(lines))


def addresses_of(interfaces: Sequence[Interface]) -> list[str]:
    return [str(address.ip) for way in ways_out(judge(interfaces)) for address in way.addresses]


OPENWRT = f"""
{LO}
eth0
lan1 kind=dsa master=br-lan
lan2 kind=dsa master=br-lan no-carrier
wan kind=dsa 203.0.113.7/24 default
phy0-ap0 master=br-lan
br-lan kind=bridge 192.168.1.1/24
pppoe-wan kind=ppp noarp 100.64.3.2/32
"""
OPENWRT_WITH_VLANS = f"""
{LO}
eth0
eth0.1 kind=vlan lower=eth0 master=br-lan
eth0.2 kind=vlan lower=eth0 no-carrier
br-lan kind=bridge 192.168.1.1/24
"""
RASPBERRY_PI = f"""
{LO}
eth0 192.168.1.20/24
wlan0 192.168.1.21/24 default
"""
LAPTOP = f"""
{LO}
enp0s31f6 no-carrier
wlp2s0 192.168.178.33/24 default
virbr0 kind=bridge no-carrier 192.168.122.1/24
docker0 kind=bridge 172.17.0.1/16
veth1a2b3c kind=veth master=docker0
br-5f2c kind=bridge 172.18.0.1/16 no-carrier
tailscale0 kind=tun noarp 100.101.1.2/32
wg0 kind=wireguard noarp 10.8.0.2/24
tap0 kind=tun 10.9.0.2/24
vnet0 kind=tun master=virbr0
dummy0 kind=dummy 10.11.0.1/24
wwan0 kind=wwan 10.20.30.40/30
cni0 kind=bridge 10.42.0.1/24
veth9 kind=veth master=cni0
flannel.1 kind=vxlan 10.42.0.0/32
ifb0 kind=ifb down
"""
JETSON = f"""
{LO}
eth0 192.168.1.40/24 default
l4tbr0 kind=bridge 192.168.55.1/24 no-carrier
rndis0 master=l4tbr0 no-carrier
usb0 master=l4tbr0 no-carrier
docker0 kind=bridge no-carrier 172.17.0.1/16
can0 kind=can noarp down
"""
LXC = f"""
{LO}
eth0 kind=veth 10.0.3.21/24 default
"""
WSL = f"""
{LO}
eth0 172.28.16.2/20 default
docker0 kind=bridge no-carrier 172.17.0.1/16
"""
VIRTUAL_MACHINE = f"""
{LO}
ens3 10.0.2.15/24 default
"""
HYPERVISOR = f"""
{LO}
eno1 master=br0
eno2 master=bond0
eno3 master=bond0
bond0 kind=bond
bond0.7 kind=vlan lower=bond0 10.7.0.2/24
br0 kind=bridge 192.168.1.5/24 default
tap100i0 kind=tun master=br0
macvtap0 kind=macvtap lower=eno1 192.168.1.6/24
"""
OPEN_VSWITCH = f"""
{LO}
ovs-system kind=openvswitch down
eno1 master=ovs-system
br-ex kind=openvswitch 192.168.1.5/24 default
br-int kind=openvswitch 10.5.0.1/24
"""


@pytest.mark.parametrize(
    ("lines", "addresses"),
    [
        (OPENWRT, ["203.0.113.7", "192.168.1.1"]),
        (OPENWRT_WITH_VLANS, ["192.168.1.1"]),
        (RASPBERRY_PI, ["192.168.1.21", "192.168.1.20"]),
        (LAPTOP, ["192.168.178.33"]),
        (JETSON, ["192.168.1.40"]),
        (JETSON.replace(" no-carrier", ""), ["192.168.1.40", "192.168.55.1"]),  # a computer at its USB port
        (LXC, ["10.0.3.21"]),
        (WSL, ["172.28.16.2"]),
        (VIRTUAL_MACHINE, ["10.0.2.15"]),
        (HYPERVISOR, ["192.168.1.5", "10.7.0.2", "192.168.1.6"]),
        (OPEN_VSWITCH, ["192.168.1.5"]),
    ],
)
def test_what_leads_to_the_lan_is_announced_and_nothing_else(lines: str, addresses: list[str]) -> None:
    assert announced(lines) == addresses


def test_each_of_the_others_has_a_reason() -> None:
    assert verdicts(LAPTOP) == {
        "wlp2s0": "",
        "lo": LOOPBACK,
        "enp0s31f6": NO_CARRIER,
        "virbr0": NO_CARRIER,
        "docker0": CONTAINERS,
        "veth1a2b3c": NO_ADDRESS,
        "br-5f2c": NO_CARRIER,
        "tailscale0": TUNNEL,
        "wg0": TUNNEL,
        "tap0": TUNNEL,
        "vnet0": TUNNEL,
        "dummy0": DEAD_END,
        "wwan0": TUNNEL,
        "cni0": CONTAINERS,
        "veth9": NO_ADDRESS,
        "flannel.1": TUNNEL,
        "ifb0": DOWN,
    }


def test_a_laptop_without_its_wifi_announces_none_of_its_bridges_and_tunnels() -> None:
    assert announced(LAPTOP.replace("wlp2s0", "wlp2s0 no-carrier")) == []


def test_a_tunnel_with_the_default_route_is_still_a_tunnel() -> None:
    assert announced(f"{LO}\neth0 192.168.1.9/24\nwg0 kind=wireguard noarp 10.8.0.2/24 default") == ["192.168.1.9"]


def test_a_bridge_leads_where_its_ports_lead_as_long_as_their_cables_are_in() -> None:
    lines = f"{LO}\nbr0 kind=bridge 192.168.1.5/24\neth0 master=br0\nvnet0 kind=tun master=br0"
    assert announced(lines) == ["192.168.1.5"]
    assert verdicts(lines.replace("eth0", "eth0 no-carrier"))["br0"] == CONTAINERS


IN_CONTAINERS = [
    ("eth0 kind=veth 172.17.0.2/16", ["172.17.0.2"]),  # without a router
    ("eth0 kind=veth 172.17.0.2/16 default\nnet1 kind=macvlan 192.168.1.77/24", ["172.17.0.2", "192.168.1.77"]),
    ("eth0 kind=veth 10.0.3.21/24 default\ndocker0 kind=bridge 172.17.0.1/16\nveth1 kind=veth master=docker0",
     ["10.0.3.21"]),
    ("br-lan kind=bridge 192.168.1.1/24\neth0 kind=veth master=br-lan", ["192.168.1.1"]),  # a router in a container
    ("docker0 kind=bridge 172.17.0.1/16", []),
    ("tap0 kind=tun 192.168.1.30/24 default", ["192.168.1.30"]),  # rootless
    ("tun0 kind=tun noarp 10.0.0.1/24 default\neth0 kind=veth 10.0.3.21/24", ["10.0.3.21"]),
    ("eth0 kind=netkit 10.0.3.21/24", ["10.0.3.21"]),
    ("eth0 kind=something-new 10.0.3.21/24", ["10.0.3.21"]),
    ("sit0 kind=sit noarp down\ntunl0 kind=ipip noarp down\neth0 kind=veth 10.0.3.21/24", ["10.0.3.21"]),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "addresses"), IN_CONTAINERS)
def test_a_container_has_virtual_cables_alone_and_announces_them(lines: str, addresses: list[str]) -> None:
    assert announced(f"{LO}\n{lines}") == addresses


def test_beside_hardware_a_virtual_cable_leads_to_a_container_unless_it_has_the_default_route() -> None:
    lines = f"{LO}\neth0 192.168.1.9/24\nveth0 kind=veth 10.3.0.1/24"
    assert verdicts(lines)["veth0"] == CABLE
    assert announced(lines + " default") == ["10.3.0.1", "192.168.1.9"]


@pytest.mark.parametrize("lines", [OPENWRT, OPENWRT_WITH_VLANS, LAPTOP, JETSON, LXC, WSL, HYPERVISOR, OPEN_VSWITCH])
def test_names_decide_nothing(lines: str) -> None:
    for name in ("docker{}", "eth{}", "lo{}"):
        renamed = [replace(interface, name=name.format(interface.index)) for interface in read(lines)]
        assert addresses_of(renamed) == announced(lines)


def test_a_cable_that_was_out_and_is_in_again_is_another_way_out() -> None:
    before = read(RASPBERRY_PI)
    after = [*before[:-1], replace(before[-1], num_carrier_changes=2)]
    assert ways_out(judge(before)) == ways_out(judge(before)) != ways_out(judge(after))
    assert [str(way) for way in ways_out(judge(before))] == ["wlan0 192.168.1.21/24", "eth0 192.168.1.20/24"]


def test_what_is_no_way_out_may_come_and_go_unnoticed() -> None:
    more = LAPTOP + "veth77 kind=veth master=docker0\n"
    assert ways_out(judge(read(LAPTOP))) == ways_out(judge(read(more)))
