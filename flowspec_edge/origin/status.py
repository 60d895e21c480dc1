"""What a service tells of itself: whether it can write texts now, its ring, and the boards that are there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowspec_edge.core.rows import Passage

REFRESH_S = 5.0
"""How old what boards said may be before they are asked again; it takes a connection each."""


@dataclass(slots=True)
class StageWork:
    """What a stage has done since its ring was opened. ``waited_s`` is how long chunks waited for it."""

    num_chunks: int = 0
    num_rows: int = 0
    busy_s: float = 0.0
    waited_s: float = 0.0

    def add(self, passage: Passage) -> None:
        self.num_chunks += 1
        self.num_rows += passage.num_rows
        self.busy_s += passage.ran_s
        self.waited_s += passage.waited_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """One stage of the ring that is open: where it is, its layers ``[start, stop)``, and its work."""

    node: str
    address: str
    start: int
    stop: int
    work: StageWork


@dataclass(frozen=True, slots=True)
class KeptStatus:
    """Ended sessions that are kept for prompts that go on from them, and what their caches take on all boards."""

    num_sessions: int = 0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """``reason`` says why no text can be written now, or what the next one waits for; it is empty otherwise.

    ``boards`` are as ``flowspec devices --json`` has them, as of the last time that they were asked. The bytes are
    those of the ring's data links at the origin.
    """

    is_ready: bool
    reason: str
    stages: Sequence[StageStatus] = ()
    boards: Sequence[dict[str, Any]] = ()
    sent_bytes: int = 0
    received_bytes: int = 0
    kept: KeptStatus = KeptStatus()


@dataclass(slots=True)
class BoardWatch:
    """Asks boards what they say of themselves, when somebody wants to know and not more often than is good."""

    ask: Callable[[], Awaitable[Sequence[dict[str, Any]]]]
    _known: Sequence[dict[str, Any]] = ()
    _asked_at: float = float("-inf")
    _asking: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def known(self) -> Sequence[dict[str, Any]]:
        """What they said last. Where that is old, they are asked meanwhile, for the next time."""
        if not self._asking and time.monotonic() - self._asked_at > REFRESH_S:
            self._asked_at = time.monotonic()
            task = asyncio.get_running_loop().create_task(self._refresh(), name="asking boards")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
        return self._known

    async def _refresh(self) -> None:
        self._known = await self.ask()

    async def close(self) -> None:
        for task in self._asking:
            task.cancel()
        if self._asking:
            await asyncio.wait(self._asking)
