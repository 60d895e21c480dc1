"""How tasks end: with the first of those that belong together, or by Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any


class _FirstEnded(Exception):
    pass


async def run_until_first_ends(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all at once; when one returns or fails, cancel the others, wait for them, and raise its error if it has one."""

    async def run(coroutine: Coroutine[Any, Any, None]) -> None:
        await coroutine
        raise _FirstEnded

    try:
        async with asyncio.TaskGroup() as group:
            for coroutine in coroutines:
                group.create_task(run(coroutine), name=getattr(coroutine, "__qualname__", None))
    except BaseExceptionGroup as ended:
        first = ended.exceptions[0]
        if not isinstance(first, _FirstEnded):
            raise first from None


async def until_interrupted() -> None:
    """Wait for Ctrl-C or SIGTERM. For a command that serves, that is the ordinary end and no failure."""
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.Event().wait()
