"""Bounds what the links of a process hold together of messages that nobody has taken yet, unfinished ones included."""

from __future__ import annotations

from typing import Protocol

MAX_HELD_BYTES = 128 * 2**20
"""Of all links of this process together. Credits keep an honest ring at two chunks, 32 MiB of the widest model."""


class Holder(Protocol):
    """A link that holds bytes."""

    def give_way(self, num_bytes: int, limit_bytes: int) -> None:
        """End, and let go of the ``num_bytes`` that it holds, since all together hold more than ``limit_bytes``."""


class HeldBytes:
    """The account of all links. Beyond the limit that link gives way which has brought nothing for the longest time.

    So one that sends goes on, however slow its wire is, and those that have begun something and stopped are ended.
    """

    def __init__(self, limit_bytes: int = MAX_HELD_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.num_bytes = 0
        self._by_holder: dict[Holder, int] = {}  # in the order of their last bytes

    def add(self, holder: Holder, num_bytes: int) -> None:
        """So many bytes have come for it."""
        self._by_holder[holder] = self._by_holder.pop(holder, 0) + num_bytes
        self.num_bytes += num_bytes
        while self.num_bytes > self.limit_bytes:
            idle = next(iter(self._by_holder))
            idle.give_way(self.drop(idle), self.limit_bytes)

    def release(self, holder: Holder, num_bytes: int) -> None:
        """So many of its bytes were taken; nothing where it has been dropped meanwhile."""
        if holder not in self._by_holder:
            return
        self._by_holder[holder] -= num_bytes
        self.num_bytes -= num_bytes
        if not self._by_holder[holder]:
            del self._by_holder[holder]

    def drop(self, holder: Holder) -> int:
        """It has ended; how many bytes it held."""
        num_bytes = self._by_holder.pop(holder, 0)
        self.num_bytes -= num_bytes
        return num_bytes


ALL_LINKS = HeldBytes()
"""The account of this process: its links share its memory, whichever node they belong to."""
