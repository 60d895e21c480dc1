"""Shares the energy of a ring's boards among the texts that it writes.

At each moment what a board takes, idle or not, belongs in equal parts to all texts that are being written. So the
joules of all texts together are those that the boards have taken while there was any.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

SILENT_S = 2.0
"""Boards tell twice a second. One that has not for so long is not counted on, until it tells again."""


@dataclass(slots=True)
class TextEnergy:
    """The share of one text: joules, and the names of the nodes whose boards tell and do not tell what they take."""

    silent: set[str]
    joules: float = 0.0
    telling: set[str] = field(default_factory=set)

    def hear(self, node: str) -> None:
        self.telling.add(node)
        self.silent.discard(node)


@dataclass(slots=True)
class _Board:
    """A machine. ``teller`` is the node that is believed, where several run there and see the same sensors.

    ``shared_j`` of the joules that it told, and of what has been taken since, have been shared out.
    """

    teller: str
    shared_j: float
    watts: float
    told_at: float
    shared_at: float


class EnergyShares:
    """What the boards of these nodes tell, and which texts are being written."""

    def __init__(self, nodes: Iterable[str]) -> None:
        self._nodes = frozenset(nodes)
        self._boards: dict[str, _Board] = {}
        self._told_at: dict[str, float] = {}  # by the nodes that tell
        self._texts: dict[int, TextEnergy] = {}

    def begin(self, text: int, now: float) -> TextEnergy:
        """A text begins. What is returned grows until its end."""
        self.settle(now)
        self._texts[text] = found = TextEnergy(set(self._nodes))
        for node, told_at in self._told_at.items():
            if now - told_at <= SILENT_S:
                found.hear(node)
        return found

    def end(self, text: int, now: float) -> None:
        """A text has ended, or could not begin."""
        self.settle(now)
        self._texts.pop(text, None)

    def take(self, node: str, machine: str, joules: float, watts: float, now: float) -> None:
        """A node tells what its board has taken since the node began, and takes now."""
        self._told_at[node] = now
        for text in self._texts.values():
            text.hear(node)
        self.settle(now)
        for other in [name for name, board in self._boards.items() if board.teller == node and name != machine]:
            del self._boards[other]  # it is on another machine now, or says so each time
        board = self._boards.get(machine)
        if board is None or now - board.told_at > SILENT_S:  # nobody knows when it took what it took meanwhile
            self._boards[machine] = _Board(node, joules, watts, now, now)
        elif board.teller == node:
            self._share(joules - board.shared_j)
            board.shared_j, board.watts, board.told_at = joules, watts, now

    def settle(self, now: float) -> None:
        """Share out what has been taken until now, as far as it can be known before boards tell."""
        for board in self._boards.values():
            until = min(now, board.told_at + SILENT_S)
            if until > board.shared_at:
                taken_j = board.watts * (until - board.shared_at)
                board.shared_j, board.shared_at = board.shared_j + taken_j, until
                self._share(taken_j)

    def _share(self, joules: float) -> None:
        for text in self._texts.values():
            text.joules += joules / len(self._texts)
