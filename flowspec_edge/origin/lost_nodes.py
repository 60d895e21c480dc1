"""Keeps which nodes were lost, and greets them until they are back. ``core/planning/recovery.py`` decides."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning import recovery as rc
from flowspec_edge.files import open_record
from flowspec_edge.net.discovery import Announcement


class LostNodes:
    """The nodes that are not to be planned with. ``greet`` tells whether one answers; ``on_back`` is told of one that
    may serve again.

    ``close`` ends the greetings.
    """

    def __init__(
        self, greet: Callable[[Announcement], Awaitable[bool]], on_back: Callable[[Announcement], None]
    ) -> None:
        self._greet, self._on_back = greet, on_back
        self._core = rc.LostNodes()
        self._journal = Journal("lost_nodes", {}, open_record("lost_nodes"))
        self._boards: dict[str, Announcement] = {}  # where each was when it was lost
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def names(self) -> frozenset[str]:
        return self._core.nodes

    def lose(self, boards: Iterable[Announcement]) -> None:
        """These nodes do not answer, or no longer."""
        lost = {board.node: board for board in boards}
        self._boards |= lost
        self._tell(rc.NodesLost(frozenset(lost)))

    def fail_if_known(self, node: str | None, boards: Iterable[Announcement]) -> None:
        """The stage of this node failed, where one is named; the node itself answers."""
        for board in boards:
            if board.node == node:
                self._boards[node] = board
                self._tell(rc.StageFailed(node))

    def left_of(self, found: Sequence[Announcement]) -> list[Announcement]:
        """Those that were not lost. One that is found at another address has been started anew."""
        return [board for board in found if board.node not in self.names or self._is_elsewhere(board)]

    def _is_elsewhere(self, board: Announcement) -> bool:
        lost = self._boards[board.node]
        return (board.host, board.port) != (lost.host, lost.port)

    def _tell(self, event: rc.LossEvent) -> None:
        for action in self._journal.handle(self._core, event, time.monotonic()):
            match action:
                case rc.GreetNode(node):
                    task = asyncio.get_running_loop().create_task(self._ask(node), name=f"greeting {node}")
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case rc.UseNode(node):
                    self._on_back(self._boards[node])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (deadline := self._core.next_deadline()) is not None:
            delay = max(deadline - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tell, rc.TimePassed())

    async def _ask(self, node: str) -> None:
        is_back = await self._greet(self._boards[node])
        self._tell(rc.NodeAnswered(node) if is_back else rc.NodeSilent(node))
