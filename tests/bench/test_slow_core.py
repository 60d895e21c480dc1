"""A slower core in the place of the event loop's."""

import asyncio
import time

import pytest

from flowspec_edge.bench.slow_core import slow_core
from flowspec_edge.errors import RequestError

WORK_S = 0.004


async def taken_s() -> float:
    """How long a callback that takes WORK_S of the processor keeps the loop."""

    def work() -> None:
        end_s = time.thread_time() + WORK_S
        while time.thread_time() < end_s:
            pass

    began_s = time.monotonic()
    asyncio.get_running_loop().call_soon(work)
    await asyncio.sleep(0)
    return time.monotonic() - began_s


async def test_callbacks_take_so_many_times_as_long() -> None:
    run = asyncio.Handle._run
    with slow_core(5):
        assert await taken_s() >= 5 * WORK_S
    assert asyncio.Handle._run is run


def test_a_core_that_is_no_slower_changes_nothing() -> None:
    run = asyncio.Handle._run
    with slow_core(1):
        assert asyncio.Handle._run is run


@pytest.mark.parametrize("times", [0.5, 21])
def test_other_cores_are_refused(times: float) -> None:
    with pytest.raises(RequestError, match="--slow-origin is"), slow_core(times):
        pass
