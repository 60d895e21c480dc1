"""Keeps which nodes were lost and which ways are cut, and tries them until they are back. ``core/planning/losses.py``
decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence

from flowspec_edge.core.journal import Journal
from flowspec_edge.core.planning import losses as ls
from flowspec_edge.files import open_record
from flowspec_edge.net.discovery import Announcement
from flowspec_edge.node.resources import NodeSettings
from flowspec_edge.origin.dialogue import is_there


class Losses:
    """The nodes and ways that are not to be planned with.

    ``origin`` are the settings of the origin's own node. ``try_way`` tells whether a way is whole. ``on_node_back`` and
    ``on_way_back`` are told of those that may be used again. ``close`` ends the trying.
    """

    def __init__(
        self,
        origin: NodeSettings,
        try_way: Callable[[ls.Way], Awaitable[bool]],
        on_node_back: Callable[[Announcement], None],
        on_way_back: Callable[[], None],
    ) -> None:
        self._origin, self._try_way = origin, try_way
        self._on_node_back, self._on_way_back = on_node_back, on_way_back
        self._core = ls.Losses(origin.name)
        self._journal = Journal("losses", {"origin": origin.name}, open_record("losses"))
        self._boards: dict[str, Announcement] = {}  # where each node was when it was lost
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
        """The nodes not to plan with."""
        return self._core.nodes

    @property
    def ways(self) -> frozenset[ls.Way]:
        """The ways not to plan with."""
        return self._core.ways

    @property
    def missing_ways(self) -> frozenset[ls.Way]:
        """The ways that do not work, whatever is at stake."""
        return frozenset(way for way in self._core.ways if way not in self._core.doubted)

    def lose(self, boards: Iterable[Announcement]) -> None:
        """These nodes do not answer, or no longer."""
        lost = {board.node: board for board in boards}
        self._boards |= lost
        self._tell(ls.PartsLost(frozenset(lost)))

    def cut(self, node: str, other: str, boards: Iterable[Announcement]) -> None:
        """One of the two cannot reach the other, though both answer. ``boards`` are the nodes of the ring."""
        self._remember((node, other), boards)
        self._tell(ls.PartsLost(frozenset({ls.way_between(node, other)})))

    def lose_packets(self, part: ls.Part, boards: Iterable[Announcement]) -> None:
        """A part answers, and loses many of its packets. ``boards`` are the nodes of the ring."""
        self._remember((part,) if isinstance(part, str) else part, boards)
        self._tell(ls.PacketsLost(part))

    def fail_if_known(self, node: str | None, boards: Iterable[Announcement]) -> None:
        """The stage of this node failed, where one is named; the node itself answers."""
        for board in boards:
            if board.node == node:
                self._boards[node] = board
                self._tell(ls.StageFailed(node))

    def _remember(self, nodes: Collection[str], boards: Iterable[Announcement]) -> None:
        self._boards |= {board.node: board for board in boards if board.node in nodes}

    def left_of(self, found: Sequence[Announcement]) -> list[Announcement]:
        """Those that may be planned with. One that is found at another address has been started anew."""
        return [board for board in found if board.node not in self.names or self._is_elsewhere(board)]

    def answering_of(self, found: Sequence[Announcement]) -> list[Announcement]:
        """These, and those that are doubted."""
        left = self.left_of(found)
        return [board for board in found if board in left or board.node in self._core.doubted]

    def _is_elsewhere(self, board: Announcement) -> bool:
        lost = self._boards.get(board.node, board)
        return (board.host, board.port) != (lost.host, lost.port)

    def _tell(self, event: ls.LossEvent) -> None:
        for action in self._journal.handle(self._core, event, time.monotonic()):
            match action:
                case ls.TryPart(part):
                    task = asyncio.get_running_loop().create_task(self._try(part), name=f"trying {part}")
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                case ls.UsePart(str() as node) if node in self._boards:
                    self._on_node_back(self._boards[node])
                case ls.UsePart():
                    self._on_way_back()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (deadline := self._core.next_deadline()) is not None:
            delay = max(deadline - time.monotonic(), 0.0)
            self._timer = asyncio.get_running_loop().call_later(delay, self._tell, ls.TimePassed())

    async def _try(self, part: ls.Part) -> None:
        is_back = await (is_there(self._origin, self._boards[part]) if isinstance(part, str) else self._try_way(part))
        self._tell(ls.PartAnswered(part) if is_back else ls.PartSilent(part))
