"""Decides which file to fetch from which source, from which byte on, and what to do when that fails.

A fetch knows its files by sha256, and asks every source which of them it has. Each file is fetched from one source at a
time, while several files are fetched from several sources at once. A transfer that broke is resumed, from any source.
Only its sha256 says that a file is good. Where it differs, the bytes are dropped, and

* where one source gave all of them, that source lied: it is named, and not asked again;
* where several sources gave them, nobody knows who lied: the file is fetched anew as a whole from one source, so that a
  wrong sum can be blamed on it.

Nothing here opens a socket or a file: ``handle(event, now)`` answers with what to do next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowspec_edge.core.events import DeadlinePassed
from flowspec_edge.errors import FetchError

TRANSFERS_PER_SOURCE = 2
"""Transfers from one source at a time: one fills the wire while the file of the other is checked and put in place."""
MAX_TRANSFERS = 8
"""Transfers of one fetch at a time, from all sources together."""
MAX_FAILURES = 5
"""A source is given up after this many transfers in a row that brought next to nothing. With the delays below, that is
after 8 s.
"""
FIRST_DELAY_S = 0.25
"""The delay before a source that failed is tried again. It doubles with every failure in a row."""
PROGRESS_BYTES = 65536
"""A transfer that breaks after fewer bytes counts as a failure, so that no peer can keep a fetch alive byte by byte."""


@dataclass(frozen=True, slots=True)
class Source:
    """A node from which files may be fetched."""

    node: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.node} at {self.host}:{self.port}"

    def to_text(self) -> str:
        """The source as messages have it: ``host:port/node``."""
        return f"{self.host}:{self.port}/{self.node}"

    @classmethod
    def from_text(cls, text: str) -> Source:
        """Read the text of :meth:`to_text`. Raises FetchError where it is no source."""
        address, _, node = text.partition("/")
        host, _, port = address.rpartition(":")
        if not (node and host and port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise FetchError(f"{text!r:.80} is not a source of weights; expected host:port/node")
        return cls(node, host, int(port))


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file to fetch. ``num_present`` bytes of it are here from an earlier fetch."""

    sha256: str
    name: str
    num_bytes: int
    num_present: int = 0


# ------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class SourceAnswered:
    """The source has these files, by sha256."""

    source: Source
    held: frozenset[str]


@dataclass(frozen=True, slots=True)
class SourceLost:
    """The source did not answer which files it has."""

    source: Source
    reason: str


@dataclass(frozen=True, slots=True)
class FileArrived:
    """All bytes of the file came, its sha256 is right, and it is in its place."""

    sha256: str
    source: Source


@dataclass(frozen=True, slots=True)
class FileDiffered:
    """All bytes of the file came, and their sha256 is ``found``, which is wrong."""

    sha256: str
    source: Source
    found: str


@dataclass(frozen=True, slots=True)
class TransferBroke:
    """A transfer broke, with ``num_present`` bytes of the file here.

    ``is_fault`` says that the source broke the rules.
    """

    sha256: str
    source: Source
    num_present: int
    reason: str
    is_fault: bool = False


FetchEvent = SourceAnswered | SourceLost | FileArrived | FileDiffered | TransferBroke | DeadlinePassed

# ------------------------------------------------------------------------------ actions


@dataclass(frozen=True, slots=True)
class AskSource:
    """Ask the source which of these files it has. It is answered by ``SourceAnswered`` or ``SourceLost``."""

    source: Source
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StartTransfer:
    """Fetch the file's bytes from ``offset`` on.

    It is answered by ``FileArrived``, ``FileDiffered`` or ``TransferBroke``.
    """

    sha256: str
    source: Source
    offset: int


@dataclass(frozen=True, slots=True)
class DropPart:
    """Delete the bytes of the file that are here."""

    sha256: str


@dataclass(frozen=True, slots=True)
class AccuseSource:
    """Report that the source sent what it should not have sent, so that its owner looks after it."""

    source: Source
    reason: str


@dataclass(frozen=True, slots=True)
class CompleteFetch:
    """Report that all files are in their places."""


@dataclass(frozen=True, slots=True)
class FailFetch:
    """Report that the fetch has failed. The reason is a sentence for the user."""

    reason: str


FetchAction = AskSource | StartTransfer | DropPart | AccuseSource | CompleteFetch | FailFetch

# ---------------------------------------------------------------------------- the fetch


@dataclass(slots=True)
class _File:
    wanted: WantedFile
    num_present: int
    givers: set[Source | None]  # of the bytes that are here; None stands for the unknown sources of an earlier fetch
    running: Source | None = None
    is_here: bool = False
    is_disputed: bool = False  # the sum of bytes from several sources was wrong; one source must give all of them now


@dataclass(slots=True)
class _SourceState:
    held: frozenset[str] | None = None  # None until it has answered
    num_running: int = 0
    num_failures: int = 0
    retry_at: float = 0.0
    gave_up: str | None = None  # why it is not asked any more


@dataclass(slots=True)
class Fetch:
    """One fetch of several files. It starts with :meth:`begin`, and then handles events until it completes or fails."""

    files: Sequence[WantedFile]
    sources: Sequence[Source]
    _files: dict[str, _File] = field(init=False)
    _states: dict[Source, _SourceState] = field(init=False)
    _now: float = 0.0
    _is_over: bool = False

    def __post_init__(self) -> None:
        self._files = {
            wanted.sha256: _File(wanted, wanted.num_present, {None} if wanted.num_present else set())
            for wanted in self.files
        }
        self._states = {source: _SourceState() for source in self.sources}

    def begin(self) -> list[FetchAction]:
        """Ask all sources."""
        names = tuple(self._files)
        actions: list[FetchAction] = [AskSource(source, names) for source in self._states] if names else []
        return actions + self._go_on()

    def handle(self, event: FetchEvent, now: float) -> list[FetchAction]:
        """What to do after ``event``. Nothing follows ``CompleteFetch`` or ``FailFetch``."""
        if self._is_over:
            return []
        self._now = now
        actions: list[FetchAction] = []
        match event:
            case SourceAnswered(source, held):
                self._states[source].held = held
            case SourceLost(source, reason):
                self._states[source].gave_up = reason
            case FileArrived(sha256, source):
                file = self._end_transfer(sha256, source)
                file.is_here = True
                self._states[source].num_failures = 0
            case FileDiffered(sha256, source, found):
                self._dispute(self._end_transfer(sha256, source), source, found, actions)
            case TransferBroke():
                self._note_broken_transfer(event, actions)
            case DeadlinePassed():
                pass
        return actions + self._go_on()

    def next_deadline(self) -> float | None:
        """When a source that failed may be tried again; None where there is nothing to try."""
        waiting = [file for file in self._files.values() if not file.is_here and file.running is None]
        times = [
            state.retry_at
            for state in self._states.values()
            if state.retry_at > self._now and self._is_usable(state) and any(_holds(state, file) for file in waiting)
        ]
        return None if self._is_over or not times else min(times)

    def check(self) -> None:
        """Assert the invariants."""
        for source, state in self._states.items():
            running = sum(file.running == source for file in self._files.values())
            assert running == state.num_running <= TRANSFERS_PER_SOURCE, f"{source}: {running} transfers"
        for file in self._files.values():
            assert not (file.is_here and file.running), f"{file.wanted.name}: here and still running"
            assert 0 <= file.num_present <= file.wanted.num_bytes, f"{file.wanted.name}: {file.num_present} bytes"
            assert not file.is_disputed or len(file.givers) <= 1, f"{file.wanted.name}: disputed and mixed again"

    def _end_transfer(self, sha256: str, source: Source) -> _File:
        file = self._files[sha256]
        assert file.running == source, f"{file.wanted.name}: a transfer ended that was not running"
        file.running = None
        self._states[source].num_running -= 1
        return file

    def _dispute(self, file: _File, source: Source, found: str, actions: list[FetchAction]) -> None:
        if file.givers == {source}:
            reason = f"sent {file.wanted.name} with sha256 {found[:12]} instead of {file.wanted.sha256[:12]}"
            self._accuse(source, reason, actions)
        else:
            self._drop(file, actions)
        file.is_disputed = True

    def _note_broken_transfer(self, event: TransferBroke, actions: list[FetchAction]) -> None:
        file, state = self._end_transfer(event.sha256, event.source), self._states[event.source]
        gained = event.num_present - file.num_present
        file.num_present = event.num_present
        if not file.num_present:
            file.givers.clear()
        if event.is_fault:
            self._accuse(event.source, event.reason, actions)
            return
        state.num_failures = 1 if gained >= PROGRESS_BYTES else state.num_failures + 1
        state.retry_at = self._now + FIRST_DELAY_S * 2 ** (state.num_failures - 1)
        if state.num_failures >= MAX_FAILURES:
            state.gave_up = event.reason

    def _accuse(self, source: Source, reason: str, actions: list[FetchAction]) -> None:
        if self._states[source].gave_up is None:
            actions.append(AccuseSource(source, reason))
        self._states[source].gave_up = reason
        for file in self._files.values():
            if source in file.givers and file.running is None and not file.is_here:
                self._drop(file, actions)

    def _drop(self, file: _File, actions: list[FetchAction]) -> None:
        file.num_present = 0
        file.givers.clear()
        actions.append(DropPart(file.wanted.sha256))

    def _go_on(self) -> list[FetchAction]:
        actions: list[FetchAction] = []
        for file in self._files.values():
            if file.is_here or file.running is not None:
                continue
            source = self._choose(file)
            if source is not None:
                self._start(file, source, actions)
            elif self._is_hopeless(file):
                self._is_over = True
                return [*actions, FailFetch(self._explain(file))]
        if all(file.is_here for file in self._files.values()):
            self._is_over = True
            actions.append(CompleteFetch())
        return actions

    def _start(self, file: _File, source: Source, actions: list[FetchAction]) -> None:
        if file.is_disputed and file.givers - {source}:
            self._drop(file, actions)
        file.running = source
        file.givers.add(source)
        self._states[source].num_running += 1
        actions.append(StartTransfer(file.wanted.sha256, source, file.num_present))

    def _choose(self, file: _File) -> Source | None:
        """The least busy source that has the file; of equally busy ones the first."""
        if sum(state.num_running for state in self._states.values()) >= MAX_TRANSFERS:
            return None
        ready = [
            source
            for source, state in self._states.items()
            if self._is_usable(state)
            and _holds(state, file)
            and state.num_running < TRANSFERS_PER_SOURCE
            and (not state.num_failures or state.retry_at <= self._now)
        ]
        return min(ready, key=lambda source: self._states[source].num_running, default=None)

    def _is_usable(self, state: _SourceState) -> bool:
        return state.gave_up is None

    def _is_hopeless(self, file: _File) -> bool:
        return not any(
            self._is_usable(state) and (state.held is None or _holds(state, file)) for state in self._states.values()
        )

    def _explain(self, file: _File) -> str:
        reasons = [f"{source} {state.gave_up or 'does not have it'}" for source, state in self._states.items()]
        return (
            f"{file.wanted.name} ({file.wanted.num_bytes} bytes) cannot be fetched: "
            f"{'; '.join(reasons) or 'no node that might have it was named'}"
        )


def _holds(state: _SourceState, file: _File) -> bool:
    return state.held is not None and file.wanted.sha256 in state.held
