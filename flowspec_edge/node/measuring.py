"""What an origin asks before it plans, and what a node answers: its layer curves, and the links that it measures."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.line import Line
from flowspec_edge.core.planning.measured import curves_to_text, estimate_hop
from flowspec_edge.errors import FlowspecError, LinkLostError
from flowspec_edge.manifest import Manifest
from flowspec_edge.net.connection import Link
from flowspec_edge.net.link import OPENING, open_link
from flowspec_edge.node.curves import Measurements
from flowspec_edge.node.kept_layers import KeptLayers
from flowspec_edge.node.precision_choice import PrecisionChoice
from flowspec_edge.node.resources import MemoryAccount, NodeSettings
from flowspec_edge.weights.supply import WeightSupply

NUM_ROUND_TRIPS = 10
TRANSFER_BYTES = (2**16, 2**18, 2**20 - 2**16 - 2**18)
"""Probes of growing size, 1 MiB together; the first that takes SLOW_TRANSFER_S is the last."""
SLOW_TRANSFER_S = 0.05
LINK_LIMIT_S = 3.0
"""For all probes of a link, since a first text waits for them. The first transfer takes that long at 0.2 Mbit/s; a
slower link counts as one that just made it."""

ExchangePeers = Callable[[Link, wire.Peers], Awaitable[None]]
"""Takes the addresses that the peer at a link's other end told, and tells ours there."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """Answers on control links, as long as nobody asks for a stage there. A board that is not ``is_measured`` tells no
    curves.
    """

    settings: NodeSettings
    precisions: PrecisionChoice
    memory: MemoryAccount
    kept: KeptLayers
    measurements: Measurements
    supply: WeightSupply
    is_measured: bool
    exchange_peers: ExchangePeers

    async def answer(self, control: Link) -> wire.Message | None:
        """Answer what is asked for a plan, and what peers tell; the first other message, or None at the link's end.

        Raises:
            LinkLostError: the link was lost. ProtocolError: the peer broke the rules.
        """
        num_bytes = 0
        async for message in control:
            try:
                match message:
                    case wire.Peers():
                        await self.exchange_peers(control, message)
                    case wire.MeasureLayers(digest, is_any):
                        control.send(await self._layers(digest, is_any_precision=is_any))
                    case wire.MeasureLink(peer, host, port):
                        control.send(await measure_link(self.settings, peer, host, port))
                    case wire.Probe(payload, is_answered):
                        num_bytes += len(payload)
                        if is_answered:
                            control.send(wire.ProbeAnswer(num_bytes))
                    case _:
                        return message
            except FlowspecError as cause:
                if not control.is_open:
                    raise
                control.send(wire.StageFailure(str(cause)))
            except Exception as cause:  # a bug; whoever plans is not to wait for what will not come
                _log.exception("%s of peer %s cannot be answered", type(message).__name__, control.peer)
                control.send(wire.StageFailure(f"failed, which is a bug in flowspec-edge ({type(cause).__name__})"))
        return None

    async def _layers(self, digest: str, *, is_any_precision: bool) -> wire.LayersMeasured:
        if not self.is_measured:
            return wire.LayersMeasured([], 1000)
        told = self.settings.cores

        def measured(curves: Mapping[str, Line]) -> wire.LayersMeasured:
            texts, cores = curves_to_text(curves), sorted(told.cores)[: wire.MAX_CORES]
            return wire.LayersMeasured(texts, slowdown, told.machine, cores, told.num_threads)

        slowdown = round(await self.measurements.slowdown() * 1000)
        bundle, manifest = self.supply.known(digest)
        if manifest is None:
            return measured({})
        own = self.precisions.of(digest) or manifest.precision
        if not is_any_precision or self.precisions.by_hand is not None:  # its user wants no other one
            manifest.blocks_of(0, manifest.geometry.num_layers, own)  # raises where the bundle has no such precision
            return measured(await self._curves(bundle, manifest, [own]))
        found: dict[str, Line] = {}
        for precision in manifest.precisions:
            try:
                found |= await self._curves(bundle, manifest, [precision])
            except FlowspecError as cause:  # as w8a8 on processors that cannot add bytes up exactly
                _log.info("layers in %s are not offered: %s", precision, cause)
        return measured(found)

    async def _curves(self, bundle: Bundle | None, manifest: Manifest, precisions: Sequence[str]) -> dict[str, Line]:
        """Of these precisions; kept ones, and the others measured where the layers are here."""
        curves: dict[str, Line] = {}
        for precision in precisions:
            line = self.measurements.kept(manifest, precision)
            if line is None and bundle is not None:
                self.kept.give_back_all()  # its memory is wanted
                await self.kept.freed()
                line = await self.measurements.curve(bundle, precision, self.memory.free_bytes)
            if line is not None:
                curves[precision] = line
        return curves


async def measure_link(settings: NodeSettings, peer: str, host: str, port: int) -> wire.LinkMeasured:
    """Latency and rate from the node with these settings to a peer, with at most 1 MiB.

    Raises:
        NodeUnavailableError: the peer cannot be reached, or is not the one that was named.
        LinkLostError: it stopped answering.
    """
    hello = settings.hello(wire.CONTROL, "")
    link, _ = await open_link(host, port, hello, node=peer, credentials=settings.credentials, timeouts=OPENING)
    trips: list[float] = []
    transfers: list[tuple[int, float]] = []
    try:
        async with asyncio.timeout(LINK_LIMIT_S):
            while len(trips) < NUM_ROUND_TRIPS:
                trips.append(await _probe(link, 0))
            for size in TRANSFER_BYTES:
                transfers.append((size, await _probe(link, size)))
                if transfers[-1][1] > SLOW_TRANSFER_S:
                    break
    except TimeoutError:
        if not trips:
            raise LinkLostError(f"peer {peer}: no answer to a probe of the link within {LINK_LIMIT_S:g} s") from None
        transfers.append((TRANSFER_BYTES[len(transfers)], LINK_LIMIT_S))  # the one that did not end
    finally:
        await link.close()
    latency_s, bytes_per_s = estimate_hop(trips, transfers)
    return wire.LinkMeasured(round(latency_s * 1e9), round(bytes_per_s))


async def _probe(link: Link, num_bytes: int) -> float:
    """Seconds until the peer has confirmed so many bytes."""
    began = time.monotonic()
    left = num_bytes
    while left > wire.MAX_PROBE_BYTES:
        link.send(wire.Probe(bytes(wire.MAX_PROBE_BYTES), False))
        left -= wire.MAX_PROBE_BYTES
    link.send(wire.Probe(bytes(left), True))
    wire.expect(await link.receive(), wire.ProbeAnswer, link.peer)
    return time.monotonic() - began
