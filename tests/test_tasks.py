"""Errors of threads, and of tasks that end together, keep nothing in memory that was used there."""

import asyncio
import contextlib
import gc
import weakref
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest

from flowspec_edge.errors import StageFailedError
from flowspec_edge.tasks import Jobs, in_thread, run_until_first_ends


class Layers:
    """Something large."""


async def test_an_error_of_a_thread_lets_go_of_what_it_was_raised_over() -> None:
    used: list[weakref.ref[Layers]] = []

    def read() -> None:
        layers = Layers()
        used.append(weakref.ref(layers))
        raise OSError("the card is broken")

    def run() -> None:
        layers = Layers()
        used.append(weakref.ref(layers))
        try:
            read()
        except OSError as cause:
            raise StageFailedError("no forward") from cause

    with ThreadPoolExecutor(1) as executor, pytest.raises(StageFailedError, match="no forward") as failed:
        await in_thread(executor, run)
    assert str(failed.value.__cause__) == "the card is broken"
    assert [layers() for layers in used] == [None, None]


async def test_what_a_function_returns_is_handed_on() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert await in_thread(executor, divmod, 7, 2) == (3, 1)


@pytest.mark.parametrize("end", ["failed", "cancelled", "done"])
async def test_nothing_is_left_of_tasks_that_end_together(end: str) -> None:
    used: list[weakref.ref[Layers]] = []
    began = asyncio.Event()

    async def work(end: str) -> None:
        layers = Layers()
        used.append(weakref.ref(layers))
        if end == "failed":
            raise StageFailedError("no forward")
        if end != "done":
            began.set()
            await asyncio.Event().wait()

    async def owner() -> None:
        layers = Layers()
        used.append(weakref.ref(layers))
        with contextlib.suppress(StageFailedError):
            await run_until_first_ends(work("waits"), work(end))

    gc.collect()
    gc.disable()
    try:
        task = asyncio.create_task(owner())
        if end == "cancelled":
            await began.wait()
            task.cancel()
        await asyncio.wait({task})
        del task
        assert len(used) == 3 and [layers() for layers in used] == [None] * 3
    finally:
        gc.enable()


async def test_a_failure_that_nobody_waits_for_keeps_nothing() -> None:
    class Owner(Layers):
        def __init__(self, executor: Executor) -> None:
            self.jobs = Jobs(executor)

        def fail(self, ended: Future[None]) -> None:
            raise StageFailedError("no link")

    gc.disable()
    try:
        with ThreadPoolExecutor(1) as executor:
            owner = Owner(executor)
            left = weakref.ref(owner)
            owner.jobs.submit(owner.fail, lambda: None)
            with pytest.raises(StageFailedError, match="no link"):
                await owner.jobs.wait_failed()
            owner.jobs.submit(owner.fail, lambda: None)
            del owner
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert left() is None
    finally:
        gc.enable()
