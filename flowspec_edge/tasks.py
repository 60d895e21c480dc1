"""Ways for tasks to end: together with the first of several, by an error of a thread that they wait for, or by Ctrl-C,
also while they block the event loop. And functions on a thread that no task waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, TypeVar

from flowspec_edge.errors import release_frames

_T = TypeVar("_T")


class _FirstEnded(Exception):
    pass


async def run_until_first_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all at once.

    When one returns or fails, cancel the others, wait for them, and raise the error of the first.
    """
    error = await _first_error(coroutines)
    try:
        if error is not None:
            raise error
    finally:
        del error  # it holds this frame


async def _first_error(coroutines: Sequence[Coroutine[Any, Any, None]]) -> BaseException | None:
    """What ended the first of them, where it failed."""

    async def run(coroutine: Coroutine[Any, Any, None]) -> None:
        await coroutine
        raise _FirstEnded

    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(run(coroutine), name=getattr(coroutine, "__qualname__", None))
    except BaseException as ended:
        release_frames(ended)
        del group  # it holds the task that waits here, which may end with this error
        if not isinstance(ended, BaseExceptionGroup):  # all are cancelled
            raise
        first: BaseException = ended.exceptions[0]
        return None if isinstance(first, _FirstEnded) else first
    return None


async def in_thread(executor: Executor, function: Callable[..., _T], *arguments: object) -> _T:
    """What a function returns that runs on a thread.

    Where it fails, the error lets go of the variables there: one of a forward would keep the layers of its stage.
    """
    try:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
    except Exception as error:
        release_frames(error)
        raise


class Jobs:
    """Functions on an executor, each of which is told of on the loop as it ends: one turn of the loop later, where a
    task that waits for it takes three.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor, self._loop = executor, asyncio.get_running_loop()
        self._has_failed = asyncio.Event()
        self._failure: Exception | None = None

    def submit(self, then: Callable[[Future[_T]], None], function: Callable[..., _T], *arguments: object) -> None:
        """Run the function; ``then`` gets what became of it."""
        self._executor.submit(function, *arguments).add_done_callback(partial(self._end, then))

    def _end(self, then: Callable[[Future[_T]], None], ended: Future[_T]) -> None:
        """On the thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody is to be told
            self._loop.call_soon_threadsafe(self._tell, then, ended)

    def _tell(self, then: Callable[[Future[_T]], None], ended: Future[_T]) -> None:
        try:
            then(ended)
        except Exception as error:
            release_frames(error)
            self._failure = self._failure or error
            self._has_failed.set()
        finally:
            del self, then, ended  # an error that nobody waits for would hold this frame, and thereby itself

    async def wait_failed(self) -> None:
        """Until a function has failed, or what was to be done then; raises its error."""
        await self._has_failed.wait()
        failure, self._failure = self._failure, None
        assert failure is not None, "it is set before the event, and raised once"
        raise failure


def expect_done(ended: Future[Any]) -> None:
    """For a job of which nothing is to be told, but where it has failed."""
    if not ended.cancelled():
        ended.result()


async def until_interrupted() -> None:
    """Wait for Ctrl-C or SIGTERM, which is how a command that serves usually ends."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around what blocks the event loop, as reading standard input does: Ctrl-C and SIGTERM raise KeyboardInterrupt in
    it. asyncio heeds them only once the loop goes on.
    """
    heeded = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heeded = {number: handler for number, handler in heeded.items() if handler is not signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in heeded.items():
            signal.signal(number, handler)
            signal.siginterrupt(number, False)  # as asyncio has it
