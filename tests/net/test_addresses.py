"""What the system says of its interfaces, and what follows for a listener."""

import asyncio
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Interface
from typing import Any

import pytest

from flowspec_edge.core.cluster.interfaces import Interface, judge
from flowspec_edge.net import addresses, network_watch, rtnetlink
from flowspec_edge.net.addresses import addresses_to_announce, multicast_addresses, own_addresses, read_verdicts
from flowspec_edge.net.network_watch import NetworkWatch
from tests.lan import ip

READ = """
import dataclasses, json
from flowspec_edge.net.addresses import addresses_to_announce, multicast_addresses
from flowspec_edge.net.rtnetlink import read_interfaces
told = [dataclasses.asdict(interface) for interface in read_interfaces()]
print(json.dumps([told, addresses_to_announce("0.0.0.0"), multicast_addresses("0.0.0.0")], default=str))
"""


@pytest.fixture
def namespace(lan_is_possible: None) -> Iterator[str]:
    name = f"fs{os.getpid()}-cards"
    ip("netns", "add", name)
    yield name
    ip("netns", "del", name)


def read_inside(namespace: str) -> tuple[dict[str, dict[str, Any]], list[str], list[str]]:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-c", READ]
    told, announced, spoken = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {interface["name"]: interface for interface in told}, announced, spoken


@pytest.mark.slow
def test_the_kernel_tells_what_each_interface_is(namespace: str) -> None:
    for arguments in (
        ("link", "set", "lo", "up"),
        ("link", "add", "wide", "type", "bridge"),
        ("link", "add", "port", "type", "veth", "peer", "name", "far"),
        ("link", "set", "port", "master", "wide", "up"),
        ("link", "set", "far", "up"),
        ("link", "set", "wide", "up"),
        ("link", "add", "link", "far", "name", "seven", "type", "macvlan"),
        ("address", "add", "10.1.0.1/16", "dev", "wide"),
        ("address", "add", "10.2.0.1/24", "dev", "far"),
        ("address", "add", "10.2.0.2/24", "dev", "far"),
        ("route", "add", "default", "via", "10.2.0.9"),
        ("route", "add", "default", "dev", "wide", "metric", "9", "table", "77"),
    ):
        ip(*arguments, inside=namespace)
    found, announced, spoken = read_inside(namespace)
    assert {name: found[name]["kind"] for name in ("lo", "wide", "port", "far", "seven")} == {
        **{"lo": "", "wide": "bridge", "port": "veth", "far": "veth", "seven": "macvlan"}
    }
    assert found["port"]["master"] == found["wide"]["index"]
    assert found["seven"]["lower"] == found["far"]["index"]
    assert found["far"]["addresses"] == ["10.2.0.1/24", "10.2.0.2/24"]
    assert [name for name, one in found.items() if one["has_default_route"]] == ["far"]
    assert [name for name, one in found.items() if one["is_loopback"]] == ["lo"]
    assert (found["seven"]["is_up"], found["far"]["is_up"], found["far"]["has_carrier"]) == (False, True, True)
    assert announced == ["10.2.0.1", "10.2.0.2"]
    assert spoken == ["10.2.0.1", "10.2.0.2", "127.0.0.1"]
    before = found["far"]["num_carrier_changes"]
    ip("link", "set", "port", "down", inside=namespace)
    found, announced, spoken = read_inside(namespace)
    assert (found["far"]["has_carrier"], found["far"]["num_carrier_changes"]) == (False, before + 1)
    assert (announced, spoken) == (["127.0.0.1"], ["127.0.0.1"]), "nothing else leads anywhere"


def test_a_system_that_does_not_tell_is_asked_for_names_and_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {str(address) for verdict in read_verdicts() for address in verdict.interface.addresses}

    def refuse(**_: object) -> None:
        raise OSError(1, "no netlink here")

    monkeypatch.setattr(rtnetlink, "open_socket", refuse)
    verdicts = read_verdicts()
    assert {str(address) for verdict in verdicts for address in verdict.interface.addresses} == told
    assert not any(verdict.is_announced for verdict in verdicts if verdict.interface.is_loopback)


def test_where_a_listener_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def card(index: int, *own: str, **facts: Any) -> Interface:
        return Interface(index=index, name=f"card{index}", addresses=tuple(map(IPv4Interface, own)), **facts)

    cards = [
        card(1, "127.0.0.1/8", is_loopback=True),
        card(2, "192.168.1.5/24"),
        card(3, "10.8.0.2/24", kind="wireguard", has_neighbours=False),
    ]
    monkeypatch.setattr(addresses, "read_verdicts", lambda: judge(cards))
    assert addresses_to_announce("0.0.0.0") == ["192.168.1.5"]
    assert addresses_to_announce("10.8.0.2") == ["10.8.0.2"], "the user has chosen it"
    assert addresses_to_announce("localhost") == ["127.0.0.1"]
    assert multicast_addresses("0.0.0.0") == ["192.168.1.5", "127.0.0.1"]
    assert multicast_addresses("10.8.0.2") == ["192.168.1.5", "10.8.0.2", "127.0.0.1"]
    assert multicast_addresses("127.0.0.1") == ["127.0.0.1"]
    assert own_addresses("0.0.0.0") == {"127.0.0.1", "192.168.1.5", "10.8.0.2"}
    del cards[1:]
    assert addresses_to_announce("0.0.0.0") == ["127.0.0.1"]


@pytest.mark.parametrize("data", [b"\0" * 64, b"\xff" * 64, struct.pack("=IHHII", 15, 16, 0, 0, 0) + b"\2\0\0\0" * 9])
def test_an_answer_that_makes_no_sense_ends(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([data] * 3)

    class Kernel:
        def __enter__(self) -> "Kernel":
            return self

        def __exit__(self, *_: object) -> None: ...
        def settimeout(self, _: float) -> None: ...
        def send(self, _: bytes) -> None: ...
        def recv(self, _: int) -> bytes:
            try:
                return next(answers)
            except StopIteration:
                raise TimeoutError from None

    monkeypatch.setattr(rtnetlink, "open_socket", Kernel)
    assert read_verdicts(), "the portable way is left"


async def test_a_machine_that_has_slept_looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_watch, "WATCH_S", 0.01)
    asleep_s = 0.0
    monkeypatch.setattr(network_watch, "_slept_s", lambda: asleep_s)
    watch = NetworkWatch()
    assert not await watch.wait()
    asleep_s = 3600.0
    assert await watch.wait()
    assert not await watch.wait()
    watch.close()


async def test_without_netlink_a_change_is_looked_for_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise OSError(1, "no netlink here")

    monkeypatch.setattr(rtnetlink, "open_socket", refuse)
    monkeypatch.setattr(network_watch, "WATCH_S", 0.01)
    watch = NetworkWatch()
    async with asyncio.timeout(5):
        assert not await watch.wait()
    watch.close()
