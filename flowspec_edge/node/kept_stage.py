"""Layers that stay in memory for a while when their ring has ended: the next ring often wants the same ones."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from flowspec_edge.bundle import Bundle
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.net.connection import Link

KEEP_S = 60.0
"""How long: whoever moves a ring, or asks again, comes within seconds; others want the memory."""
ENDING_S = 5.0
"""How long to wait for stages that are ending, before others are loaded beside them: a forward may run to its end."""

Key = tuple[str, int, int, str]
"""Bundle, layers [start, stop), precision."""


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """A runner, the memory that a node reserves for it, and what holds its files."""

    bundle: Bundle
    runner: StageRunner
    memory_bytes: int
    files: ExitStack

    def close(self) -> None:
        """Free it at once: errors that ended it lie in reference cycles, and their tracebacks hold the runner.

        Takes 0.3 ms per MB, so it is not for the event loop.
        """
        self.runner.close()
        self.files.close()


class KeptStage:
    """At most one stage, which gives way to whatever else is to be loaded; its memory counts as free."""

    def __init__(self) -> None:
        self._kept: tuple[Key, LoadedStage] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._uses: dict[Link, asyncio.Event] = {}
        self._freeing: set[asyncio.Future[None]] = set()

    @contextmanager
    def using(self, control: Link) -> Iterator[None]:
        """A stage is loaded for that control link, or is about to be.

        Once the link is closed, whoever asks for another stage waits for the end of this one.
        """
        ended = self._uses[control] = asyncio.Event()
        try:
            yield
        finally:
            ended.set()
            del self._uses[control]

    async def take(self, key: Key) -> LoadedStage | None:
        """The stage, if it is the one that is kept; else nothing is kept any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                for ended in [ended for control, ended in self._uses.items() if not control.is_open]:
                    await ended.wait()
        stage: LoadedStage | None = None
        if self._kept is not None and self._kept[0] == key:
            (_, stage), self._kept = self._kept, None
        self.drop()
        await self.freed()
        return stage

    def keep(self, key: Key, stage: LoadedStage, control: Link) -> None:
        """Keep it for KEEP_S, instead of what was kept before.

        Where another stage was opened while this one ended, it is closed: the other one may count on its memory.
        """
        self.drop()
        if self._is_closed or any(other.is_open for other in self._uses if other is not control):
            self.free(stage)
            return
        self._kept = key, stage
        self._expiry = asyncio.get_running_loop().call_later(KEEP_S, self.drop)

    def drop(self) -> None:
        """Begin to free what is kept."""
        kept, self._kept = self._kept, None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        if kept is not None:
            self.free(kept[1])

    def free(self, stage: LoadedStage) -> None:
        """Begin to free a stage, on a thread."""
        freeing = asyncio.get_running_loop().run_in_executor(None, stage.close)
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)

    async def freed(self) -> None:
        """Until the memory of all that was dropped is back at the system."""
        if self._freeing:
            await asyncio.wait(self._freeing)

    async def close(self) -> None:
        """Free what is kept, and keep nothing any more."""
        self._is_closed = True
        self.drop()
        await self.freed()
