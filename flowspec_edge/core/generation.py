"""One generation at the origin: prompt in, tokens out, the tree in between.

The root is the last token that is known and whose successor is not. When rows come back, the walk starts there: draw the
next token from the target's logits, and while that token is a child in the tree whose logits are here too, go on. A token
that is not in the tree becomes the new root and leaves at once; nothing is drained. The origin (core/origin.py) asks for
chunks when the ring has credit and for computation when its one compute lane is free; verification comes first.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

import numpy as np

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.drafting import Drafting, DraftShape
from flowspec_edge.core.events import (
    BroadcastAdvance,
    DraftFinished,
    EmitTokens,
    ExpandDraft,
    ExtendDraft,
    FinishGeneration,
    Floats,
    OriginAction,
    ReportTrip,
    RunHead,
    SendChunk,
)
from flowspec_edge.core.schedules import make_schedule
from flowspec_edge.core.tree import NO_PARENT, Advance, Row, Tree
from flowspec_edge.core.verify import make_draw
from flowspec_edge.errors import RequestError

PREFILL_ROWS = 128
"""Rows of a prefill chunk: large enough to amortise a forward, small enough to keep every stage busy on a long prompt."""

TREE_MARGIN = 512
"""Cache rows beyond the length limit, for the living draft rows of one session."""


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """What the origin must know of the model: context length in tokens, the ids that end a text."""

    max_context: int
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class GenerationStatistics:
    """Counts of one generation.

    A trip is a chunk that came back; a verification is a trip that yielded at least one token. ``num_rows_sent`` counts
    rows after the prompt, ``num_rows_useful`` those of them that became part of the text.
    """

    num_tokens: int = 0
    num_trips: int = 0
    num_verifications: int = 0
    num_rows_sent: int = 0
    num_rows_useful: int = 0
    num_draft_passes: int = 0

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, bonus included: num_tokens / num_verifications."""
        return self.num_tokens / self.num_verifications if self.num_verifications else 0.0


class Generation:
    """The origin's side of one session."""

    def __init__(
        self,
        session: int,
        prompt: tuple[int, ...],
        options: GenerateOptions,
        *,
        limits: TargetLimits,
        num_stages: int,
        has_drafter: bool,
        shape: DraftShape,
    ) -> None:
        room = limits.max_context - len(prompt)
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, the model's context holds {limits.max_context}; "
                f"shorten it to at most {limits.max_context - 1}"
            )
        self.session = session
        self.statistics = GenerationStatistics()
        self.is_finished = False
        self._limits = limits
        self._draw = make_draw(options)
        self._schedule = make_schedule(options.schedule, num_stages)
        self._drafts = self._schedule.uses_drafter and has_drafter
        self._num_left = min(options.max_new_tokens, room)
        self.capacity = len(prompt) + self._num_left + TREE_MARGIN

        self._tree = Tree()
        rows = [Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(prompt)]
        for row in rows:
            self._tree.add(row)
        self._next_id = len(rows)
        self._root = rows[-1].id
        self._num_prompt = len(rows)
        self._prefill = deque(tuple(rows[i : i + PREFILL_ROWS]) for i in range(0, len(rows), PREFILL_ROWS))
        self._sent: set[int] = {row.id for row in rows}  # prompt rows leave by themselves
        self._in_flight: deque[set[int]] = deque()  # living rows of each chunk that has not come back
        self._returned: deque[tuple[tuple[Row, ...], Floats]] = deque()  # waiting for the head
        self._head_rows: list[Row] = []  # what the running head works on
        self._hidden: dict[int, Floats] = {}  # normed hidden row per returned row, until the drafter has taken it
        self._logits: dict[int, Floats] = {}
        self._drafting = Drafting(self._tree, shape)
        self._drafting.restart(self._root)
        self._num_extended = 0  # how many rows from the first on the drafter has taken as verified pairs
        self._draft_rows: list[int] | None = None  # what the running pass works on; None when none runs or it is stale
        self._num_trip_drafted = 0

    # ------------------------------------------------------------------ what the ring brings

    def take_returned(self, rows: tuple[Row, ...], hidden: Floats) -> None:
        """Hidden rows came back from the last stage."""
        returned = {row.id for row in rows}
        if self._drafts:
            self._hidden.update((row.id, hidden[index]) for index, row in enumerate(rows) if row.id in self._tree)
        for chunk in self._in_flight:
            if not returned.isdisjoint(chunk):
                self._in_flight.remove(chunk)
                break
        self._returned.append((rows, hidden))

    def take_logits(self, logits: Floats) -> list[OriginAction]:
        """The head has finished: walk from the root, emit, prune."""
        self._logits.update((row.id, logits[index]) for index, row in enumerate(self._head_rows))
        num_returned, self._head_rows = len(self._head_rows), []
        tokens: list[int] = []
        advance: Advance | None = None
        reason: str | None = None
        while reason is None and self._root in self._logits:
            token = self._draw(self._logits[self._root], self._tree[self._root].depth + 1)
            advance = Advance(self._root, token)
            tokens.append(token)
            reason = self._step(token)
        self.statistics.num_trips += 1
        if advance is None:
            return [self._report(num_returned, 0, 0)]
        num_pruned = self._prune(advance)
        self.statistics.num_tokens += len(tokens)
        self.statistics.num_verifications += 1
        actions: list[OriginAction] = [
            EmitTokens(self.session, tuple(tokens)),
            self._report(num_returned, len(tokens), num_pruned),
        ]
        if reason is not None:
            self.is_finished = True
            return [*actions, FinishGeneration(self.session, reason)]
        return [BroadcastAdvance(self.session, *advance), *actions]

    def take_draft(self, draft: DraftFinished) -> None:
        """A pass of the drafter has finished; a stale one is forgotten."""
        parents, self._draft_rows = self._draft_rows, None
        if parents is None:
            return
        added = self._drafting.merge(parents, draft.tokens, draft.log_probs, self._next_id)
        self._next_id += len(added)
        self._num_trip_drafted += len(added)

    # ------------------------------------------------------------------ what the origin may do next

    def next_chunk(self) -> SendChunk | None:
        """The next chunk to send, or None: the prompt, then the root alone, then what the schedule chooses."""
        if self._prefill:
            rows = self._prefill.popleft()
            num_wanted = len(rows) if self._drafts else int(not self._prefill)
            if num_wanted:
                self._in_flight.append({row.id for row in rows})
            return SendChunk(self.session, rows, num_wanted, None)
        if self._root not in self._sent:
            return self._send([self._root])
        if self._drafts and self._root >= self._num_prompt:
            chosen = self._schedule.choose_rows(self._unsent(), self._drafting, len(self._in_flight))
            if chosen:
                return self._send(chosen)
        return None

    def next_head(self) -> RunHead | None:
        """Logits for returned rows that the walk may still reach."""
        while self._returned:
            rows, hidden = self._returned.popleft()
            kept = [index for index, row in enumerate(rows) if self._is_open(row.id)]
            if kept:
                self._head_rows = [rows[index] for index in kept]
                return RunHead(self.session, hidden[kept])
        return None

    def next_draft(self) -> ExtendDraft | ExpandDraft | None:
        """The next pass of the drafter, or None."""
        if not self._drafts or self._root < self._num_prompt:
            return None
        if self._num_extended < self._tree[self._root].depth:
            return self._extend()
        if not self._schedule.wants_pass(len(self._unsent()), self._drafting, len(self._in_flight)):
            return None
        frontier = self._drafting.frontier(self._max_depth())
        if not frontier:
            return None
        self._draft_rows = [row.id for row in frontier]
        self.statistics.num_draft_passes += 1
        return ExpandDraft(self.session, tuple(frontier), self._positions(frontier))

    def check(self) -> None:
        """Assert the invariants."""
        self._tree.check()
        assert set(self._drafting.scores) <= {row.id for row in self._tree}
        assert self.is_finished or self._root in self._tree
        for chunk in self._in_flight:
            assert all(id in self._tree for id in chunk)

    # ------------------------------------------------------------------ inside

    def _step(self, token: int) -> str | None:
        """The token after the root is known: make it the root. Returns why the text ends here, if it does."""
        child = self._tree[self._root].children.get(token)
        self._num_left -= 1
        if child is not None and child in self._sent:
            self.statistics.num_rows_useful += 1
        if token in self._limits.eos_token_ids:
            return "stop"
        if self._num_left == 0:
            return "length"
        if child is None:
            child = self._next_id
            self._next_id += 1
            self._tree.add(Row(child, self._root, token))
        self._root = child
        return None

    def _prune(self, advance: Advance) -> int:
        self._tree.advance(advance)
        dropped = self._tree.take_dropped()
        num_pruned = 0
        for id in dropped:
            num_pruned += id in self._sent
            self._hidden.pop(id, None)
            self._logits.pop(id, None)
            self._sent.discard(id)
        gone = set(dropped)
        # A chunk without a living row will not come back.
        self._in_flight = deque(living for chunk in self._in_flight if (living := chunk - gone))
        for id in [id for id in self._logits if not self._is_open(id)]:
            del self._logits[id]
        self._drafting.restart(self._root)
        self._draft_rows = None
        return num_pruned

    def _is_open(self, id: int) -> bool:
        """Whether the row lives and is the root or below it: the walk may still reach it."""
        row = self._tree.get(id)
        return row is not None and row.depth >= self._tree[self._root].depth

    def _extend(self) -> ExtendDraft:
        """Pairs of a position's hidden row and the token behind it, for all positions the drafter has not seen."""
        path = []
        row = self._tree[self._root]
        while row.depth > self._num_extended:
            path.append(row)
            row = self._tree[row.parent]
        path.reverse()
        rows = [Row(row.id, row.parent, row.token) for row in path]
        hidden = np.stack([self._hidden.pop(row.parent) for row in rows])  # [rows, hidden_size]
        self._num_extended = self._tree[self._root].depth
        self._draft_rows = [self._root]
        self.statistics.num_draft_passes += 1
        return ExtendDraft(self.session, tuple(rows), self._positions(rows), hidden)

    def _positions(self, rows: list[Row]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """A pair stands at the position of its hidden row, one before its token. [rows]"""
        return np.array([self._tree[row.id].depth - 1 for row in rows], np.int64)

    def _max_depth(self) -> int:
        """The deepest position whose logits can still matter: that of the last token but one."""
        return self._tree[self._root].depth + self._num_left - 1

    def _unsent(self) -> list[int]:
        """Drafted rows that may be sent, best first, parents before children."""
        tree, scores, max_depth = self._tree, self._drafting.scores, self._max_depth()
        ready = [
            (-score, id)
            for id, score in scores.items()
            if id not in self._sent and tree[id].parent in self._sent and tree[id].depth <= max_depth
        ]
        heapq.heapify(ready)
        ordered = []
        while ready:
            _, id = heapq.heappop(ready)
            ordered.append(id)
            if tree[id].depth < max_depth:
                for child in tree[id].children.values():
                    heapq.heappush(ready, (-scores[child], child))
        return ordered

    def _send(self, ids: list[int]) -> SendChunk:
        rows = tuple(Row(id, self._tree[id].parent, self._tree[id].token) for id in ids)
        self._sent.update(ids)
        self._in_flight.append(set(ids))
        self.statistics.num_rows_sent += len(ids)
        return SendChunk(self.session, rows, len(rows), None)

    def _report(self, num_returned: int, num_accepted: int, num_pruned: int) -> ReportTrip:
        num_drafted, self._num_trip_drafted = self._num_trip_drafted, 0
        num_in_flight = sum(len(chunk) for chunk in self._in_flight)
        return ReportTrip(self.session, num_returned, num_accepted, num_pruned, num_drafted, num_in_flight)
