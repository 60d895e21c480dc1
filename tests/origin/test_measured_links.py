"""Links are measured in pairs, no node in two at a time, from an end that is a node; and kept for a day."""

from __future__ import annotations

import asyncio
import itertools
import json
import pathlib
import time
from types import SimpleNamespace
from typing import Any

import pytest

from flowspec_edge.core import wire
from flowspec_edge.errors import LinkLostError, NodeUnavailableError
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin import measured_links
from flowspec_edge.origin.measured_links import HOP_MS, Peer, known_links, links_now, origin_name, way_as_measured
from tests.fake_links import FakeLink, fake_pair, settle
from tests.narrowing import instance

MEASURED = wire.LinkMeasured(2_000_000, 10**8)
PEERS = ("attic", "cellar", "hall")


class Network:
    """Peers that measure links when they are asked; ``measured`` are the pairs, ``busy`` who is at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str = "origin") -> None:
        self.settings = NodeSettings(name=name, cluster="test")
        self.peers: dict[str, Peer] = {}
        self.measured: list[tuple[str, str]] = []
        self.busy: list[str] = []
        self.said: list[str] = []
        self.failing: set[str] = set()
        self.silent: set[str] = set()  # whom nobody can measure a link to, and nobody says so
        self.tasks = []
        monkeypatch.setattr(measured_links, "measure_link", self._measure_here)
        for number, peer in enumerate(PEERS):
            near, far = fake_pair("origin", peer)
            address = Announcement(
                node=peer, host=f"192.0.2.{number}", port=7361, cluster="test", version="0.1.0", fingerprint=""
            )
            self.peers[peer] = Peer(near, address, 0)
            self.tasks.append(asyncio.create_task(self._serve(peer, far)))

    async def _serve(self, start: str, control: Any) -> None:
        async for message in control:
            try:
                control.send(await self._measure(start, message.node))
            except NodeUnavailableError as cause:
                control.send(wire.StageFailure(str(cause)))

    async def _measure_here(self, settings: NodeSettings, peer: str, host: str, port: int) -> wire.LinkMeasured:
        assert (host, port) == (self.peers[peer].address.host, 7361)
        return await self._measure("here", peer)

    async def _measure(self, start: str, end: str) -> wire.LinkMeasured:
        assert start not in self.busy and end not in self.busy, "a node in two measurements at a time"
        self.busy += [start, end]
        await settle()
        self.busy = [name for name in self.busy if name not in (start, end)]
        if end in self.silent or start in self.silent:
            await asyncio.Event().wait()
        if end in self.failing:
            raise NodeUnavailableError(f"peer {end} cannot be reached")
        self.measured.append((start, end))
        return MEASURED

    async def known(self) -> Any:
        return await known_links(self.settings, self.peers, self.said.append)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)


@pytest.fixture
async def network(monkeypatch: pytest.MonkeyPatch) -> Any:
    network = Network(monkeypatch)
    yield network
    await network.close()


async def test_all_pairs_are_measured_once_and_kept_for_a_day(network: Network, state: pathlib.Path) -> None:
    origin = origin_name(network.settings, network.peers)
    assert origin.endswith(" (origin)")
    hops = await network.known()
    assert list(hops) == list(itertools.combinations(sorted([*PEERS, origin]), 2))
    assert all(hop.latency_ms == 2.0 + HOP_MS for hop in hops.values())
    assert len(network.measured) == 6 and network.said == ["measuring 6 links between 4 nodes ..."]
    assert await network.known() == hops and len(network.measured) == 6
    path = state / "links.json"
    young = json.loads(path.read_text())
    old = [[*link[:4], link[4] - measured_links.LINKS_KEPT_S - 1] if link[0] == "attic" else link for link in young]
    path.write_text(json.dumps(old))
    network.measured.clear()
    await network.known()
    assert len(network.measured) == sum(link[0] == "attic" for link in young)


async def test_in_haste_nothing_is_measured(network: Network) -> None:
    assert await known_links(network.settings, network.peers, network.said.append, measures=False) == {}
    assert not network.measured and not network.said
    hops = await network.known()
    assert await known_links(network.settings, network.peers, network.said.append, measures=False) == hops


async def test_a_node_that_is_lost_meanwhile_ends_the_measuring(network: Network) -> None:
    """Others would wait long for an answer of it."""
    network.silent = {"cellar"}
    known = asyncio.ensure_future(network.known())
    await settle()
    assert not known.done()
    instance(network.peers["cellar"].link, FakeLink).cut()
    with pytest.raises(LinkLostError, match="cellar was lost while links were measured"):
        await known


async def test_a_way_has_the_name_of_the_origin_that_links_have(network: Network) -> None:
    origin = origin_name(network.settings, network.peers)
    assert way_as_measured(network.settings, network.peers, ("hall", "origin")) == tuple(sorted(("hall", origin)))
    assert way_as_measured(network.settings, network.peers, ("attic", "hall")) == ("attic", "hall")


async def test_an_origin_that_serves_is_a_node_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(monkeypatch, name="hall")
    hops = await network.known()
    assert list(hops) == list(itertools.combinations(PEERS, 2))
    assert sorted(network.measured) == [("attic", "cellar"), ("here", "attic"), ("here", "cellar")]
    await network.close()


async def test_a_link_that_cannot_be_measured_is_left_out_and_not_kept(
    network: Network, caplog: pytest.LogCaptureFixture
) -> None:
    network.failing.add("cellar")
    hops = await network.known()
    assert ("attic", "cellar") not in hops and ("attic", "hall") in hops
    assert "the link from attic to cellar is not measured: peer cellar cannot be reached" in caplog.text
    network.failing.clear()
    assert ("attic", "cellar") in await network.known()


async def test_the_links_of_a_plan_are_measured_anew(network: Network) -> None:
    await network.known()
    network.measured.clear()
    ends = [("attic", "hall"), ("hall", "attic"), ("attic", "attic"), ("hall", "gone")]
    plan: Any = SimpleNamespace(hops=[SimpleNamespace(start=start, end=end) for start, end in ends])
    assert list(await links_now(network.settings, network.peers, plan)) == [("attic", "hall")]
    assert network.measured == [("attic", "hall")]


async def test_a_file_that_is_broken_is_as_good_as_none(network: Network, state: pathlib.Path) -> None:
    await network.known()
    (state / "links.json").write_text(json.dumps([["attic", "cellar", "soon"], time.time()]))
    network.measured.clear()
    assert len(await network.known()) == len(network.measured) == 6
