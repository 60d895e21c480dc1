"""Announcing and browsing over real mDNS on loopback."""

import secrets
import socket

import pytest
from zeroconf import IPVersion
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from flowspec_edge.errors import NodeUnavailableError
from flowspec_edge.net.discovery import SERVICE_TYPE, Announcement, Announcer, Browser, find_nodes


@pytest.fixture
def cluster():
    return f"test-{secrets.token_hex(4)}"


def make_announcement(cluster, number=1):
    node = f"{cluster}-pi.{number}"
    return Announcement(node=node, host="127.0.0.1", port=40000 + number, cluster=cluster, version="0.1.0")


async def test_announced_nodes_are_found_and_missed_after_their_goodbye(cluster):
    browser = await Browser.start(cluster, is_loopback=True)
    announcements = [make_announcement(cluster, number) for number in (1, 2, 3)]
    announcers = [await Announcer.start(announcement) for announcement in announcements]
    assert await browser.wait_for(lambda found: len(found) == 3, 10) == announcements
    await announcers[0].close()
    assert await browser.wait_for(lambda found: len(found) == 2, 10) == announcements[1:]
    for announcer in announcers[1:]:
        await announcer.close()
    assert await browser.wait_for(lambda found: not found, 10) == []
    await browser.close()


async def test_other_clusters_stay_apart(cluster):
    ours, theirs = make_announcement(cluster, 1), make_announcement(f"{cluster}-other", 2)
    announcers = [await Announcer.start(theirs), await Announcer.start(ours)]
    assert await find_nodes(cluster, is_loopback=True, timeout_s=10, settle_s=0.5) == [ours]
    for announcer in announcers:
        await announcer.close()


STRANGERS = [{}, {"node": "x"}, {"node": b"\xff\xfe", "cluster": "c"}, {"node": "", "cluster": "c"}]


@pytest.mark.parametrize("properties", STRANGERS)
async def test_a_strangers_record_is_ignored(cluster, properties):
    zeroconf = AsyncZeroconf(interfaces=["127.0.0.1"], ip_version=IPVersion.V4Only)
    properties = {key: cluster if value == "c" else value for key, value in properties.items()}
    info = AsyncServiceInfo(
        SERVICE_TYPE,
        f"stranger-{cluster}.{SERVICE_TYPE}",
        port=1,
        addresses=[socket.inet_aton("127.0.0.1")],
        properties=properties,
    )
    await (await zeroconf.async_register_service(info, cooperating_responders=True))
    announcer = await Announcer.start(make_announcement(cluster))
    found = await find_nodes(cluster, is_loopback=True, timeout_s=10, settle_s=0.5)
    assert found == [make_announcement(cluster)]
    await announcer.close()
    await zeroconf.async_close()


async def test_nobody_there_says_what_to_start(cluster):
    with pytest.raises(NodeUnavailableError, match=f"no node of cluster {cluster} .*flowspec node --cluster {cluster}"):
        await find_nodes(cluster, is_loopback=True, timeout_s=0.2)


async def test_fewer_than_asked_for_are_named(cluster):
    announcer = await Announcer.start(make_announcement(cluster))
    with pytest.raises(NodeUnavailableError, match=r"1 of 2 nodes .*pi\.1.*--nodes"):
        await find_nodes(cluster, num_nodes=2, is_loopback=True, timeout_s=3)
    await announcer.close()
