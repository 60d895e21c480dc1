"""What an origin says on its control links before there is a ring: who answers, and who is to open which stage."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn

from flowspec_edge.bundle import Bundle
from flowspec_edge.config import RowKind
from flowspec_edge.core import wire
from flowspec_edge.core.planning.losses import Way
from flowspec_edge.core.planning.placement import LeftOut, StagePlan
from flowspec_edge.core.weights.fetching import Source
from flowspec_edge.errors import (
    FlowspecError,
    NodeUnavailableError,
    OtherKeyError,
    OtherVersionError,
    ProtocolError,
    StageFailedError,
)
from flowspec_edge.net.connection import Link
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.net.link import OPENING, open_link
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.blame import ANSWER_S, stage_loss
from flowspec_edge.origin.measured_links import Peer, measure_pairs, way_as_measured

STAGE_OPEN_S = 300.0
"""How long a stage may take to load its layers: 8 GB from an SD card at 40 MB/s takes 200 s."""

OnFetch = Callable[[StagePlan, int, int], None]
"""Told, while rings open, of a stage's weights how many bytes came and how many were missing."""

OnLost = Callable[[Announcement], None]
"""Told, while rings open, of nodes that do not answer, or no longer."""

OpenTo = Callable[[Announcement], Coroutine[Any, Any, tuple[Link, wire.Welcome]]]
"""Opens a control link to a node."""

_log = logging.getLogger(__name__)


async def welcome_nodes(
    settings: NodeSettings,
    bundle: Bundle,
    found: Sequence[Announcement],
    ring: str,
    closing: contextlib.AsyncExitStack,
    on_lost: OnLost = lambda board: None,
    *,
    is_urgent: bool = False,
) -> tuple[dict[str, Peer], list[LeftOut]]:
    """The nodes that answer and have the bundle or may fetch it, in the order found, and the others with the reason.

    ``on_lost`` is told of nodes that do not answer. Where it ``is_urgent``, nobody waits for who answers late.
    """
    hello, credentials = settings.hello(wire.CONTROL, ring), settings.credentials

    async def open_to(peer: Announcement) -> tuple[Link, wire.Welcome]:
        answer = await open_link(peer.host, peer.port, hello, node=peer.node, credentials=credentials, timeouts=OPENING)
        closing.push_async_callback(answer[0].close)  # at once: whoever waits for the others may be cancelled
        return answer

    peers: dict[str, Peer] = {}
    refused: list[LeftOut] = []
    answers = await _open_all(found, open_to, ANSWER_S if is_urgent else None)
    for announcement, answer in zip(found, answers, strict=True):
        if isinstance(answer, FlowspecError):
            refused.append(LeftOut(announcement.node, str(answer)))
            if not isinstance(answer, OtherKeyError | OtherVersionError):
                on_lost(announcement)
            continue
        link, welcome = answer
        if bundle.digest not in welcome.bundles and not welcome.can_fetch:
            refused.append(LeftOut(welcome.node, _without_bundle(welcome.node, bundle)))
            continue
        peers[welcome.node] = Peer(link, announcement, welcome.free_memory_bytes, welcome.has_half_cache)
    for out in refused:
        _log.warning("%s", out.reason)
    if found and not peers:
        raise NodeUnavailableError(f"none of the {len(found)} nodes found can serve: {refused[0].reason}")
    return peers, refused


async def _open_all(
    found: Sequence[Announcement], open_to: OpenTo, patience_s: float | None
) -> list[tuple[Link, wire.Welcome] | FlowspecError]:
    """Open links to all at once. Those that take longer than ``patience_s`` are given up, unless all of them do."""
    tasks = [asyncio.create_task(open_to(peer), name=f"opening a link to {peer.node}") for peer in found]
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=patience_s)
            if not any(task.done() and task.exception() is None for task in tasks):
                await asyncio.wait(tasks)
    finally:
        for task in tasks:
            task.cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    opened: list[tuple[Link, wire.Welcome] | FlowspecError] = []
    for peer, answer in zip(found, answers, strict=True):
        if isinstance(answer, asyncio.CancelledError):
            opened.append(NodeUnavailableError(f"node {peer.node} did not answer within {patience_s} s"))
        elif isinstance(answer, BaseException) and not isinstance(answer, FlowspecError):
            raise answer
        else:
            opened.append(answer)
    return opened


def _without_bundle(node: str, bundle: Bundle) -> str:
    return (
        f"node {node} does not have this bundle and may not fetch it; start it with --bundle {bundle.directory}, or "
        "without --no-cache"
    )


async def is_there(settings: NodeSettings, board: Announcement) -> bool:
    """Whether the node answers at its address."""
    hello, credentials = settings.hello(wire.CONTROL, ""), settings.credentials
    try:
        link, _ = await open_link(
            board.host, board.port, hello, node=board.node, credentials=credentials, timeouts=OPENING
        )
    except FlowspecError:
        return False
    await link.close()
    return True


async def is_whole(settings: NodeSettings, bundle: Bundle, found: Sequence[Announcement], way: Way) -> bool:
    """Whether messages pass over the way between two nodes, of which one may be the origin's own."""
    async with contextlib.AsyncExitStack() as closing:
        ends = [board for board in found if board.node in way]
        try:
            peers, _ = await welcome_nodes(settings, bundle, ends, "", closing)
        except NodeUnavailableError:
            return False
        if not peers.keys() | {settings.name} >= set(way):
            return False
        return bool(await measure_pairs(settings, peers, [way_as_measured(settings, peers, way)]))


def stage_requests(
    own_name: str,
    own_port: int,
    bundle: Bundle,
    ring: str,
    plans: Sequence[StagePlan],
    controls: Sequence[Link],
    found: Sequence[Announcement],
    row_kind: RowKind = "float32",
) -> list[wire.OpenStage]:
    """What each stage is asked for: its layers, whom it connects to, from whom it may fetch its weights, and how its
    rows leave.

    The last one connects to the origin's own node, of the name ``own_name``, and all may fetch from it.
    """
    addresses = {announcement.node: announcement for announcement in found}
    requests = []
    for hop, (plan, control) in enumerate(zip(plans, controls, strict=True)):
        own = Source(own_name, control.local_host, own_port)
        ahead = own
        if hop + 1 < len(plans):
            next_one = addresses[plans[hop + 1].node]
            ahead = Source(next_one.node, next_one.host, next_one.port)
        texts = source_texts(own, found, plan.node)
        layers = (bundle.digest, plan.start, plan.stop)
        where = (ahead.node, ahead.host, ahead.port)
        requests.append(wire.OpenStage(ring, hop, *layers, *where, texts, plan.precision, row_kind))
    return requests


def source_texts(own: Source, found: Sequence[Announcement], node: str) -> list[str]:
    """From whom ``node`` may fetch weights: the origin itself, and all others."""
    sources = [own, *(Source(peer.node, peer.host, peer.port) for peer in found if peer.node != node)]
    return [source.to_text() for source in sources[: wire.MAX_SOURCES]]


async def open_stages(
    plans: Sequence[StagePlan], controls: Sequence[Link], requests: Sequence[wire.OpenStage], on_fetch: OnFetch
) -> list[wire.StageOpened]:
    """Ask all for their stages at once. The first that fails ends the waiting for the others."""
    for control, request in zip(controls, requests, strict=True):
        control.send(request)
    waiting = [
        asyncio.create_task(_opened(plan, control, on_fetch)) for plan, control in zip(plans, controls, strict=True)
    ]
    try:
        return await asyncio.gather(*waiting)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)


async def _opened(plan: StagePlan, control: Link, on_fetch: OnFetch) -> wire.StageOpened:
    message, num_bytes = await _receive(plan, control), 0
    while isinstance(message, wire.StageProgress):
        if message.num_bytes > num_bytes:
            control.vouch()
        num_bytes = message.num_bytes
        on_fetch(plan, num_bytes, message.total_bytes)
        message = await _receive(plan, control)
    if not isinstance(message, wire.StageOpened):
        raise_failure(plan, message)
    return message


def raise_failure(plan: StagePlan, message: wire.Message) -> NoReturn:
    """A stage said this where it was to say something else.

    Raises:
        RingLostError: it failed.
        ProtocolError: it may not say that now.
    """
    if isinstance(message, wire.StageFailure):
        raise stage_loss(plan, message)
    raise ProtocolError(f"peer {plan.node}: {type(message).__name__} came where StageOpened was expected")


async def _receive(plan: StagePlan, link: Link) -> wire.Message:
    """The next message of a stage that opens; a node that fetches says so often."""
    try:
        async with asyncio.timeout(STAGE_OPEN_S):
            return await link.receive()
    except TimeoutError:
        raise StageFailedError(
            f"node {plan.node}: layers [{plan.start}, {plan.stop}) were not loaded within {STAGE_OPEN_S:.0f} s; "
            "is the disk stuck?"
        ) from None
