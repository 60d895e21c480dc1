"""A stage: takes chunks, drops what is dead, runs its layers, sends on. It never waits for the origin.

One chunk runs at a time, in the order of arrival, whichever session it belongs to. It starts when the hop ahead has credit;
at that moment its sender gets a credit back, so at most ``CREDITS_PER_HOP`` chunks wait here. Dead rows are dropped when a
chunk arrives, when it starts, and before it is sent on; a chunk without a living row is dropped whole.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from flowspec_edge.core.events import (
    AdvanceArrived,
    ChunkArrived,
    CreditArrived,
    ForwardFinished,
    FreeCache,
    GrantCredit,
    OpenCache,
    RunForward,
    SendChunk,
    SessionEnded,
    SessionRequested,
    StageAction,
    StageEvent,
)
from flowspec_edge.core.kv_slots import KvSlots
from flowspec_edge.core.tree import Advance, Tree
from flowspec_edge.errors import ProtocolError

CREDITS_PER_HOP = 2
"""Chunks a sender may have waiting at the next hop: one to start the moment the running one ends, one on the wire."""

MAX_SESSIONS = 64
"""A bound on what one origin may open at one stage."""


class _Session:
    def __init__(self, capacity: int) -> None:
        self.tree = Tree()
        self.slots = KvSlots(capacity)


class Stage:
    """The layers between two hops of one ring."""

    def __init__(self, *, is_last: bool) -> None:
        self._is_last = is_last
        self._sessions: dict[int, _Session] = {}
        self._waiting: deque[ChunkArrived] = deque()
        self._running: ChunkArrived | None = None
        self._credits = CREDITS_PER_HOP

    def handle(self, event: StageEvent, now: float) -> list[StageAction]:
        """Take one event and answer with what to do.

        Raises:
            ProtocolError: the sender ignored its credits, or a session broke the rules of the tree.
            StageFailedError: a session's cache is full.
        """
        actions: list[StageAction] = []
        match event:
            case SessionRequested(session, capacity):
                if session in self._sessions or len(self._sessions) >= MAX_SESSIONS:
                    raise ProtocolError(f"session {session} is open already, or {MAX_SESSIONS} are (MAX_SESSIONS)")
                self._sessions[session] = _Session(capacity)
                actions.append(OpenCache(session, capacity))
            case ChunkArrived():
                if len(self._waiting) >= CREDITS_PER_HOP:
                    raise ProtocolError(f"a chunk without credit: {CREDITS_PER_HOP} wait here (CREDITS_PER_HOP)")
                self._waiting.append(event)
            case AdvanceArrived(session, at, to):
                if session in self._sessions:
                    self._sessions[session].tree.advance(Advance(at, to))
            case ForwardFinished(hidden):
                self._send_on(hidden, actions)
            case CreditArrived(num_chunks):
                self._credits += num_chunks
            case SessionEnded(session):
                if self._sessions.pop(session, None) is not None:
                    actions.append(FreeCache(session))
        self._start_next(actions)
        return actions

    def next_deadline(self) -> float | None:
        """A stage waits for no clock: the origin watches progress."""
        return None

    def check(self) -> None:
        """Assert the invariants; run at every test's teardown."""
        assert self._credits >= 0
        assert len(self._waiting) <= CREDITS_PER_HOP
        for session in self._sessions.values():
            session.tree.check()
            session.slots.check()

    def _start_next(self, actions: list[StageAction]) -> None:
        while self._running is None and self._waiting and self._credits > 0:
            chunk = self._waiting.popleft()
            actions.append(GrantCredit(1))
            session = self._sessions.get(chunk.session)
            if session is None:  # closed while the chunk was on its way
                continue
            kept = [index for index, row in enumerate(chunk.rows) if session.tree.add(row)]
            # An Advance that waited for one of these rows may have pruned others of them.
            kept = [index for index in kept if chunk.rows[index].id in session.tree]
            if kept:
                self._running = _select(chunk, kept)
                self._credits -= 1
                actions.append(self._forward(session, self._running))

    def _forward(self, session: _Session, chunk: ChunkArrived) -> RunForward:
        moves = tuple(session.slots.drop(session.tree.take_dropped()))
        first = session.slots.append(chunk.rows)
        positions = np.array([session.tree[row.id].depth for row in chunk.rows], np.int64)  # [rows]
        mask = session.slots.ancestor_mask(first)
        return RunForward(chunk.session, chunk.rows, chunk.hidden, moves, first, positions, mask)

    def _send_on(self, hidden: np.ndarray[tuple[int, ...], np.dtype[np.float32]], actions: list[StageAction]) -> None:
        chunk, self._running = self._running, None
        assert chunk is not None, "a forward finished that nobody started"
        session = self._sessions.get(chunk.session)
        first_kept = len(chunk.rows) - chunk.num_wanted if self._is_last else 0
        rows = enumerate(chunk.rows[first_kept:], first_kept)
        kept = [index for index, row in rows if session is not None and row.id in session.tree]
        if not kept:
            self._credits += 1  # nothing leaves, so the credit taken at the start is free again
            return
        chunk = _select(ChunkArrived(chunk.session, chunk.rows, chunk.num_wanted, hidden), kept)
        actions.append(SendChunk(chunk.session, chunk.rows, chunk.num_wanted, chunk.hidden))


def _select(chunk: ChunkArrived, kept: list[int]) -> ChunkArrived:
    """The chunk without the rows that are not in ``kept``."""
    if len(kept) == len(chunk.rows):
        return chunk
    first_wanted = len(chunk.rows) - chunk.num_wanted
    return ChunkArrived(
        chunk.session,
        tuple(chunk.rows[index] for index in kept),
        sum(index >= first_wanted for index in kept),
        None if chunk.hidden is None else chunk.hidden[kept],
    )
