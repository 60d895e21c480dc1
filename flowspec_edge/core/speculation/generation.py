"""One generation at the origin: prompt in, tokens out, the tree in between.

The root is the last token that is known and whose successor is not. When rows come back, the walk starts there: draw the
next token from the target's logits, and while that token is a child in the tree whose logits are here too, go on. A token
that is not in the tree becomes the new root and leaves at once; nothing is drained. The origin (core/origin.py) asks for
chunks when the ring has credit and for computation when its one compute lane is free; verification comes first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from flowspec_edge.config import GenerateOptions
from flowspec_edge.core.events import (
    BroadcastAdvance,
    BroadcastTurn,
    DraftFinished,
    EmitTokens,
    FinishGeneration,
    OriginAction,
    ReportTrip,
    RunDraft,
    RunHead,
)
from flowspec_edge.core.limits import PREFILL_ROWS, TREE_MARGIN
from flowspec_edge.core.rows import NO_PARENT, Advance, Chunk, Floats, Row
from flowspec_edge.core.speculation.acceptance import Acceptance
from flowspec_edge.core.speculation.drafting import Drafting, DraftShape
from flowspec_edge.core.speculation.lookup import Lookup
from flowspec_edge.core.speculation.pipeline import Flight, Pipeline, RingCosts
from flowspec_edge.core.speculation.schedules import find_schedule
from flowspec_edge.core.speculation.tree import Tree
from flowspec_edge.core.speculation.verify import Sampler
from flowspec_edge.errors import ProtocolError, RequestError


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """What the origin must know of the model: context length in tokens, size of the vocabulary, the ids that end a text."""

    max_context: int
    vocab_size: int
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

    def __add__(self, other: GenerationStatistics) -> GenerationStatistics:
        """Of one text that two rings wrote at."""
        return GenerationStatistics(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, bonus included: num_tokens / num_verifications."""
        return self.num_tokens / self.num_verifications if self.num_verifications else 0.0


class Generation:
    """The origin's side of one session. Schedules read its public attributes and choose; nothing else changes them."""

    def __init__(
        self,
        session: int,
        prompt: tuple[int, ...],
        options: GenerateOptions,
        *,
        limits: TargetLimits,
        costs: RingCosts,
        acceptance: Acceptance,
        has_drafter: bool,
        shape: DraftShape,
        taps: tuple[int, ...] = (),
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
        self.num_stages = len(costs.stages)
        self._limits = limits
        self._sampler = Sampler(options, limits.vocab_size)
        self._schedule = find_schedule(options.schedule)(self.num_stages)
        self._drafts = self._schedule.uses_drafter and has_drafter
        self._taps = taps if self._drafts else ()
        self._tapped: dict[int, dict[int, Floats]] = {}  # per verified row, by layer, until all layers have come
        self._num_left = min(options.max_new_tokens, room)
        self.capacity = len(prompt) + self._num_left + TREE_MARGIN

        self.tree = Tree()
        rows = [Row(id, id - 1 if id else NO_PARENT, token) for id, token in enumerate(prompt)]
        for row in rows:
            self.tree.add(row)
        self._next_id = len(rows)
        self.root = rows[-1].id
        self._num_prompt = len(rows)
        self._prefill = deque(tuple(rows[i : i + PREFILL_ROWS]) for i in range(0, len(rows), PREFILL_ROWS))
        self.sent: set[int] = {row.id for row in rows}  # prompt rows leave by themselves
        self.pipeline = Pipeline(costs)
        self._returned: deque[tuple[tuple[Row, ...], Floats]] = deque()  # waiting for the head
        self._head_rows: list[Row] = []  # what the running head works on
        # What the drafter wants of each row until it has taken it: the normed hidden row, or those of the tapped layers.
        self._hidden: dict[int, Floats] = {}
        self._logits: dict[int, Floats] = {}
        self.drafting = Drafting(
            self.tree,
            shape,
            acceptance=acceptance if self._schedule.is_calibrated else None,
            lookup=Lookup(prompt) if self._schedule.uses_lookup else None,
            sampler=self._sampler if self._schedule.is_coupled else None,
        )
        self._num_extended = 0  # how many rows from the first on the drafter has taken as verified pairs
        self._draft_rows: list[int] = []  # what the running pass works on
        self._num_pass_rows = 0
        self._computing_since = 0.0
        self._undrafted: list[int] = []  # rows that died and that the drafter has not been told of
        self._num_trip_drafted = 0

    # ------------------------------------------------------------------ what the ring brings

    def take_returned(self, chunk: Chunk, now: float) -> None:
        """Hidden rows came back from the last stage."""
        rows, hidden = chunk.rows, chunk.hidden
        assert hidden is not None, "the last stage sends hidden rows"
        if self._drafts and not self._taps:
            self._hidden.update((row.id, hidden[index]) for index, row in enumerate(rows) if row.id in self.tree)
        self.pipeline.take_returned({row.id for row in rows}, chunk.passages, now)
        self._returned.append((rows, hidden))
        self._drop_returned()

    def take_tapped(self, layer: int, ids: tuple[int, ...], hidden: Floats) -> None:
        """Hidden rows came from the stage that owns a tapped layer.

        Raises:
            ProtocolError: nobody asked for them, or one came twice.
        """
        for id, values in zip(ids, hidden, strict=True):
            rows = self._tapped.setdefault(id, {})
            if layer not in self._taps or layer in rows or id not in self.tree or id in self._hidden:
                raise ProtocolError(f"session {self.session}: row {id} of layer {layer} came unasked, or twice")
            rows[layer] = values
            if len(rows) == len(self._taps):
                self._hidden[id] = np.concatenate([rows[tap] for tap in self._taps])
                del self._tapped[id]

    def take_logits(self, logits: Floats, now: float) -> list[OriginAction]:
        """The head has finished: walk from the root, emit, prune."""
        self._logits.update((row.id, logits[index]) for index, row in enumerate(self._head_rows))
        num_returned, self._head_rows = len(self._head_rows), []
        self.pipeline.costs.head.add(num_returned, now - self._computing_since)
        tokens: list[int] = []
        advance: Advance | None = None
        reason: str | None = None
        while reason is None and self.root in self._logits:
            token = self._sampler.draw(self._logits[self.root], self.tree[self.root].depth + 1)
            advance = Advance(self.root, token)
            tokens.append(token)
            reason = self._step(token)
        self.statistics.num_trips += 1
        if advance is None:
            return [self._report(num_returned, 0, 0)]
        num_pruned = self._prune(advance, tokens, now)
        self.statistics.num_tokens += len(tokens)
        self.statistics.num_verifications += 1
        self._schedule.take_verified(self, len(tokens), now)
        actions: list[OriginAction] = [
            EmitTokens(self.session, tuple(tokens)),
            self._report(num_returned, len(tokens), num_pruned),
        ]
        if reason is not None:
            self.is_finished = True
            return [*actions, FinishGeneration(self.session, reason)]
        return [BroadcastAdvance(self.session, *advance), *actions]

    def take_draft(self, draft: DraftFinished, now: float) -> None:
        """A pass of the drafter has finished."""
        parents, self._draft_rows = self._draft_rows, []
        self.pipeline.costs.draft.add(self._num_pass_rows, now - self._computing_since)
        added = self.drafting.merge(parents, draft.tokens, draft.log_probs, self._next_id)
        self._next_id += len(added)
        self._num_trip_drafted += len(added)

    # ------------------------------------------------------------------ what the origin may do next

    def next_turn(self, *, has_credit: bool) -> BroadcastTurn | None:
        """The next turn, where the schedule has turns and everything of the last one is done."""
        if self._prefill:
            return None
        turn = self._schedule.next_turn(self, has_credit)
        return None if turn is None else BroadcastTurn(self.session, turn)

    def next_chunk(self, now: float) -> Chunk | None:
        """The next chunk to send, or None: the prompt, then what the schedule chooses."""
        if self._prefill:
            rows = self._prefill.popleft()
            num_wanted = len(rows) if self._drafts and not self._taps else int(not self._prefill)
            if num_wanted:
                self.pipeline.send(Flight({row.id for row in rows}, now))
            return Chunk(self.session, rows, num_wanted)
        chosen = self._schedule.choose_rows(self, now)
        return self._send(chosen, now) if chosen else None

    def next_deadline(self) -> float | None:
        """When ``next_chunk`` may have something to send though nothing has happened."""
        return None if self._prefill else self._schedule.next_time()

    def next_head(self, now: float) -> RunHead | None:
        """Logits for returned rows that the walk may still reach."""
        if not self._schedule.may_verify(self):
            return None
        rows: list[Row] = []
        hidden: list[Floats] = []
        while self._returned:
            returned, values = self._returned.popleft()
            kept = [index for index, row in enumerate(returned) if self._is_open(row.id)]
            rows += [returned[index] for index in kept]
            hidden += [values[kept]]
        if not rows:
            return None
        self._head_rows, self._computing_since = rows, now
        return RunHead(self.session, np.concatenate(hidden))

    def next_draft(self, now: float) -> RunDraft | None:
        """The next pass of the drafter, or None."""
        if not self._drafts or self.root < self._num_prompt:
            return None
        drafted = self._schedule.choose_pass(self, now)
        if drafted is None:
            return None
        verified = self._unextended() if self.num_unextended else []
        rows = [*verified, *(id for id in drafted if id != self.root)]
        assert rows, "a pass over nothing"
        hidden = [self._hidden.pop(self.tree[id].parent) for id in verified]
        self._num_extended += len(verified)
        self._draft_rows = rows[max(len(verified) - 1, 0) :]
        self._num_pass_rows, self._computing_since = len(rows), now
        dropped, self._undrafted = tuple(self._undrafted), []
        self.statistics.num_draft_passes += 1
        return RunDraft(
            self.session,
            tuple(Row(id, self.tree[id].parent, self.tree[id].token) for id in rows),
            np.array([self.tree[id].depth - 1 for id in rows], np.int64),
            np.stack(hidden) if hidden else np.zeros((0, 0), np.float32),
            dropped,
        )

    def check(self) -> None:
        """Assert the invariants."""
        self.tree.check()
        assert set(self.drafting.scores) <= {row.id for row in self.tree}
        assert self.is_finished or self.root in self.tree
        for flight in self.pipeline.flights:
            assert all(id in self.tree for id in flight.living)

    # ------------------------------------------------------------------ what schedules ask

    @property
    def cancels(self) -> bool:
        """Whether stages give up forwards over dead rows."""
        return self._schedule.cancels

    @property
    def is_tapped(self) -> bool:
        """Whether stages send hidden rows of tapped layers."""
        return bool(self._taps)

    @property
    def num_unextended(self) -> int:
        """Verified rows that the drafter has not taken yet, and can take."""
        return 0 if self._is_awaiting_tapped else self.tree[self.root].depth - self._num_extended

    @property
    def max_depth(self) -> int:
        """The deepest position whose logits can still matter: that of the last token but one."""
        return self.tree[self.root].depth + self._num_left - 1

    @property
    def num_living_sent(self) -> int:
        """Draft rows that the stages hold."""
        return sum(id in self.sent for id in self.drafting.scores)

    @property
    def is_computing(self) -> bool:
        """Whether head or drafter work for this session, or returned rows wait for them, or the drafter for tapped rows."""
        return bool(self.is_verifying or self._draft_rows or self._is_awaiting_tapped)

    @property
    def is_verifying(self) -> bool:
        """Whether returned rows wait for the head or are with it."""
        return bool(self._returned or self._head_rows)

    def unsent(self, min_score: float = float("-inf")) -> Iterator[int]:
        """Drafted rows that may be sent, best first, parents before children."""
        tree, scores, sent, max_depth = self.tree, self.drafting.scores, self.sent, self.max_depth
        root = self.root
        ready = [
            (-score, id)
            for id, score in scores.items()
            if score >= min_score and id not in sent and ((parent := tree[id].parent) == root or parent in sent)
        ]
        heapq.heapify(ready)
        while ready:
            _, id = heapq.heappop(ready)
            row = tree[id]
            if row.depth > max_depth:
                continue
            yield id
            for child in row.children.values():
                if scores[child] >= min_score:
                    heapq.heappush(ready, (-scores[child], child))

    # ------------------------------------------------------------------ inside

    @property
    def _is_awaiting_tapped(self) -> bool:
        """Whether the drafter cannot take the verified rows before their tapped rows are here. They come in any order."""
        root = self.tree[self.root]
        if not self._taps or self.root < self._num_prompt or root.depth == self._num_extended:
            return False
        return root.parent not in self._hidden or any(
            self.tree[id].parent not in self._hidden for id in self._unextended()
        )

    def _unextended(self) -> list[int]:
        """Draft ids of those rows, in order."""
        path = []
        row = self.tree[self.root]
        while row.depth > self._num_extended:
            path.append(row.id)
            row = self.tree[row.parent]
        return path[::-1]

    def _step(self, token: int) -> str | None:
        """The token after the root is known: make it the root. Returns why the text ends here, if it does."""
        self.drafting.observe(self.root, token)
        child = self.tree[self.root].children.get(token)
        self._num_left -= 1
        if child is not None and child in self.sent:
            self.statistics.num_rows_useful += 1
        if token in self._limits.eos_token_ids:
            return "stop"
        if self._num_left == 0:
            return "length"
        if child is None:
            child = self._next_id
            self._next_id += 1
            self.tree.add(Row(child, self.root, token))
        self.root = child
        return None

    def _prune(self, advance: Advance, tokens: list[int], now: float) -> int:
        self.tree.advance(advance)
        dropped = self.tree.take_dropped()
        num_pruned = 0
        for id in dropped:
            num_pruned += id in self.sent
            self._hidden.pop(id, None)
            self._logits.pop(id, None)
            self.sent.discard(id)
        # A chunk without a living row will not come back.
        self.pipeline.prune(set(dropped), now)
        for id in [id for id in self._logits if not self._is_open(id)]:
            del self._logits[id]
        self._drop_returned()
        self.drafting.forget(dropped)
        self._undrafted += dropped
        self._next_id += len(self.drafting.move_root(self.root, tokens, self._next_id))
        return num_pruned

    def _drop_returned(self) -> None:
        self._returned = deque(
            (rows, hidden) for rows, hidden in self._returned if any(self._is_open(row.id) for row in rows)
        )

    def _is_open(self, id: int) -> bool:
        """Whether the row lives and is the root or below it: the walk may still reach it."""
        row = self.tree.get(id)
        return row is not None and row.depth >= self.tree[self.root].depth

    def _send(self, ids: list[int], now: float) -> Chunk:
        rows = tuple(Row(id, self.tree[id].parent, self.tree[id].token) for id in ids)
        self.sent.update(ids)
        turn = self._schedule.turn
        self.pipeline.send(Flight(set(ids), now, turn))
        self.statistics.num_rows_sent += len(ids)
        return Chunk(self.session, rows, len(rows), turn=turn)

    def _report(self, num_returned: int, num_accepted: int, num_pruned: int) -> ReportTrip:
        num_drafted, self._num_trip_drafted = self._num_trip_drafted, 0
        num_in_flight = sum(len(flight.living) for flight in self.pipeline.flights)
        return ReportTrip(self.session, num_returned, num_accepted, num_pruned, num_drafted, num_in_flight)
