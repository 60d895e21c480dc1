"""One generation at the origin: prompt in, tokens out, the tree in between.

The root is the last token that is known and whose successor is not. When rows come back, the head draws the token after
each of them. The walk starts at the root: it takes the token that is drawn there, and goes on while that token is a
child in the tree after which one is drawn too. A token that is not in the tree becomes the new root and leaves at once;
nothing is drained. The origin asks for chunks when the ring has credit and for computation when its one compute lane is
free; verification comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flowspec_edge.config import GenerateOptions, TokenLogprobs
from flowspec_edge.core.events import (
    BroadcastAdvance,
    BroadcastTurn,
    CheckDrafts,
    DraftFinished,
    EmitTokens,
    FinishGeneration,
    HeadFinished,
    OriginAction,
    ReportTrip,
    RunDraft,
    RunHead,
)
from flowspec_edge.core.limits import PREFILL_ROWS, RECENT_ROWS, TREE_MARGIN
from flowspec_edge.core.rows import Advance, Chunk, Floats, Row, check_width
from flowspec_edge.core.speculation.acceptance import Acceptance
from flowspec_edge.core.speculation.draft_feed import DraftFeed
from flowspec_edge.core.speculation.drafting import Drafting, DraftShape
from flowspec_edge.core.speculation.head_feed import HeadFeed
from flowspec_edge.core.speculation.kept_sessions import EndedText
from flowspec_edge.core.speculation.lookup import Lookup
from flowspec_edge.core.speculation.pipeline import Flight, Pipeline, Traffic
from flowspec_edge.core.speculation.prompt_check import room_behind
from flowspec_edge.core.speculation.prompt_feed import PromptFeed
from flowspec_edge.core.speculation.schedules.base import Schedule
from flowspec_edge.core.speculation.sharing import Offer
from flowspec_edge.core.speculation.statistics import GenerationStatistics
from flowspec_edge.core.speculation.text_paths import TextPaths
from flowspec_edge.core.speculation.tree import Tree

PROMPT_PAIRS = 2048
"""The most pairs of a prompt that the drafter takes at once, before anything is drafted."""
PROMPT_PASSES = 2
"""Beside other sessions the drafter runs over a part of a prompt for at most as long as so many passes over a tree."""


@dataclass(frozen=True, slots=True)
class TargetLimits:
    """What the origin must know of the model: context length in tokens, vocabulary size, the ids that end a text.

    Hidden rows have ``hidden_size`` values; where that is 0, it is not known and nothing is held against it.
    """

    max_context: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    hidden_size: int = 0


class Generation:
    """The origin's side of one session. Its schedule sees it as a ``GenerationView`` and answers what is to be done."""

    def __init__(
        self,
        session: int,
        prompt: tuple[int, ...],
        options: GenerateOptions,
        *,
        schedule: Schedule,
        limits: TargetLimits,
        traffic: Traffic,
        acceptance: Acceptance,
        has_drafter: bool,
        shape: DraftShape,
        taps: tuple[int, ...] = (),
        num_written: int = 0,
    ) -> None:
        self.session, self.statistics, self.is_finished = session, GenerationStatistics(), False
        self._schedule, self._limits = schedule, limits
        self._options = options.for_drawing(limits.eos_token_ids)
        self._ends = options.end_token_ids(limits.eos_token_ids)
        self._num_left = min(options.max_new_tokens, room_behind(prompt, limits.max_context, limits.vocab_size))
        self.capacity = len(prompt) + self._num_left + TREE_MARGIN
        self.tree = tree = Tree(num_prompt=len(prompt))
        self._next_id = len(prompt)
        self.root = len(prompt) - 1
        self.sent: set[int] = set()  # the prompt leaves without the schedule
        self.pipeline = Pipeline(traffic)
        lookup = Lookup() if schedule.uses_lookup else None
        self._paths = TextPaths(tree, prompt, num_written, self._num_left) if options.looks_back else None
        self._prompt_feed = PromptFeed(prompt, tree, lookup)
        observed = acceptance if schedule.is_calibrated else None
        self.drafting = Drafting(
            tree, shape, acceptance=observed, lookup=lookup, is_checked=options.grammar is not None
        )
        self._head_feed = HeadFeed(tree)
        ranking = self._options if schedule.is_coupled else None, options.grammar
        is_on = has_drafter and schedule.uses_drafter
        self._draft_feed = DraftFeed(session, tree, len(prompt), taps, self._paths, *ranking, is_on=is_on)
        self._computing_since, self._num_trip_drafted = 0.0, 0
        self._last: Advance | None = None  # the one that ends the text, which stages need not hear of

    # ------------------------------------------------------------------ a session before, and one behind

    @property
    def owner(self) -> str:
        """Whose text it is."""
        return self._options.owner

    @property
    def has_drafts(self) -> bool:
        """Whether the session uses its drafter."""
        return self._draft_feed.is_on

    def begin(self, text: EndedText, num_rows: int) -> None:
        """The first rows of the prompt are those of an ended session, and are at the stages already."""
        self._prompt_feed.begin(num_rows)
        self._draft_feed.begin(text, num_rows)
        self.statistics.num_rows_kept = num_rows

    def end(self) -> tuple[EndedText, tuple[int, ...], list[BroadcastAdvance]] | None:
        """What may be kept of the session, which ends now: its verified rows, the draft ids of those that the drafter
        has taken, and what the stages have to be told first. None where there are none.
        """
        if self._last is not None:
            last = self.root
        elif self.statistics.num_verifications:
            last = self.tree[self.root].parent
        else:  # the row behind it may not have come to all stages, and this one is not known to be committed
            last = self.statistics.num_rows_kept - 2
        if last < 0:
            return None
        rows = self.tree.path(last)
        text = self._draft_feed.end(rows)
        taken = tuple(row.id for row in rows[1 : text.num_taken + 1])
        return text, taken, [] if self._last is None else [BroadcastAdvance(self.session, *self._last)]

    @property
    def prompt_progress(self) -> tuple[int, int]:
        """How many rows of the prompt have entered the ring, and how many there are."""
        return self._prompt_feed.progress

    # ------------------------------------------------------------------ what the ring brings

    def take_returned(self, chunk: Chunk, now: float) -> None:
        """Hidden rows came back from the last stage. Raises ProtocolError if they are not the model's."""
        assert chunk.hidden is not None, "the last stage sends hidden rows"
        check_width(chunk.hidden, self._limits.hidden_size)
        self._draft_feed.take_returned(chunk.rows, chunk.hidden)
        self.pipeline.take_returned({row.id for row in chunk.rows}, chunk.passages, now)
        if self._prompt_feed.is_done:
            self._head_feed.take_returned(chunk.rows, chunk.hidden, self.root)

    def take_tapped(self, layer: int, ids: tuple[int, ...], hidden: Floats) -> None:
        """Hidden rows came from the stage that owns a tapped layer. Raises ProtocolError if nobody asked for them."""
        check_width(hidden, self._limits.hidden_size)
        self._draft_feed.take_tapped(layer, ids, hidden)

    def take_drawn(self, drawn: HeadFinished, now: float) -> list[OriginAction]:
        """The head has finished, and has drawn tokens: walk from the root, emit, prune."""
        num_returned = self._head_feed.take_drawn(drawn)
        self.pipeline.costs.head.add(num_returned, now - self._computing_since)
        self.statistics.num_trips += 1
        if drawn.refusal is not None:
            self.is_finished = True
            return [FinishGeneration(self.session, "refused", drawn.refusal)]
        tokens: list[int] = []
        forced: tuple[int, ...] = ()
        logprobs: list[TokenLogprobs] = []
        advance: Advance | None = None
        reason: str | None = None
        while reason is None and (token := self._head_feed.drawn_after(self.root)) is not None:
            advance = Advance(self.root, token)
            tokens.append(token)
            if self._options.num_logprobs is not None:
                logprobs.append(self._head_feed.logprobs_after(self.root))
            forced = self._head_feed.forced_after(self.root)
            reason = self._step(token)
        if advance is None:
            return [self._report(num_returned, 0, 0)]
        num_pruned = self._prune(advance, now)
        if reason is None:
            self._next_id += len(self.drafting.move_root(self.root, tokens, self._next_id))
            if self._schedule.uses_lookup:
                self._next_id += len(self.drafting.add_forced(forced, self._next_id))
        self.statistics.num_tokens += len(tokens)
        self.statistics.num_verifications += 1
        self._schedule.take_verified(self, len(tokens), now)
        actions: list[OriginAction] = [
            EmitTokens(self.session, tuple(tokens), tuple(logprobs)),
            self._report(num_returned, len(tokens), num_pruned),
        ]
        if reason is not None:
            self.is_finished, self._last = True, advance
            return [*actions, FinishGeneration(self.session, reason)]
        return [BroadcastAdvance(self.session, *advance), *actions]

    def take_draft(self, draft: DraftFinished, now: float) -> None:
        """A pass of the drafter has finished."""
        parents, num_rows = self._draft_feed.take_finished()
        self.pipeline.costs.draft.add(num_rows, now - self._computing_since)
        if not parents:  # it took a part of the prompt
            return
        added = self.drafting.merge(parents, draft.tokens, draft.log_probs, self._next_id)
        self._next_id += len(added)
        self._num_trip_drafted += len(added)

    def take_checked(self, num_allowed: tuple[int, ...]) -> None:
        """The grammar has been asked about chains of drafts, and allows so many rows of each."""
        self._next_id += len(self.drafting.add_checked(num_allowed, self._next_id))

    # ------------------------------------------------------------------ what the origin may do next

    def next_turn(self, *, has_credit: bool) -> BroadcastTurn | None:
        """The next turn, where the schedule has turns and everything of the last one is done."""
        turn = self._schedule.next_turn(self, has_credit) if self._prompt_feed.is_done else None
        return None if turn is None else BroadcastTurn(self.session, turn)

    def offer(self, now: float) -> Offer | None:
        """The chunk that may leave now, or None: the prompt, then what the schedule chooses."""
        if not self._prompt_feed.is_done:
            feed = self._prompt_feed
            return Offer(feed.num_next(self.pipeline.prompt_chunk_rows(feed.num_rows)))
        chosen = self._schedule.choose_rows(self, now)
        if not chosen:
            return None
        return Offer(len(chosen), tuple(chosen), sum(map(math.exp, self.drafting.scores_of(chosen))))

    def send(self, offer: Offer, now: float) -> Chunk:
        """The chunk that was offered, which leaves now."""
        if offer.ids:
            return self._send(offer.ids, now)
        rows = self._prompt_feed.next_rows(offer.num_rows)
        self.sent.update(row.id for row in rows)
        if self._prompt_feed.is_done:
            self.pipeline.begin_writing()
            self._next_id += len(self.drafting.move_root(self.root, (), self._next_id))
        num_wanted = len(rows) if self._draft_feed.wants_returned else int(self._prompt_feed.is_done)
        self.pipeline.send(Flight({row.id for row in rows}, now, comes_back=num_wanted > 0))
        return Chunk(self.session, rows, num_wanted)

    def next_deadline(self) -> float | None:
        """When ``offer`` may have something to send though nothing has happened."""
        return self._schedule.next_time() if self._prompt_feed.is_done else None

    def waits(self, now: float) -> bool:
        """Whether ``offer`` has nothing to send before its deadline, unless something happens."""
        deadline = self.next_deadline()
        return deadline is not None and deadline > now

    def next_head(self, now: float) -> RunHead | None:
        """The tokens after returned rows that the walk may still reach."""
        if not (self._prompt_feed.is_done and self._schedule.may_verify(self)):
            return None
        found = self._head_feed.next_rows(self.root)
        if found is None:
            return None
        rows, hidden = found
        self._computing_since = now
        positions = tuple(self.tree[row.id].depth for row in rows)
        paths = None if self._paths is None else self._paths.to((row.id for row in rows), self.root)
        return RunHead(self.session, rows, positions, hidden, self._options, paths)

    def next_draft(self, now: float) -> RunDraft | None:
        """The next pass of the drafter, or None."""
        if (part := self._next_draft_of_prompt(now)) is not None:
            self._computing_since = now
            return part
        drafted = self._schedule.choose_pass(self, now) if self._draft_feed.may_draft(self.root) else None
        if drafted is None:
            return None
        self._computing_since = now
        self.statistics.num_draft_passes += 1
        return self._draft_feed.next_pass(self.root, drafted)

    def next_check(self) -> CheckDrafts | None:
        """The chains of drafts about which the grammar is to be asked now, or None."""
        if self.drafting.unchecked is None or not (chains := self.drafting.unchecked.next_chains()):
            return None
        assert self._options.grammar is not None and self._paths is not None, "only a grammar checks"
        paths = self._paths.to(chains, self.root)
        return CheckDrafts(self.session, self._options.grammar, paths, tuple(chains.values()))

    @property
    def cancels(self) -> bool:
        """Whether stages give up forwards over dead rows."""
        return self._schedule.cancels

    @property
    def is_tapped(self) -> bool:
        """Whether stages send hidden rows of tapped layers."""
        return self._draft_feed.is_tapped

    def check(self) -> None:
        """Assert the invariants."""
        self.tree.check()
        if self.is_finished:
            return
        self.drafting.check()
        assert self.num_living_sent == len(self.sent.intersection(self.drafting.scores))
        assert self.root in self.tree or not self._prompt_feed.is_done
        for flight in self.pipeline.flights:
            assert all(id in self.tree for id in flight.living)

    # ------------------------------------------------------------------ what schedules ask (GenerationView)

    @property
    def num_unextended(self) -> int:
        """Verified rows that the drafter has not taken yet, and can take."""
        return self._draft_feed.num_unextended(self.root)

    @property
    def max_depth(self) -> int:
        """The deepest position whose logits can still matter: that of the last token but one."""
        return self.tree[self.root].depth + self._num_left - 1

    @property
    def num_living_sent(self) -> int:
        """Draft rows that the stages hold."""
        return self.drafting.num_sent

    @property
    def is_computing(self) -> bool:
        """Whether head or drafter work for this session, or rows wait for the head, or the drafter for its input."""
        return self.is_verifying or self._draft_feed.is_running or self._draft_feed.is_awaiting_tapped(self.root)

    @property
    def is_verifying(self) -> bool:
        """Whether returned rows wait for the head or are with it."""
        return self._head_feed.is_busy

    def unsent(self, min_score: float = float("-inf"), /) -> Iterator[tuple[int, float]]:
        """Drafted rows that may be sent and their scores, best first, parents before children.

        All but the last RECENT_ROWS of a row's path are verified and were sent before, so rows of one chunk have the
        same older ancestors. The root may be in the chunk.
        """
        deepest = min(self.max_depth, self.tree[self.root].depth + RECENT_ROWS - 1)
        return self.drafting.unsent(deepest, min_score)

    # ------------------------------------------------------------------ inside

    def _next_draft_of_prompt(self, now: float) -> RunDraft | None:
        """A pass of the drafter over a part of the prompt, which keeps neither the head nor other sessions waiting.

        Alone in the ring, the drafter takes what has come back at once. What is left when the first token is known goes
        with the first draft.
        """
        feed, pipeline, draft = self._draft_feed, self.pipeline, self.pipeline.costs.draft
        if pipeline.num_others:
            usual_s = draft.line.at(self.drafting.shape.width)
            size = draft.line.rows_within(PROMPT_PASSES * usual_s, PROMPT_PAIRS) if draft.has_samples else PREFILL_ROWS
            return feed.next_of_prompt(size, size)
        if feed.may_draft(self.root):
            return feed.next_of_prompt(PROMPT_PAIRS, PROMPT_PAIRS)
        most, due_at = PROMPT_PAIRS, pipeline.row_returns_at(self.root)
        if due_at is not None and due_at > now:
            most = draft.line.rows_within(due_at - now, most)
        return feed.next_of_prompt(1, most)

    def _step(self, token: int) -> str | None:
        """The token after the root is known: make it the root. Returns why the text ends here, if it does."""
        self.drafting.observe(self.root, token)
        child = self.tree[self.root].children.get(token)
        self._num_left -= 1
        if self._paths is not None:
            self._paths.append(token)
        if child is not None and child in self.sent:
            self.statistics.num_rows_useful += 1
        if token in self._ends:
            return "stop"
        if self._num_left == 0:
            return "length"
        if child is None:
            child = self._next_id
            self._next_id += 1
            self.tree.add(Row(child, self.root, token))
        self.root = child
        return None

    def _prune(self, advance: Advance, now: float) -> int:
        """Drop dead rows from the tree and all that refers to them. Returns how many of them had been sent."""
        self.tree.advance(advance)
        dropped = self.tree.take_dropped()
        num_pruned = len(self.sent.intersection(dropped))
        self.sent.difference_update(dropped)
        self.pipeline.prune(set(dropped), now)  # a chunk without a living row does not come back
        self._head_feed.prune(self.root)
        self._draft_feed.forget(dropped)
        return num_pruned

    def _send(self, ids: tuple[int, ...], now: float) -> Chunk:
        rows = tuple(Row(id, self.tree[id].parent, self.tree[id].token) for id in ids)
        self.sent.update(ids)
        self.drafting.mark_sent(ids)
        turn = self._schedule.turn
        self._schedule.take_sent()
        self.pipeline.send(Flight(set(ids), now, turn))
        self.statistics.num_rows_sent += len(ids)
        return Chunk(self.session, rows, len(rows), turn=turn)

    def _report(self, num_returned: int, num_accepted: int, num_pruned: int) -> ReportTrip:
        num_drafted, self._num_trip_drafted = self._num_trip_drafted, 0
        num_in_flight = sum(len(flight.living) for flight in self.pipeline.flights)
        return ReportTrip(self.session, num_returned, num_accepted, num_pruned, num_drafted, num_in_flight)
