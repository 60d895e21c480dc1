"""FlowSpec without a barrier, steered by what was measured.

Three questions, each answered by the time that is expected to be won or lost:

* Which rows? The likeliest ones, as long as one more row wins more time than it costs. A row that is left out waits for
  the next chunk, or longer where likelier rows push ahead again. If the text goes through that row, it comes later by
  an interval of the slowest stage, or by several. A row that is taken delays its whole chunk by what a row costs on a
  trip. That matters if the text enters the chunk at all. And it delays each other session's next chunk by what a row
  costs the slowest stage, and less where that is but a piece of a prompt. So chunks are wide where rows cost little,
  single rows of a chain where each row costs much, and narrower where more sessions share the ring.
* When? As late as the ring allows without a bubble: rows that are chosen later are chosen with more known. A new root
  leaves at once, with the children that it has by then.
* Now, or after the next chunk is back? That one may show that the text goes elsewhere, and then a chunk that left just
  before blocks the first stage until the block ends that it runs. A chunk leaves first only if the time that it wins,
  should the text enter it, exceeds the time that it costs, should the text not enter it; each time counts by its
  chance.

The whole is checked by its result: where speculation brings less than single rows would, it pauses
(core/speculation/payoff.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

from flowspec_edge.core.limits import MAX_LIVING_ROWS, MAX_TREE_ROWS
from flowspec_edge.core.speculation.payoff import Payoff
from flowspec_edge.core.speculation.pipeline import LEAD_S
from flowspec_edge.core.speculation.schedules.base import GenerationView, Schedule

WIDEST_CHUNK_ROWS = 128
"""Rows of a chunk at most, however little they cost."""
PASS_SLACK = 0.1
"""The share of its time by which a pass of the drafter may be prolonged for rows beyond the shape's width."""
MAX_PASS_ROWS = 24
"""Drafted rows of a pass at most."""
INTERVALS_LATE = 1.5
"""How many intervals of the slowest stage a row that is left out comes later, on average.

On the testbeds tokens/s are up to 6 % lower with 1, and as high with 2."""
TRIPS_LATE = 0.325
"""How much of a trip a row that is left out comes later at least: where stages are many, an interval is short, and
likelier rows push ahead for several of them."""
MIN_SCORE = math.log(0.001)
"""Rows less likely than this are neither sent nor expanded."""


class Flowspec(Schedule):
    """The default schedule. The module says how it decides."""

    cancels: ClassVar[bool] = True
    is_calibrated: ClassVar[bool] = True
    uses_lookup: ClassVar[bool] = True
    is_coupled: ClassVar[bool] = True

    def __init__(self, num_stages: int) -> None:
        super().__init__(num_stages)
        self._payoff = Payoff()
        self._ask_at = math.inf

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        self._payoff.count(num_tokens, now, view.pipeline.plain_token_s)

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        rows, entry = self._rows_worth_sending(view)
        self._ask_at = self._leaves_at(view, rows, entry, now) if rows else math.inf
        return rows if self._ask_at <= now else []

    def next_time(self) -> float | None:
        return self._ask_at if self._ask_at < math.inf else None

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        if not self._payoff.is_on:
            return None
        drafting, pipeline = view.drafting, view.pipeline
        width = drafting.shape.width
        if (row_s := pipeline.costs.draft.line.per_row) > 0:  # rows that cost nearly nothing come along
            width = min(width + int(PASS_SLACK * pipeline.costs.draft.line.at(width) / row_s), MAX_PASS_ROWS)
        if not view.num_unextended:
            if len(drafting) > MAX_TREE_ROWS:
                return None
            returns_at = pipeline.returns_at()
            if returns_at is not None and now <= returns_at < now + pipeline.costs.draft.line.at(width):
                return None  # the next chunk is due, and its head comes first
        rows = drafting.next_pass(width, view.max_depth, MIN_SCORE)
        return rows if rows or view.num_unextended else None

    def _candidates(self, view: GenerationView) -> Iterable[tuple[int, float]]:
        """The rows that may leave, each with its score, in the order in which they are to leave."""
        return view.unsent(MIN_SCORE) if self._payoff.is_on else ()

    def _rows_worth_sending(self, view: GenerationView) -> tuple[list[int], float]:
        """The next chunk, and the chance that the text enters it."""
        tree, sent = view.tree, view.sent
        is_new_root = view.root not in sent
        rows = [view.root] if is_new_root else []
        entry = 1.0 if is_new_root else 0.0
        most, won_s, lost_s, others_lost_s = self._worth_of_rows(view)
        most = min(most, MAX_LIVING_ROWS - view.num_living_sent)
        for id, score in self._candidates(view):
            chance = math.exp(score)
            if tree[id].parent in sent:  # the parents of all others come before them
                entry = min(entry + chance, 1.0)
            if len(rows) >= most or (rows and chance * won_s < entry * lost_s + others_lost_s):
                break
            rows.append(id)
        return rows, entry

    def _worth_of_rows(self, view: GenerationView) -> tuple[int, float, float, float]:
        """How many rows a chunk has at most, and what one more row is worth.

        The row wins a time if the text goes on through it, and loses another if the text enters the chunk. No token is
        worth more than it takes without drafts. The last number is what the other sessions lose together.
        """
        costs, num_delayed = view.pipeline.costs, view.pipeline.num_delayed
        late_s = max(INTERVALS_LATE * costs.single_row_s, TRIPS_LATE * costs.plain_token_s)
        won_s = min(late_s, costs.plain_token_s)
        return WIDEST_CHUNK_ROWS, won_s, costs.seconds_per_row, num_delayed * costs.row_s

    def _leaves_at(self, view: GenerationView, rows: list[int], entry: float, now: float) -> float:
        """When the chunk should leave, or be chosen anew; infinity if something else must happen first."""
        pipeline = view.pipeline
        if rows[0] == view.root or not pipeline.costs.is_measured:
            return now
        at = pipeline.send_at(len(rows)) - LEAD_S
        leaves_at, known_at = max(at, now), self._known_at(view, now)
        wait_s, num_rows = known_at - leaves_at, len(rows)
        blocked_s = pipeline.blocked_s(num_rows, leaves_at, known_at)
        if view.is_verifying:
            return math.inf if entry < 0.5 or entry * wait_s < (1 - entry) * blocked_s else at
        blocked_s = max(blocked_s, pipeline.costs.interval_s(num_rows) - wait_s)
        return known_at if wait_s > 0 and entry * wait_s < (1 - entry) * blocked_s else at

    def _known_at(self, view: GenerationView, now: float) -> float:
        """When the head will be done with what has come back, or else with what comes back next; in the past where
        nothing is under way, and where that is late, for who knows how late.
        """
        pipeline = view.pipeline
        returns_at = now if view.is_verifying else pipeline.returns_at()
        return -math.inf if returns_at is None else returns_at + pipeline.costs.head.line.at(1)
