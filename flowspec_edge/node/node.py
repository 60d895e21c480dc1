"""A running process: it listens for links, serves layers to whoever opens a stage, and takes in its own rings' returns.

It wires and decides nothing: links, memory, curves, measuring and stages have modules of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flowspec_edge.core import wire
from flowspec_edge.engine.kept_caches import KeptCaches
from flowspec_edge.errors import ClusterKeyError, NodeUnavailableError, ProtocolError
from flowspec_edge.net.addresses import is_loopback
from flowspec_edge.net.auth import Credentials
from flowspec_edge.net.connection import Link
from flowspec_edge.net.directory import Directory, Report
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import LinkServer, open_link
from flowspec_edge.node.activity import Activity
from flowspec_edge.node.arrivals import Arrivals
from flowspec_edge.node.curves import Measurements
from flowspec_edge.node.kept_layers import KeptLayers
from flowspec_edge.node.measuring import Measuring
from flowspec_edge.node.pacing import Board
from flowspec_edge.node.precision_choice import PrecisionChoice
from flowspec_edge.node.resources import MemoryAccount, NodeSettings, OpenStages, unique_name
from flowspec_edge.node.sensor_watch import SensorWatch
from flowspec_edge.node.stage_opening import StageOpener
from flowspec_edge.node.standing_by import stand_by
from flowspec_edge.version import __version__
from flowspec_edge.weights.server import WeightServer
from flowspec_edge.weights.supply import FetchProgress, OnFetch, WeightSupply


class Node:
    """Listens, announces itself, and hosts stages. Made by :meth:`start`."""

    def __init__(self, settings: NodeSettings, board: Board) -> None:
        self.settings = settings
        self.board = board
        self.on_fetch: OnFetch = lambda progress: None
        tls = settings.credentials.client if settings.credentials else None
        self._files = ThreadPoolExecutor(1, thread_name_prefix="files")
        self.supply = WeightSupply(settings.bundles, settings.cache, self._files, tls)
        self.weights = WeightServer(self.supply.find)
        self.kept, self.caches, self.arrivals = KeptLayers(), KeptCaches(), Arrivals()
        self._watch = SensorWatch(settings, activity := Activity())
        self.measurements = Measurements(settings.num_threads, settings.thermometer, lambda: self._watch.slowdown)
        self.precisions, self.memory = PrecisionChoice(settings.precision), MemoryAccount(settings.memory_bytes)
        self._measuring = Measuring(
            settings=settings,
            precisions=self.precisions,
            memory=self.memory,
            kept=self.kept,
            measurements=self.measurements,
            supply=self.supply,
            is_measured=board.is_measured,
            exchange_peers=self._exchange_peers,
        )
        self._stages = StageOpener(
            settings=settings,
            precisions=self.precisions,
            open_stages=OpenStages(),
            memory=self.memory,
            arrivals=self.arrivals,
            kept=self.kept,
            caches=self.caches,
            measurements=self.measurements,
            supply=self.supply,
            board=board,
            watch=self._watch,
            activity=activity,
            on_fetch=self._report_fetch,
        )
        self._server: LinkServer | None = None
        self._directory: Directory | None = None
        self._is_started = asyncio.Event()

    @classmethod
    async def start(cls, settings: NodeSettings, board: Board | None = None, report: Report | None = None) -> Node:
        """Listen and, if wanted, announce and look for peers; ``report`` is told who comes and goes.

        Raises:
            ClusterKeyError: the address can be reached from other machines, and there is no key.
            NodeUnavailableError: the address cannot be listened on.
        """
        if not (is_loopback(settings.host) or settings.credentials or settings.is_insecure):
            raise ClusterKeyError(
                f"node {settings.name}: {settings.host} is open to the network, and there is no cluster key; make one "
                "with flowspec key new, or copy the one of another board with flowspec key set"
            )
        node = cls(settings, board or Board())
        try:
            node._server = await node._listen(settings.port or settings.preferred_port)
        except NodeUnavailableError:
            if settings.port or not settings.preferred_port:
                raise
            node._server = await node._listen(0)  # another node of this machine has it
        node._watch.start()
        if settings.is_announced:
            try:
                node._directory = await Directory.start(
                    settings.neighbourhood, node=settings.name, port=node.port, version=__version__, report=report
                )
            except BaseException:
                await node.close()
                raise
        node._is_started.set()
        return node

    async def _listen(self, port: int) -> LinkServer:
        return await LinkServer.start(
            self.settings.host,
            port,
            self._welcome,
            self._take_link,
            credentials=self.settings.credentials,
            app=self.weights.build_app(),
        )

    async def close(self) -> None:
        """Say goodbye, end every link and stage, stop listening."""
        if self._directory is not None:
            await self._directory.close()
        if self._server is not None:
            await self._server.close()
        await self.kept.close()
        self.weights.close()
        self._files.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._watch.close)
        self.board.close()

    @property
    def port(self) -> int:
        assert self._server is not None
        return self._server.port

    @property
    def announcement(self) -> Announcement:
        settings = self.settings
        return Announcement(
            node=settings.name,
            host=settings.host,
            port=self.port,
            cluster=settings.cluster,
            version=__version__,
            fingerprint=settings.credentials.fingerprint if settings.credentials else "",
        )

    def energy(self) -> wire.EnergyTaken | None:
        """What this board has taken, where it can tell."""
        return self._watch.energy()

    def _welcome(self) -> wire.Welcome:
        thermal = None if self.settings.thermometer is None else self.settings.thermometer()
        energy = self.energy()
        return wire.Welcome(
            self.settings.name,
            __version__,
            self.memory.free_bytes,
            self.supply.digests,
            self.supply.can_fetch,
            self.settings.has_half_cache,
            None if thermal is None else round(thermal.temperature_c),
            None if energy is None else energy.watts,
            None if energy is None else energy.joules,
        )

    async def _exchange_peers(self, link: Link, told: wire.Peers) -> None:
        """Take the addresses that a member told, and tell ours. Whoever is faster than our start waits for it."""
        await self._is_started.wait()
        known = wire.Peers(0, [])
        if self._directory is not None:
            known = self._directory.take_peers(link.peer_host, told)
        link.send(known)

    def _report_fetch(self, progress: FetchProgress) -> None:
        self.on_fetch(progress)

    async def _take_link(self, link: Link) -> None:
        if link.purpose == wire.DATA:
            await self.arrivals.serve(link)
            return
        match await self._measuring.answer(link):
            case None:  # a peer that only wanted to be welcomed, or to measure
                pass
            case wire.OpenStage() as request:
                await self._stages.serve(link, request)
            case wire.PrepareLayers() as request:
                await stand_by(self._stages, link, request)
            case message:
                raise ProtocolError(f"peer {link.peer}: {type(message).__name__} came where OpenStage was expected")


async def ask_nodes(
    found: Sequence[Announcement], cluster: str, credentials: Credentials | None = None
) -> list[dict[str, Any]]:
    """What each node found says of itself: JSON objects with name, address, version, memory, temperature, watts, joules
    since its start, bundles and state.
    """
    hello = wire.Hello(unique_name(), __version__, wire.PROTOCOL_VERSION, wire.CONTROL, "")

    async def ask(peer: Announcement) -> dict[str, Any]:
        device = {"node": peer.node, "address": peer.address, "version": peer.version, "cluster": cluster}
        try:
            link, welcome = await open_link(peer.host, peer.port, hello, node=peer.node, credentials=credentials)
        except NodeUnavailableError as cause:
            nothing = dict.fromkeys(("free_memory_bytes", "temperature_c", "watts", "joules"))
            return {**device, **nothing, "bundles": [], "state": str(cause)}
        await link.close()
        return {
            **device,
            "free_memory_bytes": welcome.free_memory_bytes,
            "temperature_c": welcome.temperature_c,
            "watts": welcome.watts,
            "joules": welcome.joules,
            "bundles": welcome.bundles,
            "state": "ready",
        }

    return list(await asyncio.gather(*(ask(peer) for peer in found)))
