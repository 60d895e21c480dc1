"""Announcing and browsing over real mDNS on loopback."""

import asyncio
import dataclasses
import secrets
import socket
from collections.abc import Callable
from typing import Any

import pytest
from zeroconf import IPVersion, ServiceStateChange
from zeroconf._dns import DNSAddress, DNSPointer
from zeroconf._protocol.outgoing import DNSOutgoing
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf
from zeroconf.const import _CLASS_IN, _FLAGS_AA, _FLAGS_QR_RESPONSE, _TYPE_A, _TYPE_PTR

from flowspec_edge.core.cluster.address import Address
from flowspec_edge.core.cluster.membership import MembershipEvent, RecordGone, RecordHeard
from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net import discovery
from flowspec_edge.net.auth import derive_credentials
from flowspec_edge.net.discovery import SERVICE_TYPE, Announcement, Announcer, Browser


@pytest.fixture
def cluster() -> str:
    return f"test-{secrets.token_hex(4)}"


def make_announcement(cluster: str, number: int = 1) -> Announcement:
    node = f"{cluster}-pi.{number}"
    return Announcement(
        node=node, host="127.0.0.1", port=40000 + number, cluster=cluster, version="0.1.0", fingerprint="abc"
    )


class Ears:
    """A browser, and what it has heard of one cluster's nodes: names that are there."""

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster
        self._changed = asyncio.Event()
        self.records: dict[str, RecordHeard] = {}

    def __call__(self, event: MembershipEvent) -> None:
        if isinstance(event, RecordGone):
            self.records.pop(event.name, None)
        elif isinstance(event, RecordHeard) and event.node.startswith(self._cluster):
            self.records[event.name] = event
        self._changed.set()

    async def until(self, is_right: Callable[[dict[str, RecordHeard]], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_right(self.records):
                self._changed.clear()
                await self._changed.wait()


async def test_announced_nodes_are_heard_and_missed_after_their_goodbye(cluster: str) -> None:
    ears = Ears(cluster)
    browser = Browser(ears, host="127.0.0.1")
    announcers = [await Announcer.start(make_announcement(cluster, number)) for number in (1, 2, 3)]
    await ears.until(lambda records: len(records) == 3)
    (name,) = (name for name, record in ears.records.items() if record.node.endswith("2"))
    assert name.startswith(f"{cluster}-pi-2-")
    assert ears.records[name] == RecordHeard(
        name, f"{cluster}-pi.2", (Address("127.0.0.1", 40002),), cluster, "abc", "0.1.0"
    )
    await announcers[1].close()
    await ears.until(lambda records: len(records) == 2)
    assert name not in ears.records
    for announcer in announcers[::2]:
        await announcer.close()
    await ears.until(lambda records: not records)
    await browser.close()


async def test_a_node_on_an_ipv6_address_is_heard_there(cluster: str) -> None:
    ears = Ears(cluster)
    browser = Browser(ears, host="::1")
    announcer = await Announcer.start(dataclasses.replace(make_announcement(cluster), host="::1"))
    await ears.until(lambda records: len(records) == 1)
    assert [record.addresses for record in ears.records.values()] == [(Address("::1", 40001),)]
    await announcer.close()
    await browser.close()


async def test_a_hosts_name_cannot_be_announced(cluster: str) -> None:
    with pytest.raises(NodeUnavailableError, match="^mDNS announces addresses, and --host pi-hall is a name; give its"):
        await Announcer.start(dataclasses.replace(make_announcement(cluster), host="pi-hall"))


STRANGERS: list[dict[str, str | bytes]] = [
    {},
    {"node": "x"},
    {"node": b"\xff\xfe", "cluster": "c"},
    {"node": "", "cluster": "c"},
    {"node": "x\r\x1b[2K", "cluster": "c"},
    {"node": "x", "cluster": "c\nnode pi at 10.0.0.1: ready"},
    {"node": "x", "cluster": "c", "version": "\x9b31m"},
    {"node": "x", "cluster": "c", "key": "\u202eabc"},
]


async def _heard_of_strangers() -> set[str]:
    """The names of all records that a browser hears while the strangers and then a node announce themselves."""
    cluster, heard = f"test-{secrets.token_hex(4)}", list[Any]()
    zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    browser = Browser(heard.append, host="127.0.0.1")
    for number, properties in enumerate(STRANGERS):
        name, address = f"stranger-{number}.{SERVICE_TYPE}", socket.inet_aton("127.0.0.1")
        info = AsyncServiceInfo(SERVICE_TYPE, name, port=1, addresses=[address], properties=properties)
        sent = await zeroconf.async_register_service(info, cooperating_responders=True)
    await sent
    announcer = await Announcer.start(make_announcement(cluster))
    async with asyncio.timeout(10):
        while not any(isinstance(record, RecordHeard) and record.cluster == cluster for record in heard):
            await asyncio.sleep(0.01)
    await announcer.close()
    await zeroconf.async_close()
    await browser.close()
    return {record.name for record in heard if isinstance(record, RecordHeard)}


@pytest.fixture(scope="module")
def heard_of_strangers() -> set[str]:
    return asyncio.run(_heard_of_strangers())


@pytest.mark.parametrize("number", range(len(STRANGERS)))
def test_a_strangers_record_is_ignored(heard_of_strangers: set[str], number: int) -> None:
    assert heard_of_strangers
    assert f"stranger-{number}.{SERVICE_TYPE}" not in heard_of_strangers, STRANGERS[number]


async def test_a_name_that_is_none_is_ignored_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Anyone may announce anything, a thousand times a second; zeroconf raises where a name has control characters."""
    heard: list[Any] = []
    browser = Browser(heard.append, host="127.0.0.1")
    for name in ("pi\x1b[2J", "\x00", "x" * 200, "é" * 100, "a.b", ""):
        browser._take_change(
            browser._zeroconf.zeroconf, SERVICE_TYPE, f"{name}.{SERVICE_TYPE}", ServiceStateChange.Added
        )
    tasks = list(browser._asking)
    await asyncio.sleep(0)
    assert any(task.done() for task in tasks) and all(task.exception() is None for task in tasks if task.done())
    await browser.close()
    assert not heard and not caplog.records


async def test_a_flood_of_names_is_forgotten_and_who_is_there_is_heard_again(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zeroconf keeps ten thousand records, those of forged names for 20 minutes at least."""
    monkeypatch.setattr(discovery, "MAX_NAMES", 64)
    ears, num_told = Ears(cluster), 0

    def tell(event: MembershipEvent) -> None:
        nonlocal num_told
        num_told += isinstance(event, RecordHeard) and event.cluster == cluster
        ears(event)

    browser = Browser(tell, host="127.0.0.1")
    announcer = await Announcer.start(make_announcement(cluster))
    await ears.until(lambda records: len(records) == 1)
    forger = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    await forger.zeroconf.async_wait_for_start()
    for number in range(80):
        forged = DNSOutgoing(_FLAGS_QR_RESPONSE | _FLAGS_AA)
        name = DNSPointer(SERVICE_TYPE, _TYPE_PTR, _CLASS_IN, 4500, f"{number}.{SERVICE_TYPE}")
        address = DNSAddress(f"{number}.local.", _TYPE_A, _CLASS_IN, 4500, socket.inet_aton("127.0.0.1"))
        for record in (name, address):
            forged.add_answer_at_time(record, 0)
        forger.zeroconf.async_send(forged)
    assert num_told == 1
    await ears.until(lambda records: num_told == 2 and len(records) == 1)
    for zeroconf in (browser._zeroconf, announcer._zeroconf):
        assert len(zeroconf.zeroconf.cache.cache) <= 64
    await forger.async_close()
    await announcer.close()
    await browser.close()


async def test_a_record_holds_no_secret_and_stays_small(cluster: str) -> None:
    key = bytes(range(20))
    credentials = derive_credentials(key)
    announcement = Announcement(
        node="n" * 100,
        host="127.0.0.1",
        port=40009,
        cluster=cluster,
        version="0.1.0",
        fingerprint=credentials.fingerprint,
    )
    announcer = await Announcer.start(announcement)
    text = announcer._info.text
    assert len(text) < 400
    assert key not in text and key.hex().encode() not in text
    assert credentials.certificate not in text
    assert announcer._info.decoded_properties == {
        "node": "n" * 100,
        "cluster": cluster,
        "version": "0.1.0",
        "key": credentials.fingerprint,
    }
    await announcer.close()


async def test_one_record_brings_only_so_many_addresses() -> None:
    addresses = [socket.inet_aton(f"10.0.0.{number}") for number in range(200)]
    properties = {"node": "x", "cluster": "c"}
    info = AsyncServiceInfo(SERVICE_TYPE, f"x.{SERVICE_TYPE}", port=1, addresses=addresses, properties=properties)
    record = discovery._record_from(info)
    assert record is not None and len(record.addresses) == discovery.MAX_RECORD_ADDRESSES
