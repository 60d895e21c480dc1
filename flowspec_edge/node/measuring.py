"""What a node measures of itself and of its links, once, and keeps; and how it answers an origin that asks.

A layer's curve is measured with a few of the model's own layers, and kept by everything that it depends on: the shape of a
layer, precision, threads, runtime. A node that has no layers yet learns it from the first forwards that it runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec_edge.bundle import Bundle
from flowspec_edge.core import wire
from flowspec_edge.core.device.throttling import StepWatch, ThermalReport
from flowspec_edge.core.planning.measured import curves_to_text, estimate_hop
from flowspec_edge.core.planning.placement import TimeLine, stage_memory_bytes
from flowspec_edge.core.speculation.pipeline import LineFit
from flowspec_edge.engine.timing import RUNTIME, StageUnderTest, fit_line
from flowspec_edge.errors import FlowspecError, LinkLostError, ProtocolError, StateError
from flowspec_edge.files import read_private, state_directory, write_private
from flowspec_edge.manifest import Manifest
from flowspec_edge.net.link import Link, open_link

if TYPE_CHECKING:
    from flowspec_edge.node.node import Node

MAX_BLOCKS = 4
"""So many blocks are measured together: a single one of a small model drowns in what a run costs by itself."""
LAYER_SIZES = (1, 4, 16, 64)
SIZE_LIMIT_S = 1.5
"""Time for each size: a slow board runs fewer repeats."""
LEARN_FORWARDS = 20
"""Forwards from which a curve can be learned; chunks of several sizes are among them."""
NUM_ROUND_TRIPS = 10
TRANSFER_BYTES = (2**16, 2**18, 2**20 - 2**16 - 2**18)
"""Probes of growing size, 1 MiB together; the first that takes SLOW_TRANSFER_S is the last."""
SLOW_TRANSFER_S = 0.05
LINK_LIMIT_S = 15.0
"""For all probes of a link: 64 KB at 0.1 Mbit/s take 5 s."""

Thermometer = Callable[[], ThermalReport | None]
"""How hot the board is; None where it does not say."""

_log = logging.getLogger(__name__)


class Measurements:
    """A node's curves, in its state directory, and how far its board is from them at present."""

    def __init__(self, num_threads: int, thermometer: Thermometer | None = None) -> None:
        self._num_threads = num_threads
        self._thermometer = thermometer
        self._busy = asyncio.Lock()
        self._watch: StepWatch | None = None  # of the last stage that ran

    async def slowdown(self) -> float:
        """How many times its curve this board takes at present."""
        thermal = await asyncio.to_thread(self._thermometer) if self._thermometer is not None else None
        return (self._watch or StepWatch()).slowdown(time.monotonic(), thermal)

    def kept(self, manifest: Manifest, precision: str) -> TimeLine | None:
        """The curve of one layer of this model, where it is known. A file that cannot be read is as good as none."""
        try:
            text = read_private(self._path(manifest, precision))
            found = json.loads(text) if text is not None else None
            line = TimeLine(float(found["fixed_ms"]), float(found["row_ms"])) if found is not None else None
        except (StateError, ValueError, KeyError, TypeError) as cause:
            _log.warning("a kept layer curve is not used: %s", cause)
            return None
        return line if line is not None and line.at(1) > 0 and min(line.fixed_ms, line.row_ms) >= 0 else None

    async def curve(self, bundle: Bundle, precision: str, free_bytes: int) -> TimeLine:
        """The curve of one layer, measured where it is not known; that takes some seconds, once."""
        async with self._busy:
            line = self.kept(bundle.manifest, precision)
            if line is None:
                line = await asyncio.to_thread(self._measure, bundle, precision, free_bytes)
                await asyncio.to_thread(self.keep, bundle.manifest, precision, line, "measured")
        return line

    def keep(self, manifest: Manifest, precision: str, line: TimeLine, how: str) -> None:
        """For the next time; a full disk is no reason not to go on now."""
        found: dict[str, float | str] = {"fixed_ms": line.fixed_ms, "row_ms": line.row_ms, "model": manifest.name}
        found |= {"precision": precision, "how": how, "date": time.strftime("%Y-%m-%d")}
        try:
            write_private(self._path(manifest, precision), json.dumps(found) + "\n")
        except StateError as cause:
            _log.warning("a layer curve is not kept: %s", cause)

    def recorder(self, manifest: Manifest, precision: str | None, num_layers: int) -> StageRecorder:
        """Takes in the forwards of a stage that begins."""
        precision = precision or manifest.precision
        line = self.kept(manifest, precision)
        self._watch = StepWatch()
        return StageRecorder(self, manifest, precision, num_layers, line, self._watch)

    def _measure(self, bundle: Bundle, precision: str, free_bytes: int) -> TimeLine:
        blocks = bundle.manifest.blocks_of(0, bundle.manifest.geometry.num_layers, precision)[:MAX_BLOCKS]
        while len(blocks) > 1 and stage_memory_bytes(blocks) > free_bytes:
            blocks = blocks[:-1]
        num_layers = blocks[-1].stop
        _log.info("measuring %d layers of %s in %s", num_layers, bundle.manifest.name, precision)
        stage = StageUnderTest(bundle.directory, bundle.manifest, 0, num_layers, self._num_threads, precision)
        times = [stage.time_ms(size, SIZE_LIMIT_S) for size in LAYER_SIZES]
        return TimeLine(*fit_line(LAYER_SIZES, times)).scaled(1 / num_layers)

    def _path(self, manifest: Manifest, precision: str) -> Path:
        shape = manifest.geometry
        sizes = (shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads, shape.head_dim)
        what = (manifest.architecture, precision, *sizes, self._num_threads, RUNTIME, platform.machine())
        return state_directory() / "curves" / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


@dataclass(slots=True)
class StageRecorder:
    """One stage's forwards: held against the known curve, or learned from where there is none."""

    measurements: Measurements
    manifest: Manifest
    precision: str
    num_layers: int
    line: TimeLine | None
    watch: StepWatch
    _fit: LineFit = field(default_factory=LineFit)
    _sizes: set[int] = field(default_factory=set)
    _num_forwards: int = 0

    def add(self, num_rows: int, ran_s: float) -> None:
        """A forward that was not given up."""
        if self.line is not None:
            self.watch.observe(self.line.at(num_rows) * self.num_layers, ran_s * 1000, time.monotonic())
            return
        self._num_forwards += 1
        self._sizes.add(num_rows)
        self._fit.add(num_rows, ran_s * 1000 / self.num_layers)

    async def finish(self) -> None:
        """The stage has ended: keep what was learned."""
        if self._num_forwards >= LEARN_FORWARDS and len(self._sizes) > 1:
            line = TimeLine(self._fit.fixed, self._fit.slope)
            await asyncio.to_thread(self.measurements.keep, self.manifest, self.precision, line, "learned")


async def answer_measuring(node: Node, control: Link) -> wire.Message | None:
    """Answer what is asked for a plan, and what peers tell; gives the first other message, or None at the link's end."""
    num_bytes = 0
    async for message in control:
        try:
            match message:
                case wire.Peers():
                    await node.exchange_peers(control, message)
                case wire.MeasureLayers(digest, is_any):
                    control.send(await _layers(node, digest, is_any_precision=is_any))
                case wire.MeasureLink(peer, host, port):
                    control.send(await measure_link(node, peer, host, port))
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
    return None


async def _layers(node: Node, digest: str, *, is_any_precision: bool) -> wire.LayersMeasured:
    measurements = node.measurements
    if not node.board.is_measured:
        return wire.LayersMeasured([], 1000)
    slowdown = round(await measurements.slowdown() * 1000)
    bundle, manifest = node.supply.known(digest)
    if manifest is None:
        return wire.LayersMeasured([], slowdown)
    own = node.precision_of(digest) or manifest.precision
    if not is_any_precision or node.settings.precision is not None:  # its user wants no other one
        manifest.blocks_of(0, manifest.geometry.num_layers, own)  # raises where the bundle has no such precision
        return wire.LayersMeasured(curves_to_text(await _curves(node, bundle, manifest, [own])), slowdown)
    found: dict[str, TimeLine] = {}
    for precision in manifest.precisions:
        try:
            found |= await _curves(node, bundle, manifest, [precision])
        except FlowspecError as cause:  # as w8a8 on processors that cannot add bytes up exactly
            _log.info("layers in %s are not offered: %s", precision, cause)
    return wire.LayersMeasured(curves_to_text(found), slowdown)


async def _curves(
    node: Node, bundle: Bundle | None, manifest: Manifest, precisions: Sequence[str]
) -> dict[str, TimeLine]:
    """Of these precisions; kept ones, and the others measured where the layers are here."""
    curves: dict[str, TimeLine] = {}
    for precision in precisions:
        line = node.measurements.kept(manifest, precision)
        if line is None and bundle is not None:
            node.kept.drop()  # its memory is wanted
            line = await node.measurements.curve(bundle, precision, node.free_bytes)
        if line is not None:
            curves[precision] = line
    return curves


async def measure_link(node: Node, peer: str, host: str, port: int) -> wire.LinkMeasured:
    """Latency and rate from this node to a peer, with at most 1 MiB.

    Raises:
        NodeUnavailableError: the peer cannot be reached, or is not the one that was named.
        LinkLostError: it stopped answering.
    """
    hello = node.hello(wire.CONTROL, "")
    link, _ = await open_link(host, port, hello, node=peer, credentials=node.settings.credentials)
    try:
        async with asyncio.timeout(LINK_LIMIT_S):
            trips = [await _probe(link, 0) for _ in range(NUM_ROUND_TRIPS)]
            transfers: list[tuple[int, float]] = []
            for size in TRANSFER_BYTES:
                transfers.append((size, await _probe(link, size)))
                if transfers[-1][1] > SLOW_TRANSFER_S:
                    break
    except TimeoutError:
        raise LinkLostError(
            f"peer {peer}: the link to it was not measured within {LINK_LIMIT_S:.0f} s; is the network that slow?"
        ) from None
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
    answer = await link.receive()
    if not isinstance(answer, wire.ProbeAnswer):
        raise ProtocolError(f"peer {link.peer}: {type(answer).__name__} came where ProbeAnswer was expected")
    return time.monotonic() - began
