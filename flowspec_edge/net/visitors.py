"""Who stands at the door, in the order of their coming."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Visitor:
    connection: socket.socket
    address: str
    timer: asyncio.TimerHandle | None = None
    task: asyncio.Task[None] | None = None
    is_let_in: bool = False
    has_asked: asyncio.Event = field(default_factory=asyncio.Event)


class Room:
    """Visitors in the order of their coming, not more than so many in total and of one address."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most, self._most_per_address = most, most_per_address
        self._visitors: dict[str, dict[Visitor, None]] = {}
        self._num = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Visitor]:
        return iter([visitor for visitors in self._visitors.values() for visitor in visitors])

    def add(self, visitor: Visitor) -> Visitor | None:
        """Returns the one who has to leave for it: the oldest of its own address, or of that which has most."""
        own = self._visitors.setdefault(visitor.address, {})
        own[visitor] = None
        self._num += 1
        if len(own) > self._most_per_address:
            return next(iter(own))
        return self.oldest() if self._num > self._most else None

    def oldest(self) -> Visitor:
        """Of the address that has most."""
        fullest = max(self._visitors, key=lambda address: len(self._visitors[address]))
        return next(iter(self._visitors[fullest]))

    def remove(self, visitor: Visitor) -> None:
        """Nothing happens if it has left already."""
        own = self._visitors.get(visitor.address, {})
        if visitor in own:
            del own[visitor]
            self._num -= 1
            if not own:
                del self._visitors[visitor.address]
