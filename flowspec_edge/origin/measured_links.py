"""The links between nodes, as plans count them: measured from either end with the nodes' help, and kept for a day."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec_edge.core import wire
from flowspec_edge.core.planning.losses import Way, way_between
from flowspec_edge.core.planning.measured import hop_from
from flowspec_edge.core.planning.placement import Hop, Plan
from flowspec_edge.errors import FlowspecError, LinkLostError, NodeUnavailableError, StateError
from flowspec_edge.files import read_private, state_directory, write_private
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.measuring import measure_link
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.tasks import run_until_first_ends

HOP_MS = 1.0
"""What a chunk takes on its way beside the link: packing, sockets and event loops at both ends (docs/performance.md,
"In real time"; x86)."""
LINKS_KEPT_S = 24 * 3600.0
"""A link is measured anew after a day; cables and access points change more seldom than that."""

_log = logging.getLogger(__name__)

Report = Callable[[str], None]
_KeptLinks = dict[tuple[str, str], tuple[int, int, int]]  # nanoseconds, bytes per second, when


@dataclass(frozen=True, slots=True)
class Peer:
    """A node that can serve: its control link, its address, and what it offers."""

    link: Link
    address: Announcement
    free_memory_bytes: int
    has_half_cache: bool = False


async def known_links(
    settings: NodeSettings, peers: Mapping[str, Peer], report: Report, *, measures: bool = True
) -> dict[tuple[str, str], Hop]:
    """All pairs of nodes, the origin included: kept ones, and the others measured, no node in two at a time; where
    nothing is to be measured, kept ones alone.

    Raises:
        LinkLostError: a node was lost meanwhile.
    """
    origin = origin_name(settings, peers)
    names = sorted({*peers, origin})
    kept, now = _load_links(), time.time()
    missing = [
        pair
        for pair in itertools.combinations(names, 2)
        if not (pair in kept and 0 <= now - kept[pair][2] < LINKS_KEPT_S)
    ]
    if missing and measures:
        report(f"measuring {len(missing)} link{'s' if len(missing) > 1 else ''} between {len(names)} nodes ...")
        kept |= await _unless_lost(peers, measure_pairs(settings, peers, missing))
    return {pair: _hop_of(kept[pair]) for pair in itertools.combinations(names, 2) if pair in kept}


async def links_now(settings: NodeSettings, peers: Mapping[str, Peer], plan: Plan) -> dict[tuple[str, str], Hop]:
    """The links of a plan's hops, measured anew; the next plan counts them."""
    origin = origin_name(settings, peers)
    known = {*peers, origin}
    ends = [tuple(sorted((hop.start, hop.end))) for hop in plan.hops if {hop.start, hop.end} <= known]
    pairs = [(start, end) for start, end in dict.fromkeys(ends) if start != end]
    return {pair: _hop_of(found) for pair, found in (await measure_pairs(settings, peers, pairs)).items()}


async def measure_pairs(
    settings: NodeSettings, peers: Mapping[str, Peer], pairs: Sequence[tuple[str, str]]
) -> _KeptLinks:
    """The links between these ends, no node in two at a time; kept for the next plans. Those that fail are left out."""
    measured: _KeptLinks = {}
    missing, now = list(pairs), time.time()
    while missing:
        round_, busy = [], set[str]()
        for pair in missing:
            if busy.isdisjoint(pair):
                round_.append(pair)
                busy.update(pair)
        missing = [pair for pair in missing if pair not in round_]
        for pair, found in zip(
            round_, await asyncio.gather(*(_pair(settings, peers, pair) for pair in round_)), strict=True
        ):
            if found is not None:
                measured[pair] = (found.latency_ns, found.bytes_per_s, int(now))
    if measured:
        young = {pair: values for pair, values in _load_links().items() if now - values[2] < LINKS_KEPT_S}
        await asyncio.to_thread(_keep_links, young | measured)
    return measured


async def _unless_lost(peers: Mapping[str, Peer], measuring: Coroutine[Any, Any, _KeptLinks]) -> _KeptLinks:
    """What is measured. A node that is lost meanwhile ends it: whoever measures a link to it would wait for long."""
    measured: _KeptLinks = {}

    async def measure() -> None:
        measured.update(await measuring)

    async def watch(peer: Peer) -> None:
        await peer.link.wait_closed()
        raise LinkLostError(f"peer {peer.address.node} was lost while links were measured")

    await run_until_first_ends(measure(), *map(watch, peers.values()))
    return measured


def _hop_of(kept: tuple[int, int, int]) -> Hop:
    hop = hop_from(*kept[:2])
    return Hop(hop.latency_ms + HOP_MS, hop.ms_per_byte)


def origin_name(settings: NodeSettings, peers: Mapping[str, Peer]) -> str:
    """An origin that serves is a node as any other; another one has a new name at each start, but the same links."""
    return settings.name if settings.name in peers else f"{socket.gethostname()} (origin)"


def way_as_measured(settings: NodeSettings, peers: Mapping[str, Peer], way: Way) -> Way:
    """The way by the name that the origin has in measurements."""
    names = [origin_name(settings, peers) if node == settings.name else node for node in way]
    return way_between(*names)


async def _pair(settings: NodeSettings, peers: Mapping[str, Peer], pair: tuple[str, str]) -> wire.LinkMeasured | None:
    """One link, measured from one of its ends; None, with a warning, where that failed."""
    origin = origin_name(settings, peers)
    start, end = pair if pair[1] != origin else pair[::-1]
    address = peers[end].address
    try:
        if start == origin:
            return await measure_link(settings, end, address.host, address.port)
        link = peers[start].link
        link.send(wire.MeasureLink(end, address.host, address.port))
        answer = await link.receive()
        if isinstance(answer, wire.StageFailure):
            raise NodeUnavailableError(answer.reason)
        return wire.expect(answer, wire.LinkMeasured, start)
    except FlowspecError as cause:
        _log.warning("the link from %s to %s is not measured: %s", start, end, cause)
        return None


def _load_links() -> _KeptLinks:
    kept: _KeptLinks = {}
    try:
        for start, end, latency_ns, bytes_per_s, at in json.loads(read_private(_links_path()) or "[]"):
            kept[str(start), str(end)] = (int(latency_ns), int(bytes_per_s), int(at))
    except (StateError, ValueError, TypeError) as cause:
        _log.warning("kept links are not used: %s", cause)
    return kept


def _keep_links(kept: _KeptLinks) -> None:
    try:
        write_private(_links_path(), json.dumps([[*pair, *values] for pair, values in kept.items()]) + "\n")
    except StateError as cause:
        _log.warning("links are not kept: %s", cause)


def _links_path() -> Path:
    return state_directory() / "links.json"
