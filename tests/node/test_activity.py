"""A node is quiet when no forward has run for a while."""

from __future__ import annotations

import asyncio

from flowspec_edge.node.activity import Activity

LONG_S = 30.0


async def test_whoever_never_computed_is_quiet() -> None:
    await asyncio.wait_for(Activity().wait_quiet(LONG_S), 1.0)


async def test_it_is_quiet_so_long_after_the_last_of_all_forwards() -> None:
    activity = Activity()
    with activity.busy():
        waiting = asyncio.create_task(activity.wait_quiet(0.02))
        with activity.busy():
            await asyncio.sleep(0.03)
        await asyncio.sleep(0.03)
        assert not waiting.done(), "the other one runs"
    ended = asyncio.get_running_loop().time()
    await waiting
    assert asyncio.get_running_loop().time() - ended >= 0.02
    assert not asyncio.create_task(activity.wait_quiet(LONG_S)).done()
