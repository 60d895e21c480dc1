"""A stage: takes chunks, drops what is dead, runs its layers, sends on. It waits for the origin only where a
schedule has turns.

One chunk runs at a time, in the order of arrival, whichever session it belongs to. It starts when the hop ahead has
credit; at that moment its sender gets a credit back, so at most ``CREDITS_PER_HOP`` chunks wait here. Dead rows are
dropped when a chunk arrives, when it starts, and before it is sent on; a chunk without a living row is dropped whole.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowspec_edge.core.events import (
    AdvanceArrived,
    CancelForward,
    ChunkArrived,
    CreditArrived,
    ForwardFinished,
    FreeCache,
    GrantCredit,
    KeepCache,
    LinkPaused,
    LinkResumed,
    OpenCache,
    RunForward,
    SendChunk,
    SendTapped,
    SessionEnded,
    SessionRequested,
    StageAction,
    StageEvent,
    TurnBegan,
)
from flowspec_edge.core.limits import CREDITS_PER_HOP, MAX_KEPT_SESSIONS, MAX_SESSIONS
from flowspec_edge.core.rows import Advance, Chunk, Floats, Passage, SessionSpec, SlotMove, check_width
from flowspec_edge.core.speculation.credits import add_credits
from flowspec_edge.core.speculation.kv_slots import KvSlots
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.errors import ProtocolError


class _Session:
    """A session whose first rows, of these tokens, are there already: those that it takes over."""

    def __init__(self, spec: SessionSpec, taken_over: Sequence[int]) -> None:
        self.tree = Tree(num_prompt=spec.num_prompt)
        if taken_over:
            self.tree.begin(taken_over)
        self.slots = KvSlots(spec.capacity, len(taken_over))
        self.cancels = spec.cancels
        self.is_tapped = spec.is_tapped
        self.num_prompt = spec.num_prompt
        self.turn = 0
        self.tapped: dict[int, dict[int, Floats]] = {}  # by draft id, then by layer: rows not known to be verified

    def take_verified(self) -> dict[int, dict[int, Floats]]:
        """Tapped rows that have become verified; those of dead rows are forgotten."""
        verified: dict[int, dict[int, Floats]] = {}
        for id in list(self.tapped):
            row = self.tree.get(id)
            if row is None:
                del self.tapped[id]
            elif id < self.num_prompt or row.is_committed:
                verified[id] = self.tapped.pop(id)
        return verified

    def keep(self) -> tuple[tuple[int, ...], tuple[SlotMove, ...]]:
        """The tokens of the committed rows that have been run, and the moves after which the cache begins with them."""
        rows = list(itertools.takewhile(lambda row: row.id in self.slots, self.tree.committed()))
        return tuple(row.token for row in rows), self.slots.keep([row.id for row in rows])


@dataclass(slots=True, eq=False)
class _Waiting:
    chunk: Chunk
    arrived_at: float


@dataclass(slots=True)
class _Running:
    chunk: Chunk
    waited_s: float
    began_at: float
    is_cancelled: bool = False


class Stage:
    """The layers between two hops of one ring.

    A stage that ``embeds`` takes chunks of tokens below ``vocab_size``, another one hidden rows of ``hidden_size``
    values; where a number is 0, it is not known and nothing is held against it.
    """

    def __init__(self, *, is_last: bool, embeds: bool | None = None, vocab_size: int = 0, hidden_size: int = 0) -> None:
        self._is_last = is_last
        self._embeds = embeds
        self._vocab_size, self._hidden_size = vocab_size, hidden_size
        self._sessions: dict[int, _Session] = {}
        self._kept: dict[int, tuple[int, ...]] = {}  # the tokens of ended sessions whose rows are kept, oldest first
        self._waiting: deque[_Waiting] = deque()
        self._running: _Running | None = None
        self._leaving: deque[Chunk] = deque()  # what has been run, while the link ahead is busy
        self._is_paused = False
        self._credits = CREDITS_PER_HOP

    def handle(self, event: StageEvent, now: float) -> list[StageAction]:
        """Take one event and answer with what to do.

        Raises:
            ProtocolError: the sender ignored its credits, a chunk is none that these layers can run over, or a session
                broke the rules of the tree.
            StageFailedError: a session's cache is full.
        """
        actions: list[StageAction] = []
        match event:
            case SessionRequested(spec):
                self._open(spec, actions)
            case ChunkArrived(chunk):
                if len(self._waiting) >= CREDITS_PER_HOP:
                    raise ProtocolError(f"a chunk without credit: {CREDITS_PER_HOP} wait here (CREDITS_PER_HOP)")
                self._check_chunk(chunk)
                self._waiting.append(_Waiting(_select(chunk, self._added(chunk)), now))
            case AdvanceArrived(session, at, to):
                if session in self._sessions:
                    self._sessions[session].tree.advance(Advance(at, to))
            case TurnBegan(session, turn):
                if session in self._sessions:
                    self._sessions[session].turn = max(turn, self._sessions[session].turn)
            case ForwardFinished(hidden, tapped):
                self._keep_tapped(tapped)
                self._send_on(hidden, now, actions)
            case CreditArrived(num_chunks):
                self._credits = add_credits(self._credits + self._num_kept_back, num_chunks) - self._num_kept_back
            case LinkPaused():
                self._is_paused = True
            case LinkResumed():
                self._is_paused = False
                self._send_leaving(actions)
            case SessionEnded(session, is_kept):
                self._end(session, actions, is_kept=is_kept)
        self._send_tapped(actions)
        self._cancel_dead(actions)
        self._drop_dead(actions)
        self._start_next(now, actions)
        return actions

    def next_deadline(self) -> float | None:
        """A stage waits for no clock: the origin watches progress."""
        return None

    def check(self) -> None:
        """Assert the invariants; run at every test's teardown."""
        assert self._credits >= 0
        assert len(self._waiting) <= CREDITS_PER_HOP
        assert self._is_paused or not self._leaving
        assert self._credits + self._num_kept_back <= CREDITS_PER_HOP
        for session in self._sessions.values():
            session.tree.check()
            session.slots.check()

    @property
    def _num_kept_back(self) -> int:
        """The chunks that have taken a credit and are still here."""
        return len(self._leaving) + (self._running is not None)

    def _open(self, spec: SessionSpec, actions: list[StageAction]) -> None:
        session, num_kept = spec.session, spec.num_kept
        if session in self._sessions or session in self._kept or len(self._sessions) >= MAX_SESSIONS:
            raise ProtocolError(f"session {session} is open already, or {MAX_SESSIONS} are (MAX_SESSIONS)")
        if num_kept and num_kept >= min(spec.num_prompt, spec.capacity):
            raise ProtocolError(f"{num_kept} rows of a prompt of {spec.num_prompt} are to be those of a kept session")
        kept = self._kept.pop(spec.kept, ()) if num_kept else ()
        if num_kept > len(kept):  # the origin hears how many there are, and begins anew
            if kept:
                actions.append(FreeCache(spec.kept))
            num_kept = 0
        self._sessions[session] = _Session(spec, kept[:num_kept])
        actions.append(OpenCache(session, spec.capacity, spec.kept if num_kept else 0, num_kept))

    def _end(self, number: int, actions: list[StageAction], *, is_kept: bool) -> None:
        session = self._sessions.pop(number, None)
        tokens, moves = session.keep() if session is not None and is_kept else ((), ())
        if tokens:
            self._kept[number] = tokens
            actions.append(KeepCache(number, moves))
            if len(self._kept) > MAX_KEPT_SESSIONS:
                self._end(next(iter(self._kept)), actions, is_kept=False)
        elif session is not None or self._kept.pop(number, None) is not None:
            actions.append(FreeCache(number))

    def _check_chunk(self, chunk: Chunk) -> None:
        """Raises ProtocolError where the layers could not run over the chunk."""
        if self._embeds is not None and self._embeds is not (chunk.hidden is None):
            what = "tokens alone" if chunk.hidden is None else "hidden rows"
            raise ProtocolError(f"a chunk of {what} came, which is not what these layers begin with")
        if chunk.hidden is not None:
            check_width(chunk.hidden, self._hidden_size)
        if self._vocab_size and (token := max(row.token for row in chunk.rows)) >= self._vocab_size:
            raise ProtocolError(f"token {token} came, and the vocabulary ends at {self._vocab_size - 1}")

    def _start_next(self, now: float, actions: list[StageAction]) -> None:
        if self._running is not None or not self._waiting or not self._credits:
            return
        chunk, arrived_at = self._waiting[0].chunk, self._waiting[0].arrived_at
        session = self._sessions[chunk.session]
        if session.turn >= chunk.turn:
            self._waiting.popleft()
            self._running = _Running(chunk, now - arrived_at, now)
            self._credits -= 1
            actions += [GrantCredit(1), self._forward(session, chunk)]

    def _drop_dead(self, actions: list[StageAction]) -> None:
        """Drop dead rows from chunks that wait, so that no dead chunk takes up room until it would start or leave."""
        if self._leaving:
            leaving = [_select(chunk, self._living(chunk)) for chunk in self._leaving]
            self._leaving = deque(chunk for chunk in leaving if chunk.rows)
            self._credits += len(leaving) - len(self._leaving)  # of those that do not leave
        for waiting in list(self._waiting):
            waiting.chunk = _select(waiting.chunk, self._living(waiting.chunk))
            if not waiting.chunk.rows:
                self._waiting.remove(waiting)
                actions.append(GrantCredit(1))

    def _cancel_dead(self, actions: list[StageAction]) -> None:
        running = self._running
        if running is None or running.is_cancelled or self._living(running.chunk):
            return
        session = self._sessions.get(running.chunk.session)
        if session is None or session.cancels:
            running.is_cancelled = True
            actions.append(CancelForward(running.chunk.session))

    def _added(self, chunk: Chunk) -> list[int]:
        """Add the rows to the tree of the session, if that is still open. Returns the places of those that it took."""
        session = self._sessions.get(chunk.session)
        return [index for index, row in enumerate(chunk.rows) if session is not None and session.tree.add(row)]

    def _living(self, chunk: Chunk) -> list[int]:
        """The places of the chunk's rows that live."""
        session = self._sessions.get(chunk.session)
        return [index for index, row in enumerate(chunk.rows) if session is not None and row.id in session.tree]

    def _forward(self, session: _Session, chunk: Chunk) -> RunForward:
        session.slots.drop(session.tree.take_dropped())
        placement = session.slots.place(chunk.rows)
        return RunForward(chunk.session, chunk.rows, chunk.hidden, placement, session.is_tapped)

    def _keep_tapped(self, tapped: Mapping[int, Floats]) -> None:
        """Keep the tapped rows of living rows until these are known to be verified."""
        if not tapped or self._running is None:
            return
        chunk = self._running.chunk
        for index in self._living(chunk):
            rows = {layer: hidden[index] for layer, hidden in tapped.items()}
            self._sessions[chunk.session].tapped[chunk.rows[index].id] = rows

    def _send_tapped(self, actions: list[StageAction]) -> None:
        """Send the tapped rows of verified rows, each once: when its forward and its Advance are both here."""
        for number, session in self._sessions.items():
            verified = session.take_verified() if session.tapped else {}
            for layer in next(iter(verified.values()), {}):
                hidden = np.stack([rows[layer] for rows in verified.values()])
                actions.append(SendTapped(number, layer, tuple(verified), hidden))

    def _send_on(self, hidden: Floats, now: float, actions: list[StageAction]) -> None:
        running, self._running = self._running, None
        assert running is not None, "a forward finished that nobody started"
        chunk = running.chunk
        first_kept = len(chunk.rows) - chunk.num_wanted if self._is_last else 0
        kept = [index for index in self._living(chunk) if index >= first_kept]
        if not kept:
            self._credits += 1  # nothing leaves, so the credit taken at the start is free again
            return
        passage = Passage(len(chunk.rows), running.waited_s, now - running.began_at)
        turn = chunk.turn + 1 if chunk.turn else 0
        passed = replace(chunk, hidden=hidden, turn=turn, passages=(*chunk.passages, passage))
        self._leaving.append(_select(passed, kept))
        if not self._is_paused:
            self._send_leaving(actions)

    def _send_leaving(self, actions: list[StageAction]) -> None:
        actions += map(SendChunk, self._leaving)
        self._leaving.clear()


def _select(chunk: Chunk, kept: list[int]) -> Chunk:
    """The chunk with only the rows at the places ``kept``."""
    if len(kept) == len(chunk.rows):
        return chunk
    first_wanted = len(chunk.rows) - chunk.num_wanted
    return replace(
        chunk,
        rows=tuple(chunk.rows[index] for index in kept),
        num_wanted=sum(index >= first_wanted for index in kept),
        hidden=None if chunk.hidden is None else chunk.hidden[kept],
    )
