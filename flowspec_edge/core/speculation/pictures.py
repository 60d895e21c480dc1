"""What a text's draft tree is now, read off its generation for whoever looks; nothing is changed by that.

Taking a picture costs some 0.2 ms, and nothing is kept for it: where nobody looks, there is nothing to pay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from flowspec_edge.core.speculation.draft_table import LikelyDrafts
from flowspec_edge.core.speculation.statistics import GenerationStatistics

if TYPE_CHECKING:
    from flowspec_edge.core.speculation.generation import Generation
    from flowspec_edge.core.speculation.lanes import Job, Trip
    from flowspec_edge.core.speculation.tree import Tree

MOST_DRAFTS = 96
"""In a picture, the likeliest ones: more cannot be told apart on a screen."""
MOST_TEXT = 24
"""Rows of the text in a picture, the last ones: what grows between two looks, and some to see it grow from."""


class KnownRow(NamedTuple):
    """A row of the text, by its draft id and its token."""

    id: int
    token: int


class Way(NamedTuple):
    """A chunk under way: its living rows, when it left, and when each stage is expected to begin and end it."""

    ids: Sequence[int]
    sent_at: float
    begins: Sequence[float]
    ends: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPicture:
    """A text that is written. Of its prompt ``num_read`` rows of ``num_prompt`` have entered the ring.

    ``text`` ends at the root, which is at ``position``. ``drafts`` are the likeliest of ``num_drafts`` rows below it.
    """

    session: int
    label: str
    num_prompt: int
    num_read: int
    position: int
    text: Sequence[KnownRow]
    num_drafts: int
    drafts: LikelyDrafts
    ways: Sequence[Way]
    counts: GenerationStatistics


@dataclass(frozen=True, slots=True, kw_only=True)
class RingPicture:
    """All that a ring does, at the time ``now`` of the origin's clock."""

    now: float
    texts: Sequence[TextPicture]
    trips: Sequence[Trip]
    jobs: Sequence[Job]


def picture_of(generation: Generation, label: str) -> TextPicture:
    """What a generation is at."""
    num_read, num_prompt = generation.prompt_progress
    text = _last_rows(generation.tree, generation.root)
    return TextPicture(
        session=generation.session,
        label=label,
        num_prompt=num_prompt,
        num_read=num_read,
        position=generation.tree[generation.root].depth if text else 0,
        text=text,
        num_drafts=len(generation.drafting),
        drafts=generation.drafting.likeliest(MOST_DRAFTS),
        ways=[
            Way(sorted(flight.living), flight.sent_at, [*flight.starts], [*flight.ends])
            for flight in generation.pipeline.flights
        ],
        counts=replace(generation.statistics),
    )


def _last_rows(tree: Tree, root: int) -> list[KnownRow]:
    """The last rows of the text, down to the root; none while that has not entered the ring."""
    rows: list[KnownRow] = []
    row = tree.get(root)
    while row is not None and len(rows) < MOST_TEXT:
        rows.append(KnownRow(row.id, row.token))
        row = tree.get(row.parent)
    return rows[::-1]
