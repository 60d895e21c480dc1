"""At which pace a node computes and sends: its own, as fast as it can. An emulated board takes its own time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.rows import SlotMove
from flowspec_edge.net.connection import Link


class Runner(Protocol):
    """Runs a stage's layers. See ``StageRunner``."""

    def open_cache(self, session: int, capacity: int) -> None: ...

    def free_cache(self, session: int) -> None: ...

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None: ...

    def take_over_cache(self, session: int, kept: int) -> bool: ...

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished: ...


class Board:
    """What a node or an origin runs on. ``bench/emulated_board.py`` has another one."""

    is_measured: ClassVar[bool] = True
    """Whether what runs here tells what this machine can do."""

    def pace(self, runner: Runner, stage: int) -> Runner:
        """The runner to use for stage ``stage`` of a ring."""
        return runner

    def send(self, link: Link, message: wire.Message) -> None:
        """Raises what ``Link.send`` does."""
        link.send(message)

    def close(self) -> None:
        """Its node has ended."""
