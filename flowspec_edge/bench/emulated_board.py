"""A testbed's board on this machine: what it computes is run and then waited out, what it sends is held back.

A forward lasts as long as the testbed says, and so does each pass of head and drafter at the origin; a message leaves
when the testbed's network would have brought it. What this machine needs beyond that is late, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import itertools
import os
import struct
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flowspec_edge.bench.testbed import StageCost, Testbed
from flowspec_edge.bundle import Bundle
from flowspec_edge.core import events as ev
from flowspec_edge.core import wire
from flowspec_edge.core.rows import SlotMove
from flowspec_edge.core.speculation.drafting import DraftShape
from flowspec_edge.errors import LinkLostError, ProtocolError, StageFailedError
from flowspec_edge.net.connection import Link
from flowspec_edge.node.pacing import Board, Runner
from flowspec_edge.origin.engine import LoadedParts, OriginEngine

TIMER_ABSTIME = 1
"""TFD_TIMER_ABSTIME of Linux's sys/timerfd.h; Python has it from 3.13 on."""


@dataclass(slots=True)
class Lateness:
    """``asked_s``: what the testbed says that computing takes; ``late_s``: what it took beyond that."""

    asked_s: float = 0.0
    late_s: float = 0.0

    @property
    def share(self) -> float:
        return self.late_s / self.asked_s if self.asked_s else 0.0

    def __add__(self, other: Lateness) -> Lateness:
        return Lateness(self.asked_s + other.asked_s, self.late_s + other.late_s)

    def wait(self, began: float, asked_s: float) -> None:
        """On the thread that computes: until ``asked_s`` after ``began``, which is a time of ``time.monotonic``."""
        _sleep_until(began + asked_s)
        self.asked_s += asked_s
        self.late_s += time.monotonic() - began - asked_s


def _sleep_until(deadline: float) -> None:
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(left)


class PacedRunner:
    """A stage's runner whose forwards last as long as ``cost`` says.

    ``on_end`` is told, when a session ends, how well that was kept.
    """

    def __init__(self, runner: Runner, cost: StageCost, on_end: Callable[[Lateness], None]) -> None:
        self._runner, self._cost, self._on_end = runner, cost, on_end
        self._lateness = Lateness()

    def open_cache(self, session: int, capacity: int) -> None:
        self._lateness = Lateness()
        self._runner.open_cache(session, capacity)

    def free_cache(self, session: int) -> None:
        self._runner.free_cache(session)
        self._on_end(self._lateness)

    def keep_cache(self, session: int, moves: Sequence[SlotMove]) -> None:
        self._runner.keep_cache(session, moves)
        self._on_end(self._lateness)

    def take_over_cache(self, session: int, kept: int) -> bool:
        return self._runner.take_over_cache(session, kept)

    def run(self, forward: ev.RunForward, is_cancelled: Callable[[], bool]) -> ev.ForwardFinished:
        """A forward that is given up ends behind the layer that runs then."""
        began = time.monotonic()
        finished = self._runner.run(forward, is_cancelled)
        whole_s = self._cost.forward_ms(len(forward.rows)) / 1000
        layer_s = self._cost.layer_ms(len(forward.rows)) / 1000
        asked_s = 0.0
        for number in itertools.count(1):
            asked_s = min(number * layer_s, whole_s)
            _sleep_until(began + asked_s)
            if asked_s == whole_s or is_cancelled():
                break
        self._lateness.wait(began, asked_s)
        return finished


class PacedEngine(OriginEngine):
    """Head and drafter that take the testbed's time."""

    def __init__(self, bundle: Bundle, testbed: Testbed, parts: LoadedParts | None = None) -> None:
        super().__init__(bundle, num_threads=1, shape=DraftShape(), parts=parts)
        self._testbed = testbed
        self.lateness = Lateness()

    def run(self, job: ev.RunHead | ev.RunDraft) -> ev.HeadFinished | ev.DraftFinished:
        began = time.monotonic()
        finished = super().run(job)
        asked_ms = self._testbed.head_ms if isinstance(job, ev.RunHead) else self._testbed.draft_ms(len(job.rows))
        self.lateness.wait(began, asked_ms / 1000)
        return finished


class Wire:
    """One direction of a link on the testbed's network: when messages arrive, in their order.

    Chunks follow each other on the wire, each for as long as its bytes take; small messages take the latency alone.
    """

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        self._free_at = self._last_at = 0.0

    def arrival(self, message: wire.Message, now: float) -> float:
        """When a message that is sent now arrives."""
        testbed, leaves_at = self._testbed, now
        num_bytes = 0
        if isinstance(message, wire.ChunkMessage):
            num_bytes = testbed.chunk_bytes(message.chunk)
        elif isinstance(message, wire.TappedRows):
            num_bytes = len(message.ids) * testbed.hidden_bytes
        if num_bytes:
            leaves_at = self._free_at = max(now, self._free_at) + testbed.transfer_ms(num_bytes) / 1000
        self._last_at = max(leaves_at + testbed.hop_ms / 1000, self._last_at)
        return self._last_at


class PreciseTimer:
    """Calls back on the event loop at a time of its clock, about 0.1 ms late.

    The loop's own timers are up to 1.1 ms late, since epoll counts whole milliseconds (x86, Linux 6, Python 3.11).
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._checked(self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC))
        self._callback = callback
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._file, self._expire)

    def set(self, at: float) -> None:
        """Instead of the time that was set before."""
        seconds, nanoseconds = divmod(int(at * 1e9), 10**9)
        setting = struct.pack("@4l", 0, 0, seconds, nanoseconds)  # struct itimerspec: no period, then the time
        self._checked(self._libc.timerfd_settime(self._file, TIMER_ABSTIME, setting, None))

    def close(self) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)

    def _expire(self) -> None:
        with contextlib.suppress(BlockingIOError):  # set anew meanwhile
            os.read(self._file, 8)
            self._callback()

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


class EmulatedBoard(Board):
    """Any one of a testbed's boards; the ring says which. ``on_end`` is told how well a session's times were kept."""

    is_measured: ClassVar[bool] = False

    def __init__(self, testbed: Testbed, on_end: Callable[[Lateness], None] = lambda _: None) -> None:
        self._testbed, self._on_end = testbed, on_end
        self._wires: weakref.WeakKeyDictionary[Link, Wire] = weakref.WeakKeyDictionary()
        self._held: list[tuple[float, int, Link, wire.Message]] = []  # a heap
        self._numbers = itertools.count()
        self._timer: PreciseTimer | None = None

    def pace(self, runner: Runner, stage: int) -> Runner:
        name, stages = self._testbed.name, self._testbed.stages
        if stage >= len(stages):
            raise StageFailedError(f"testbed {name} has {len(stages)} stages; this would be number {stage + 1}")
        return PacedRunner(runner, stages[stage], self._on_end)

    def send(self, link: Link, message: wire.Message) -> None:
        """Hold the message back for as long as the testbed's network takes."""
        at = self._wires.setdefault(link, Wire(self._testbed)).arrival(message, time.monotonic())
        held = (at, next(self._numbers), link, message)
        heapq.heappush(self._held, held)
        self._timer = self._timer or PreciseTimer(self._release)
        if self._held[0] is held:  # else it is set for one that arrives before
            self._timer.set(at)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _release(self) -> None:
        while self._held and self._held[0][0] <= time.monotonic():
            _, _, link, message = heapq.heappop(self._held)
            with contextlib.suppress(LinkLostError, ProtocolError):  # the link's reader tells of its end
                link.send(message)
        if self._held and self._timer is not None:
            self._timer.set(self._held[0][0])
