"""What a schedule may decide, what it may look at, and the defaults of what it leaves open.

A schedule is asked, looks at a ``GenerationView`` and answers. It changes nothing but its own state: the views have no
method that would. The generation does what the schedule answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import ClassVar, Protocol

from flowspec_edge.core.line import Line


class RowView(Protocol):
    """One living row of the tree."""

    @property
    def parent(self) -> int:
        """The draft id of the row's parent."""

    @property
    def depth(self) -> int:
        """The row's position in the text, from 0."""

    @property
    def children(self) -> Mapping[int, int]:
        """The draft ids of the row's children, by token."""


class TreeView(Protocol):
    """The living rows: the text so far, and all that is drafted below the root."""

    def __getitem__(self, id: int, /) -> RowView:
        """The row of that draft id."""


class ShapeView(Protocol):
    """How a draft tree is meant to grow."""

    @property
    def width(self) -> int:
        """How many rows the drafter runs in one pass."""


class DraftingView(Protocol):
    """What is drafted below the root, and what the drafter could run next.

    Rows at ``max_depth`` and deeper are never proposed for a pass, since their children could not become text. Where
    ``since`` is given, only passes with a higher number count: what earlier ones ran is to be drafted anew.
    """

    @property
    def shape(self) -> ShapeView:
        """How a draft tree is meant to grow."""

    def __len__(self) -> int:
        """The number of drafted rows."""

    @property
    def scores(self) -> Mapping[int, float]:
        """The log of the chance that the text goes on from the root through a drafted row, for each, sent or not.

        It is made anew each time that it is asked for.
        """

    @property
    def num_passes(self) -> int:
        """How many passes of the drafter have finished in this generation."""

    def frontier(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        """The likeliest rows whose children are not drafted yet, though their parent's are; at most ``width``."""

    def stale(self, width: int, max_depth: int, since: int = 0) -> list[int]:
        """The likeliest rows that ran before their parent ran again: a pass would see more; at most ``width``."""

    def next_pass(self, width: int, max_depth: int, min_score: float) -> list[int]:
        """The rows that are most worth a pass, frontier and stale ones together, none below ``min_score``."""

    def best_rows(self, most: int, since: int = 0) -> list[int]:
        """The likeliest rows, sent or not, whose parents ran after pass number ``since``; at most ``most``."""


class FitView(Protocol):
    """A time that is measured again and again."""

    @property
    def line(self) -> Line:
        """Seconds by the number of rows, as far as measured."""


class CostsView(Protocol):
    """What the ring and the origin's own computations take, as measured so far."""

    @property
    def is_measured(self) -> bool:
        """Whether a chunk has come back yet. Before that all times are 0."""

    @property
    def head(self) -> FitView:
        """The time of the head over a number of returned rows."""

    @property
    def draft(self) -> FitView:
        """The time of a pass of the drafter."""

    @property
    def seconds_per_row(self) -> float:
        """What one more row adds to the trip of its chunk."""

    @property
    def plain_token_s(self) -> float:
        """The time of a token without speculation: a single row's trip, and the head."""

    @property
    def row_s(self) -> float:
        """How much longer the slowest stage is busy for one more row."""

    @property
    def single_row_s(self) -> float:
        """How long the slowest stage is busy with a chunk of one row."""

    def interval_s(self, num_rows: float, /) -> float:
        """How long the slowest stage is busy with a chunk of ``num_rows``."""


class FlightView(Protocol):
    """A chunk that has not come back."""

    @property
    def living(self) -> AbstractSet[int]:
        """The draft ids of the chunk's rows that live."""

    @property
    def sent_at(self) -> float:
        """When the chunk left the origin."""

    @property
    def turn(self) -> int:
        """The turn that the chunk belongs to; 0 where there are no turns."""


class PipelineView(Protocol):
    """The chunks of the session under way, and when the stages will be done with all chunks."""

    @property
    def num_delayed(self) -> float:
        """How many other sessions a row of this one delays; one that reads its prompt counts as less than one."""

    @property
    def plain_token_s(self) -> float:
        """The time of a token if no session speculated; longer than that of a token alone where sessions crowd the
        ring.
        """

    @property
    def costs(self) -> CostsView:
        """What the ring takes, as measured so far."""

    @property
    def flights(self) -> Sequence[FlightView]:
        """The session's chunks that have not come back, in the order in which they left."""

    def send_at(self, num_rows: int, /) -> float:
        """When a chunk should leave the origin: as late as it may without a bubble at the stage that paces the ring,
        but not later than chunks of other sessions, which would take its place.
        """

    def returns_at(self) -> float | None:
        """When the next chunk is expected back; None where none is under way or nothing was measured yet."""

    def blocked_s(self, num_rows: int, leaves_at: float, known_at: float, /) -> float:
        """For how long a chunk of ``num_rows`` that leaves at ``leaves_at`` would keep the first stage from the next
        one, if at ``known_at`` it turns out that none of its rows lives.
        """


class GenerationView(Protocol):
    """One generation, as a schedule sees it.

    The root is the last token that is known and whose successor is not. Below it hang the drafted rows; those that were
    sent are at the stages or on their way.
    """

    @property
    def root(self) -> int:
        """The draft id of the root."""

    @property
    def tree(self) -> TreeView:
        """The text so far, and what is drafted below the root."""

    @property
    def sent(self) -> AbstractSet[int]:
        """The living rows that have left the origin, the prompt's included. A new root is not among them."""

    @property
    def drafting(self) -> DraftingView:
        """What is drafted below the root, and what the drafter could run next."""

    @property
    def pipeline(self) -> PipelineView:
        """The chunks under way, and when the stages will be done with them."""

    @property
    def max_depth(self) -> int:
        """The deepest position whose logits can still matter: that of the last token but one."""

    @property
    def num_unextended(self) -> int:
        """Verified rows that the drafter can take and has not taken yet: they are worth a pass without drafted rows."""

    @property
    def num_living_sent(self) -> int:
        """Draft rows that the stages hold."""

    @property
    def is_computing(self) -> bool:
        """Whether head or drafter work for this generation, rows wait for the head, or the drafter for its input."""

    @property
    def is_verifying(self) -> bool:
        """Whether returned rows wait for the head or are with it."""

    def unsent(self, min_score: float = float("-inf"), /) -> Iterator[tuple[int, float]]:
        """Drafted rows that may be sent and their scores, best first, parents before children, none below
        ``min_score``.
        """


class Schedule:
    """A policy over the machinery of one generation."""

    uses_drafter: ClassVar[bool] = True
    """Whether anything is drafted by the bundle's drafter."""
    uses_lookup: ClassVar[bool] = False
    """Whether repetitions of the text are drafts as well."""
    is_calibrated: ClassVar[bool] = False
    """Whether scores are chances of acceptance as observed, or the drafter's own probabilities."""
    is_coupled: ClassVar[bool] = False
    """Whether drafts are ranked by their chance of being drawn, with the noise that the target will be sampled with."""
    cancels: ClassVar[bool] = False
    """Whether a stage gives up a forward none of whose rows lives any more."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.turn = 0
        """The turn that the next chunk belongs to; 0 where there are no turns."""

    def choose_rows(self, view: GenerationView, now: float) -> list[int]:
        """Draft ids of the next chunk, parents before children; empty to wait.

        What is answered may be sent now, or asked for anew later: another session's chunk may go first.
        """
        raise NotImplementedError

    def take_sent(self) -> None:
        """The rows that were chosen last have left."""

    def choose_pass(self, view: GenerationView, now: float) -> list[int] | None:
        """Drafted rows for the drafter's next pass, to which verified rows are added; None for no pass now.

        An empty list asks for a pass over verified rows alone, where there are any.
        """
        return None

    def may_verify(self, view: GenerationView) -> bool:
        """Whether returned rows may be verified now."""
        return True

    def next_time(self) -> float | None:
        """When to ask for rows again though nothing has happened, if the last answer was to wait."""
        return None

    def next_turn(self, view: GenerationView, has_credit: bool) -> int | None:
        """The number of the turn that begins now, if one does. What is answered is told to all stages."""
        return None

    def take_verified(self, view: GenerationView, num_tokens: int, now: float) -> None:
        """Tokens were accepted and the root has moved."""
