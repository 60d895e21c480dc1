"""Whose fault it is that a ring was lost, or could not be opened."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from flowspec_edge.core import wire
from flowspec_edge.core.planning.placement import StagePlan
from flowspec_edge.errors import FlowspecError, LinkLostError, RingLostError
from flowspec_edge.net.connection import Link

ANSWER_S = 0.75
"""How long a node may take to say that it is there, when that is in doubt: a busy board takes milliseconds. A wrong
guess costs a pause, for a node that answers later is planned with again."""


def stage_loss(plan: StagePlan, failure: wire.StageFailure) -> RingLostError:
    """What a stage said that cannot go on."""
    text = f"node {plan.node}, layers [{plan.start}, {plan.stop}): {failure.reason}"
    if failure.neighbour:
        return RingLostError(text, cut=(plan.node, failure.neighbour))
    return RingLostError(text, failed=plan.node)


async def loss_of(cause: FlowspecError, controls: Sequence[Link], origin: str) -> RingLostError:
    """Why a ring was lost over ``cause``, and by whose fault: all nodes are asked whether they are there.

    A neighbour may tell of a loss before the node's own control link ends, and without it. Whoever is lost explains
    what others have said. ``origin`` is the name of the origin's own node.
    """
    text = f"{cause}; see that all its nodes run (flowspec devices), then repeat the request"
    lost = tuple(link.peer for link in await silent_links(controls))
    failed, cut = (cause.failed, cause.cut) if isinstance(cause, RingLostError) else (None, None)
    if isinstance(cause, LinkLostError) and cause.neighbour:
        cut = origin, cause.neighbour
    loss = RingLostError(text, lost=lost) if lost else RingLostError(text, failed=failed, cut=cut)
    loss.__cause__ = cause.again()
    return loss


async def next_silent(is_in_doubt: asyncio.Event, controls: Sequence[Link]) -> list[Link]:
    """Ask all each time that it is in doubt whether they are there, until some are not; their links are ended."""
    while True:
        await is_in_doubt.wait()
        is_in_doubt.clear()
        if silent := await silent_links(controls):
            return silent


@contextlib.asynccontextmanager
async def asking(controls: Sequence[Link], is_in_doubt: asyncio.Event | None) -> AsyncIterator[None]:
    """Meanwhile ask nodes whether they are there, each time that it is in doubt: whoever waits for one that is not
    sees its link end.
    """
    if is_in_doubt is None:
        yield
        return

    async def ask() -> None:
        while True:
            await next_silent(is_in_doubt, controls)

    task = asyncio.create_task(ask(), name="asking nodes whether they are there")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def silent_links(controls: Sequence[Link]) -> list[Link]:
    """The links that have ended, and those whose peer does not answer in time; these are ended now."""
    answers = await asyncio.gather(*(control.answers(ANSWER_S) for control in controls))
    silent = [control for control, is_there in zip(controls, answers, strict=True) if not is_there]
    for control in silent:
        control.abort()
    return silent
