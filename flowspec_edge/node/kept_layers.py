"""Layers that are loaded beside the stages that work: those of rings that have ended, for the next ring often wants the
same ones, and those that stand by, for the ring that comes when another board is lost.

A stage is made of what is loaded of its files already, whoever loaded it, and of what it loads itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from flowspec_edge.bundle import Bundle
from flowspec_edge.engine.memory import frugal_allocation
from flowspec_edge.engine.stage_runner import StageRunner
from flowspec_edge.net.connection import Link

KEEP_S = 60.0
"""How long: whoever moves a ring, or asks again, comes within seconds; others want the memory."""
ENDING_S = 5.0
"""How long to wait for stages that are ending, before others are loaded beside them: a forward may run to its end."""


class Closable(Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class LoadedStage:
    """A runner, the memory that a node reserves for it, and what holds its files."""

    bundle: Bundle
    runner: StageRunner
    memory_bytes: int
    files: ExitStack

    def close(self) -> None:
        """Free it at once, whoever still holds it.

        Takes 0.3 ms per MB, so it is not for the event loop.
        """
        self.runner.close()
        self.files.close()


@dataclass(frozen=True, slots=True, eq=False)
class TakenParts:
    """Parts of files, by sha256, on their way from what was loaded to a new runner."""

    parts: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """Let go of them; what no runner has taken is freed, so this is not for the event loop."""
        with frugal_allocation():
            self.parts.clear()


OnGone = Callable[[LoadedStage], None]
"""Told of layers that no longer stand by, before they are freed."""


class KeptLayers:
    """All of it counts as free memory, and gives way to stages."""

    def __init__(self) -> None:
        self._kept: dict[LoadedStage, asyncio.TimerHandle] = {}
        self._standbys: dict[LoadedStage, OnGone] = {}  # in the order in which they were loaded
        self._is_closed = False
        self._uses: dict[Link, asyncio.Event] = {}
        self._freeing: set[asyncio.Future[None]] = set()

    # ------------------------------------------------------------------ stages

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

    async def take(self, wanted: Collection[str]) -> TakenParts:
        """What is loaded of these files, by sha256, for a stage that begins.

        Afterwards nothing is kept any more, and what was taken no longer stands by.
        """
        await self._stages_ended()
        taken = self.loaded(wanted)
        for stage in [stage for stage in self._standbys if not taken.parts.keys().isdisjoint(stage.runner.parts)]:
            self._give_back(stage)
        self.drop()
        await self.freed()
        return taken

    def keep(self, stage: LoadedStage, control: Link) -> None:
        """The stage of that control link has ended; its layers stay loaded for a while.

        Where another stage was opened while this one ended, it is closed: the other one may count on its memory.
        """
        if self._is_closed or any(other.is_open for other in self._uses if other is not control):
            self.free(stage)
            return
        self._kept[stage] = asyncio.get_running_loop().call_later(KEEP_S, self._expire, stage)

    async def _stages_ended(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(ENDING_S):
                for ended in [ended for control, ended in self._uses.items() if not control.is_open]:
                    await ended.wait()

    def _expire(self, stage: LoadedStage) -> None:
        self._kept.pop(stage).cancel()
        self.free(stage)

    # ---------------------------------------------------------------- standbys

    @property
    def standby_bytes(self) -> int:
        """The memory of the layers that stand by."""
        return sum(stage.memory_bytes for stage in self._standbys)

    @property
    def kept_bytes(self) -> int:
        """The memory of what is kept, with that of the stages that it was."""
        return sum(stage.memory_bytes for stage in self._kept)

    def loaded(self, wanted: Collection[str]) -> TakenParts:
        """What is loaded of these files, by sha256; it stays where it is as well."""
        found = TakenParts()
        for stage in (*self._standbys, *self._kept):
            found.parts.update({sha256: part for sha256, part in stage.runner.parts.items() if sha256 in wanted})
        return found

    def stand_by(self, stage: LoadedStage, on_gone: OnGone) -> None:
        """From now on these layers stand by."""
        self._standbys[stage] = on_gone

    def end_standbys(self, stages: Collection[LoadedStage]) -> None:
        """Nobody asks for these standbys any more. They stay loaded for a while."""
        for stage in [stage for stage in stages if stage in self._standbys]:
            del self._standbys[stage]
            if self._is_closed:
                self.free(stage)
            else:
                self._kept[stage] = asyncio.get_running_loop().call_later(KEEP_S, self._expire, stage)

    def make_room(self, free_bytes: int) -> None:
        """Begin to free standbys, the youngest first, until the others fit into the memory that stages leave."""
        while self._standbys and self.standby_bytes > free_bytes:
            self._give_back(next(reversed(self._standbys)))

    def give_back_all(self) -> None:
        """Begin to free all that is kept or stands by."""
        self.drop()
        self.make_room(-1)

    def _give_back(self, stage: LoadedStage) -> None:
        self._standbys.pop(stage)(stage)
        self.free(stage)

    # ----------------------------------------------------------------- freeing

    def drop(self) -> None:
        """Begin to free what is kept."""
        for stage in list(self._kept):
            self._expire(stage)

    def free(self, loaded: Closable) -> None:
        """Begin to free it, on a thread."""
        freeing = asyncio.get_running_loop().run_in_executor(None, loaded.close)
        self._freeing.add(freeing)
        freeing.add_done_callback(self._freeing.discard)

    async def freed(self) -> None:
        """Until the memory of all that was dropped is back at the system."""
        if self._freeing:
            await asyncio.wait(self._freeing)

    async def close(self) -> None:
        """Free all of it, and keep nothing any more."""
        self._is_closed = True
        self.give_back_all()
        await self.freed()
