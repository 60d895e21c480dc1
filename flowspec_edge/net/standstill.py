"""Tells the peers of this process that it is about to stand still, which is no reason to take it for lost.

Some libraries hold the interpreter's lock for seconds, whichever thread calls them: reading a tokenizer of 262,000
tokens takes 1.3 s at a stretch on a slow x86 core that nothing else uses. Meanwhile nothing of this process answers,
for which a heartbeat gives it 1.25 s, and nothing is read, for which TCP does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol
from weakref import WeakSet

MAX_STILL_S = 15.0
"""Longer than any board takes, and no longer is believed."""


class Teller(Protocol):
    """A link whose peer expects to hear something."""

    def tell_still(self, seconds: float) -> None:
        """Tell the peer that it may hear nothing for so long from now on; 0: that this is over. It never fails."""


class Standstill:
    """The links of a process, which stand still together. For its event loop alone."""

    def __init__(self) -> None:
        self._links: WeakSet[Teller] = WeakSet()
        self._depth = 0

    def add(self, link: Teller) -> None:
        """It is open from now on."""
        self._links.add(link)
        if self._depth:
            link.tell_still(MAX_STILL_S)

    @contextlib.contextmanager
    def expected(self) -> Iterator[None]:
        """Inside, this process may stand still."""
        self._depth += 1
        self._tell(MAX_STILL_S)
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._tell(0.0)

    def _tell(self, seconds: float) -> None:
        for link in list(self._links):
            link.tell_still(seconds)


THIS_PROCESS = Standstill()
"""Its links share its interpreter, whichever node they belong to."""
